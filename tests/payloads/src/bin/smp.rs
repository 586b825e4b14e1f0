//! Starts the other vCPUs and prints "cpus N". Exits with 0 if N is the number that
//! the command line gives by `cpus=N` (one digit), else with 1.
#![no_std]
#![no_main]

use cofferdam_payloads::{entry, payload, println, smp};

payload!(main);

fn main() -> u8 {
    let expected = match entry::option("cpus") {
        Some(&[digit @ b'1'..=b'9']) => u32::from(digit - b'0'),
        _ => 1,
    };
    let cpus = smp::start(expected - 1) + 1;
    println!("cpus {cpus}");
    u8::from(cpus != expected)
}
