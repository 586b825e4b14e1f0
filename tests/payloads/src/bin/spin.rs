//! Marks user space, then never ends: busy, or halted with `mode=halt` on the command line.
#![no_std]
#![no_main]

use cofferdam_payloads::{cpu, entry, payload, power};

payload!(main);

fn main() -> u8 {
    power::mark_user_space();
    if entry::option("mode") == Some(b"halt") {
        cpu::halt()
    }
    loop {
        core::hint::spin_loop();
    }
}
