//! Prints a line, marks user space and exits with 42.
#![no_std]
#![no_main]

use cofferdam_payloads::{payload, power, println};

payload!(main);

fn main() -> u8 {
    println!("hello from a payload");
    power::mark_user_space();
    42
}
