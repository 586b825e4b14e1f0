//! Floods the serial port: how is in `case=NAME`. See `hostile.rs`.
//!
//! `flood` sends [`FLOOD`] bytes, counting from 0, to a reader that may not read, without checkpoints. `input` is
//! flooded itself, and looks away.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::SERIAL_PORT;
use cofferdam_payloads::cpu::{inb, outb};
use cofferdam_payloads::hostile::{checkpoint, choose};
use cofferdam_payloads::payload;

payload!(main);

/// More than pipe and monitor hold.
const FLOOD: u32 = 160 << 10;
const CASES: &[(&str, fn())] = &[("flood", flood), ("input", input)];

fn main() -> u8 {
    choose(CASES)();
    0
}

fn flood() {
    (0..FLOOD).for_each(|at| outb(SERIAL_PORT, at as u8));
}

/// Switches interrupts, FIFO and loop on and off while input waits.
fn input() {
    checkpoint("ready");
    for round in 0..2000_u32 {
        for (register, value) in [(1, round), (2, round >> 1), (4, round >> 2), (3, round << 5)] {
            outb(SERIAL_PORT + register, value as u8);
            inb(SERIAL_PORT + register);
        }
    }
    for (register, value) in [(3, 3), (1, 0), (2, 0), (4, 0)] {
        outb(SERIAL_PORT + register, value);
    }
    checkpoint("done");
}
