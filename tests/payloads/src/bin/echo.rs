//! Prints "ready", then gives serial input back byte by byte until a 'q'; exits with 0.
#![no_std]
#![no_main]

use cofferdam_payloads::{payload, println, serial};

payload!(main);

fn main() -> u8 {
    println!("ready");
    loop {
        let Some(byte) = serial::read() else { continue };
        serial::write(byte);
        if byte == b'q' {
            return 0;
        }
    }
}
