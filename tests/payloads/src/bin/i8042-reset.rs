//! Resets the machine by the keyboard controller.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{I8042_COMMAND_PORT, I8042_RESET_COMMAND};
use cofferdam_payloads::{cpu, payload};

payload!(main);

fn main() -> u8 {
    cpu::outb(I8042_COMMAND_PORT, I8042_RESET_COMMAND);
    cpu::halt()
}
