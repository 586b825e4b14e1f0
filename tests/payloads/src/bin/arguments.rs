//! Prints the kernel command line between brackets; exits with 0.
#![no_std]
#![no_main]

use cofferdam_payloads::{entry, payload, print, println, serial};

payload!(main);

fn main() -> u8 {
    print!("[");
    entry::command_line().iter().copied().for_each(serial::write);
    println!("]");
    0
}
