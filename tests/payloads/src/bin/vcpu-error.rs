//! Jumps to an address where there is no memory: KVM cannot fetch the instruction, and gives up on the vCPU.
#![no_std]
#![no_main]

use cofferdam_firmware::layout;
use cofferdam_payloads::{cpu, payload};

payload!(main);

fn main() -> u8 {
    cpu::jump(layout::LOAD_WINDOW)
}
