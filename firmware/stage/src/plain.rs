//! The first stage in an ordinary virtual machine: all memory is there from the start, and the monitor
//! hears of everything through ports.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use core::ops::Range;

use cofferdam_firmware::first_stage::Platform;
use cofferdam_firmware::layout::{REFUSAL_PORT, SERIAL_PORT};
use cofferdam_firmware::manifest;
use cofferdam_firmware::reason::Reason;

use crate::memory;

/// The serial port's line status register, and its bit "transmitter empty".
const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// An ordinary virtual machine. There is one value of it, which owns all memory that is free.
pub struct Plain;

impl Platform for Plain {
    fn start(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn must_accept(&self) -> bool {
        false
    }

    fn accept(&mut self, _memory: Range<u64>) -> Result<(), Reason> {
        Ok(())
    }

    fn finish(&mut self) -> Result<u64, Reason> {
        Ok(0)
    }

    fn launch_manifest(&self) -> &[u8; manifest::SIZE] {
        memory::launch_manifest()
    }

    fn memory(&mut self, address: u64, length: u64) -> &mut [u8] {
        // SAFETY: the borrow of `self` keeps other slices away.
        unsafe { memory::slice(address, length) }
    }

    fn copy(&mut self, from: u64, to: u64, length: u64) {
        // SAFETY: the borrow of `self` keeps slices away.
        unsafe { memory::copy(from, to, length) }
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let result = __cpuid_count(leaf, subleaf);
        [result.eax, result.ebx, result.ecx, result.edx]
    }

    fn console(&mut self, byte: u8) {
        // A port that is not there reads as all ones.
        while inb(LINE_STATUS_PORT) & TRANSMITTER_EMPTY == 0 {}
        outb(SERIAL_PORT, byte);
    }

    fn terminate(&mut self, reason: Reason) -> ! {
        loop {
            outb(REFUSAL_PORT, reason.code());
        }
    }
}

fn outb(port: u16, value: u8) {
    // SAFETY: no port of a domain changes this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}
