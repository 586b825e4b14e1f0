//! Ends its vCPU by a triple fault.
#![no_std]
#![no_main]

use cofferdam_payloads::{cpu, payload};

payload!(main);

fn main() -> u8 {
    cpu::triple_fault()
}
