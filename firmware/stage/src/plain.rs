//! The first stage in an ordinary virtual machine: all memory is there from the start, and the monitor
//! hears of everything through ports.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use core::ops::Range;
use core::slice;

use cofferdam_firmware::first_stage::Platform;
use cofferdam_firmware::layout::{
    COMMAND_LINE, GAP_START, LAUNCH_MANIFEST, PAGE_SIZE, REFUSAL_PORT, SERIAL_PORT, STAGE,
};
use cofferdam_firmware::manifest;
use cofferdam_firmware::reason::Reason;

/// Memory that holds nothing of the first stage or of its image. Address 0 is left out, as no slice may be there.
const FREE: [Range<u64>; 2] = [PAGE_SIZE..STAGE, COMMAND_LINE..GAP_START];

/// The serial port's line status register, and its bit "transmitter empty".
const LINE_STATUS_PORT: u16 = SERIAL_PORT + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// An ordinary virtual machine. There is one value of it, which owns all memory in [`FREE`].
pub struct Plain;

/// Whether `length` bytes at `address` are in [`FREE`].
fn is_free(address: u64, length: u64) -> bool {
    FREE.iter().any(|range| range.contains(&address) && length <= range.end - address)
}

impl Platform for Plain {
    fn accept_memory(&mut self, _memory: u64) {}

    fn launch_manifest(&self) -> &[u8; manifest::SIZE] {
        // SAFETY: a page of the image, which nothing writes: it is not in `FREE`.
        unsafe { &*(LAUNCH_MANIFEST as *const [u8; manifest::SIZE]) }
    }

    fn memory(&mut self, address: u64, length: u64) -> &mut [u8] {
        if !is_free(address, length) {
            return &mut [];
        }
        // SAFETY: mapped, and no part of this program; the borrow of `self` keeps other slices of it away.
        unsafe { slice::from_raw_parts_mut(address as *mut u8, length as usize) }
    }

    fn copy(&mut self, from: u64, to: u64, length: u64) {
        if !is_free(to, length) {
            return;
        }
        // SAFETY: writes memory that is no part of this program, and to which no slice is borrowed.
        unsafe {
            asm!(
                "rep movsq",
                "mov ecx, edx",
                "rep movsb",
                inout("rsi") from => _,
                inout("rdi") to => _,
                inout("rcx") length / 8 => _,
                in("edx") (length % 8) as u32,
                options(nostack, preserves_flags)
            );
        }
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
