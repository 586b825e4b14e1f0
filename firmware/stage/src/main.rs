//! The first stage: the only program of a domain that is measured page by page. It
//! verifies the kernel, the initrd and the command line, and starts them. What it
//! does is in [`cofferdam_firmware::first_stage`], where it is tested; here is what
//! only a processor without an operating system can do.
//!
//! It is a flat program at a fixed address, entered in 64-bit mode at its first byte,
//! with page tables that map the first 4 GiB onto themselves
//! ([`cofferdam_firmware::page_tables`]). These also tell it on which platform it runs: what they are is measured where
//! something is. It handles no exceptions: one ends the domain, as does one that a hypervisor makes up.
//!
//! `confidential/build.rs` builds it, and checks its size. There is no panic in it: the
//! linker would miss the function that the panic handler calls.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // entry code in assembly, and memory by its address

mod memory;
mod plain;
mod snp;
mod tdx_reset;

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use cofferdam_firmware::first_stage::{self, Platform};
use cofferdam_firmware::layout::BOOT_PARAMS;
use cofferdam_firmware::page_tables::SNP_PRIVATE;

use crate::plain::Plain;
use crate::snp::Snp;

global_asm!(
    r#"
    .section .text.entry, "ax"
    .global stage_start
stage_start:
    cli
    cld
    lidt no_interrupts
    mov $stage_stack, %esp
    lgdt gdt_pointer
    mov %cr4, %rax
    or ${sse}, %eax
    mov %rax, %cr4
    call stage_main
    // RAX = the kernel's first instruction; the kernel gets boot_params in RSI
    mov ${data}, %ecx
    mov %ecx, %ds
    mov %ecx, %es
    mov %ecx, %fs
    mov %ecx, %gs
    mov %ecx, %ss
    mov ${boot_params}, %esi
    xor %edi, %edi
    xor %ebx, %ebx
    xor %ebp, %ebp
    jmp *%rax

    // The segments of the entry state, for those who load their selectors anew: __BOOT_CS and __BOOT_DS of Linux.
    .balign 8
no_interrupts:
gdt:
    .quad 0
    .quad 0
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF93000000FFFF
gdt_pointer:
    .short gdt_pointer - gdt - 1
    .quad gdt
    "#,
    sse = const 3 << 9, // CR4.OSFXSR, CR4.OSXMMEXCPT: for the SHA instructions
    data = const 0x18,
    boot_params = const BOOT_PARAMS,
    options(att_syntax)
);

/// Returns where the kernel begins.
#[unsafe(no_mangle)]
extern "C" fn stage_main() -> u64 {
    let platform: &mut dyn Platform = if page_tables() & SNP_PRIVATE == 0 { &mut Plain } else { &mut Snp };
    match first_stage::prepare(platform) {
        Ok(entry) => entry,
        Err(reason) => first_stage::refuse(platform, reason),
    }
}

/// CR3.
fn page_tables() -> u64 {
    let cr3;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) }
    cr3
}

unsafe extern "C" {
    /// Is nowhere: a program that could panic does not link.
    fn the_first_stage_must_not_panic() -> !;
}

#[panic_handler]
fn panicked(_: &PanicInfo) -> ! {
    // SAFETY: never called.
    unsafe { the_first_stage_must_not_panic() }
}
