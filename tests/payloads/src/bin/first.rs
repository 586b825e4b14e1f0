//! Marks user space with its very first instructions, and powers off with the next: what remains of a run is the
//! monitor's. It brings its own entry point, for the library's prepares more than it needs.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // the whole program is assembly

use core::arch::global_asm;
use core::panic::PanicInfo;

use cofferdam_firmware::layout;

/// `SLP_EN` and the sleep type of "off" (ACPI 6.5, 4.8.3.7).
const POWER_OFF: u8 = 1 << 5 | layout::SLEEP_TYPE_S5 << 2;

// These instructions are encoded alike in 32-bit mode (PVH) and 64-bit mode (the Linux protocol).
global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4                     // length of the name
    .long 4                     // length of the description
    .long 18                    // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start64

    .section .text.entry, "ax"
    .global start64
start64:
    mov edx, {user_space_port}
    mov al, 1
    out dx, al
    mov edx, {sleep_control_port}
    mov al, {power_off}
    out dx, al
0:  hlt
    jmp 0b
    "#,
    user_space_port = const layout::USER_SPACE_PORT,
    sleep_control_port = const layout::SLEEP_CONTROL_PORT,
    power_off = const POWER_OFF,
);

#[panic_handler]
fn panicked(_: &PanicInfo) -> ! {
    loop {}
}
