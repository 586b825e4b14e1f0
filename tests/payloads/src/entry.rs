//! From the monitor's entry point to the payload's `main`.
//!
//! | protocol | entered at | in | with |
//! |---|---|---|---|
//! | PVH | `start32`, named by a Xen note | 32-bit mode, paging off | EBX = `hvm_start_info` |
//! | Linux, 64-bit | `start64`, the ELF entry point | long mode, first GiB mapped | RSI = `boot_params` |
//!
//! Both continue with this file's GDT and, but for [`snp`], page tables, which map the first 4 GiB
//! onto themselves, so that RAM and devices are where their addresses say.
#![allow(unsafe_code)] // entry code in assembly, and the monitor's structures in memory

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};

use cofferdam_firmware::layout::COMMAND_LINE_MAX;
use cofferdam_firmware::page_tables::SNP_PRIVATE;

use crate::{power, println, snp};

/// Offset of `cmd_line_ptr` in `boot_params` (Documentation/arch/x86/boot.rst in Linux).
const BOOT_PARAMS_COMMAND_LINE: u64 = 0x228;
/// Offset of `cmdline_paddr` in `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h in Xen).
const START_INFO_COMMAND_LINE: u64 = 24;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4                     // length of the name
    .long 4                     // length of the description
    .long 18                    // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

    .section .text.entry, "ax"
    .code32
    .global start32
start32:
    cli
    cld
    mov $page_tables, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax              // physical address extension
    mov %eax, %cr4
    mov $0xC0000080, %ecx       // EFER
    rdmsr
    or $0x100, %eax             // long mode enable
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax        // paging, protected mode
    mov %eax, %cr0
    lgdt gdt_pointer
    mov %ebx, %esi
    xor %edi, %edi
    ljmp $8, $start_common

    .code64
    .global start64
start64:
    cli
    cld
    mov %rsi, %rdi
    xor %esi, %esi
    mov %cr3, %rax
    bt ${private}, %rax
    jc 1f                       // tables of private memory are the first stage's: see snp.rs
    mov $page_tables, %eax
    mov %rax, %cr3
1:
    lgdt gdt_pointer
    mov $stack_end, %esp
    push $8
    push $start_common
    lretq

    // EDI = boot_params or 0, ESI = start info or 0
start_common:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_end, %esp
    mov %edi, %edi
    mov %esi, %esi
    xor %ebp, %ebp
    call payload_start
    ud2

    .section .data.entry, "aw"
    .global gdt
    .global page_tables
    .balign 8
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF    // 8: 64-bit code
    .quad 0x00CF93000000FFFF    // 16: data
gdt_pointer:
    .short gdt_pointer - gdt - 1
    .quad gdt

    .balign 4096
page_tables:
    .quad directory_pointers + 3
    .fill 511, 8, 0
    .global directory_pointers
directory_pointers:
    .quad directories + 3
    .quad directories + 0x1003
    .quad directories + 0x2003
    .quad directories + 0x3003
    .fill 508, 8, 0
directories:
    .set page, 0x83             // 2 MiB, present, writable
    .rept 2048
    .quad page
    .set page, page + 0x200000
    .endr

    .section .bss.stack, "aw", @nobits
    .balign 16
    .fill 0x8000, 1, 0
stack_end:
    "#,
    private = const SNP_PRIVATE.trailing_zeros(),
    options(att_syntax)
);

/// Address of the kernel command line, 0 if there is none.
static COMMAND_LINE: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    fn payload_main() -> !;
}

/// Names the function (`fn() -> u8`) that a payload consists of; it returns the exit code.
#[macro_export]
macro_rules! payload {
    ($main:path) => {
        #[allow(unsafe_code)] // only so can the entry code find it
        #[unsafe(no_mangle)]
        extern "C" fn payload_main() -> ! {
            $crate::power::exit($main())
        }
    };
}

#[unsafe(no_mangle)]
extern "C" fn payload_start(boot_params: u64, start_info: u64) -> ! {
    snp::start();
    let command_line = if boot_params != 0 {
        // SAFETY: the boot protocol gave this address of `boot_params`, which nothing writes.
        u64::from(unsafe { ((boot_params + BOOT_PARAMS_COMMAND_LINE) as *const u32).read_unaligned() })
    } else {
        // SAFETY: PVH gave this address of `hvm_start_info`, which nothing writes.
        unsafe { ((start_info + START_INFO_COMMAND_LINE) as *const u64).read_unaligned() }
    };
    COMMAND_LINE.store(command_line, Ordering::Relaxed);
    // SAFETY: `payload!` has defined it with this signature.
    unsafe { payload_main() }
}

/// The kernel command line.
pub fn command_line() -> &'static [u8] {
    let address = COMMAND_LINE.load(Ordering::Relaxed);
    if address == 0 {
        return &[];
    }
    // SAFETY: the monitor put a NUL-terminated string of at most this length there, and nothing writes it.
    let bytes = unsafe { slice::from_raw_parts(address as *const u8, COMMAND_LINE_MAX + 1) };
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// The value of option `name` ("name=value" among the words of the command line).
pub fn option(name: &str) -> Option<&'static [u8]> {
    let mut words = command_line().split(|&byte| byte == b' ');
    words.find_map(|word| word.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// The value of option `name`, a decimal number.
pub fn number(name: &str) -> Option<u64> {
    core::str::from_utf8(option(name)?).ok()?.parse().ok()
}

#[panic_handler]
fn panicked(info: &PanicInfo) -> ! {
    println!("{info}");
    power::exit(99)
}
