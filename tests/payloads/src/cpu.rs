//! Instructions that Rust has no words for.
#![allow(unsafe_code)] // port accesses and privileged instructions are assembly

use core::arch::asm;

use crate::{ram, snp};

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    if snp::is_active() {
        return snp::outb(port, value);
    }
    // SAFETY: no port of a domain changes this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes two bytes to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes four bytes to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    if snp::is_active() {
        return snp::inb(port);
    }
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads two bytes from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes `count` bytes from `address` to a port, by one instruction.
pub fn outsb(port: u16, address: u64, count: u64) {
    // SAFETY: reads RAM; no port of a domain changes this program's memory.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") address => _, inout("rcx") count => _,
            options(readonly, nostack));
    }
}

/// Reads `count` bytes from a port to `address`, which is in [`crate::ram`], by one instruction.
pub fn insb(port: u16, address: u64, count: u64) {
    assert!(address >= ram::START && address + count <= ram::END, "no {count} bytes at {address:#x}");
    // SAFETY: writes RAM that no Rust object lies in.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") address => _, inout("rcx") count => _, options(nostack));
    }
}

/// Lets some microseconds pass, on any machine: nobody answers this port, so the monitor has to.
pub fn delay() {
    inb(0x80);
}

/// Halts for good: interrupts are off.
pub fn halt() -> ! {
    loop {
        // SAFETY: waits.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// Ends the vCPU by an exception that has no handler, nor have those for that. An undefined instruction, not a
/// software interrupt: the emulator of the development machines' KVM does not know those.
pub fn triple_fault() -> ! {
    let no_handlers = [0u16; 5];
    // SAFETY: never comes back.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &no_handlers, options(noreturn)) }
}

/// Goes on at `address`, for good.
pub fn jump(address: u64) -> ! {
    // SAFETY: never comes back; what is there is the caller's affair, and this is a guest made to break.
    unsafe { asm!("jmp {}", in(reg) address, options(noreturn)) }
}
