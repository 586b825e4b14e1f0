//! Looks for itself in the load window: it is there at first, and empty a while after the first access to a device.
//! Small, as the first stage has to hash it, and without I/O before it wants some.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // the whole program is assembly

use core::arch::global_asm;
use core::panic::PanicInfo;

use cofferdam_firmware::layout;

/// `SLP_EN` and the sleep type of "off" (ACPI 6.5, 4.8.3.7).
const POWER_OFF: u8 = 1 << 5 | layout::SLEEP_TYPE_S5 << 2;
/// The first bytes of an ELF file.
const ELF: u32 = u32::from_le_bytes(*b"\x7fELF");

global_asm!(
    r#"
    .section .text.entry, "ax"
    .global start64
start64:
    mov bl, 1                   // not there
    mov edi, {window}
    cmp dword ptr [rdi], {elf}
    jne 2f
    mov bl, 2                   // still there
    mov ecx, 10000000
0:  in al, 0x80                 // nobody's port
    cmp dword ptr [rdi], 0      // nothing is left of the file
    je 1f
    dec ecx
    jnz 0b
    jmp 2f
1:  mov bl, 42
2:  mov al, bl
    mov edx, {exit_code_port}
    out dx, al
    mov edx, {sleep_control_port}
    mov al, {power_off}
    out dx, al
3:  hlt
    jmp 3b
    "#,
    window = const layout::LOAD_WINDOW,
    elf = const ELF,
    exit_code_port = const layout::EXIT_CODE_PORT,
    sleep_control_port = const layout::SLEEP_CONTROL_PORT,
    power_off = const POWER_OFF,
);

#[panic_handler]
fn panicked(_: &PanicInfo) -> ! {
    loop {}
}
