//! Starting the other vCPUs, as the Intel SDM, volume 3, 10.4 asks for: INIT, then
//! two start-up IPIs, to all but oneself. Each new vCPU begins in real mode at the
//! page that the IPI names, goes to long mode at once, counts itself and halts.
#![allow(unsafe_code)] // the vCPUs' first instructions, and the local APIC

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering};

use cofferdam_firmware::layout::{BOOT_PAGE_TABLES, BOOT_PARAMS, LOCAL_APIC, PAGE_SIZE};

use crate::cpu::delay;

/// Where new vCPUs begin: a free page between two that the monitor fills.
const TRAMPOLINE: u64 = 0x8000;
const _: () = assert!(TRAMPOLINE == BOOT_PARAMS + PAGE_SIZE && TRAMPOLINE + PAGE_SIZE == BOOT_PAGE_TABLES);

/// Registers of the local APIC (Intel SDM, volume 3, table 12-1).
const SPURIOUS_INTERRUPT_VECTOR: u64 = LOCAL_APIC + 0xF0;
const INTERRUPT_COMMAND: u64 = LOCAL_APIC + 0x300;
/// Software enable, and the vector.
const APIC_ENABLED: u32 = 0x1FF;
/// Shorthand "all excluding self", level "assert".
const ALL_BUT_SELF: u32 = 0b11 << 18 | 1 << 14;
const INIT: u32 = ALL_BUT_SELF | 0b101 << 8;
const START_UP: u32 = ALL_BUT_SELF | 0b110 << 8 | (TRAMPOLINE / PAGE_SIZE) as u32;

/// How often [`cpu::delay`](delay) runs after INIT (some 10 ms), and while waiting at most (minutes).
const AFTER_INIT: u32 = 1_000;
const PATIENCE: u32 = 100_000_000;

static STARTED: AtomicU32 = AtomicU32::new(0);

global_asm!(
    r#"
    .section .rodata.trampoline, "a"
    .code16
trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl (trampoline_gdt_pointer - trampoline + 0x8000)
    mov $page_tables, %eax
    mov %eax, %cr3
    mov $0x20, %eax             // physical address extension
    mov %eax, %cr4
    mov $0xC0000080, %ecx       // EFER
    rdmsr
    or $0x100, %eax             // long mode enable
    wrmsr
    mov $0x80000011, %eax       // paging, protected mode
    mov %eax, %cr0
    ljmpl $8, $count
trampoline_gdt_pointer:
    .short 23
    .long gdt
trampoline_end:

    .section .text.count, "ax"
    .code64
count:
    lock incl {started}
1:  cli
    hlt
    jmp 1b
    "#,
    started = sym STARTED,
    options(att_syntax)
);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

fn write_apic(register: u64, value: u32) {
    // SAFETY: a register of the local APIC, mapped onto itself.
    unsafe { (register as *mut u32).write_volatile(value) }
}

/// Starts all other vCPUs and waits until there are `expected` (or minutes have passed): how many there are.
pub fn start(expected: u32) -> u32 {
    // SAFETY: the trampoline's page is free RAM, and its code is shorter than that.
    unsafe {
        let (start, end) = (&raw const trampoline, &raw const trampoline_end);
        core::ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, end.addr() - start.addr());
    }
    write_apic(SPURIOUS_INTERRUPT_VECTOR, APIC_ENABLED);
    write_apic(INTERRUPT_COMMAND, INIT);
    (0..AFTER_INIT).for_each(|_| delay());
    write_apic(INTERRUPT_COMMAND, START_UP);
    delay();
    write_apic(INTERRUPT_COMMAND, START_UP);
    for _ in 0..PATIENCE {
        if STARTED.load(Ordering::SeqCst) >= expected {
            break;
        }
        delay();
    }
    STARTED.load(Ordering::SeqCst)
}
