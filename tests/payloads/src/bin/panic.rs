//! Reports a kernel panic by pvpanic, then halts, as Linux does with panic=0.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::PVPANIC_PORT;
use cofferdam_payloads::{cpu, payload};

payload!(main);

/// `PVPANIC_PANICKED`.
const PANICKED: u8 = 1;

fn main() -> u8 {
    cpu::outb(PVPANIC_PORT, PANICKED);
    cpu::halt()
}
