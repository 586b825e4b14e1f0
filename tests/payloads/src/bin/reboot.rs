//! Resets the machine by the ACPI reset register.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{RESET_PORT, RESET_VALUE};
use cofferdam_payloads::{cpu, payload};

payload!(main);

fn main() -> u8 {
    cpu::outb(RESET_PORT, RESET_VALUE);
    cpu::halt()
}
