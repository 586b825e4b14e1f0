//! Prints `lines=N` numbered lines, or without that goes on for good.
#![no_std]
#![no_main]

use cofferdam_payloads::{entry, payload, println};

payload!(main);

fn main() -> u8 {
    let lines = entry::number("lines").unwrap_or(u64::MAX);
    for line in 1..=lines {
        println!("line {line}");
    }
    42
}
