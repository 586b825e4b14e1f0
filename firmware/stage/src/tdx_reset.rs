//! The page in which the vCPUs of a TDX domain start: all of them, in 32-bit mode without paging, at 16 bytes
//! below 4 GiB (TDX module base specification, "Initial state of TD VCPU"). The first one makes the page tables that
//! other platforms' images bring, and goes on at the first stage's entry; the others halt.
//!
//! Page tables and a copy of the last instructions lie in the page of [`STAGE_PAGE_TABLES`], of which only the
//! first entry is ever looked up: this page itself is not reachable once paging is on, as the GiB that it is in is
//! mapped as shared memory.

use core::arch::global_asm;

use cofferdam_firmware::layout::{STAGE, STAGE_PAGE_TABLES};

/// Where the last instructions are copied to.
const LAST: u64 = STAGE_PAGE_TABLES + 0x800;

global_asm!(
    r#"
    .section .tdx_reset, "ax"
    .code32
tdx_reset_page:
    // ESI = index of this vCPU; EBX = number of the highest address bit, which is the shared one, plus 1
    cld
    test %esi, %esi
    jz 1f
0:  hlt
    jmp 0b

1:  mov ${tables}, %edi
    movl ${tables} + 0x1003, (%edi)
    movl $0x00000083, 0x1000(%edi)
    movl $0x40000083, 0x1008(%edi)
    movl $0x80000083, 0x1010(%edi)
    movl $0xC0000083, 0x1018(%edi)
    mov %ebx, %ecx
    sub $33, %ecx
    mov $1, %eax
    shl %cl, %eax
    mov %eax, 0x101C(%edi)
    mov $tdx_last, %esi
    mov ${last}, %edi
    mov $tdx_last_end - tdx_last, %ecx
    rep movsb
    mov ${last}, %eax
    jmp *%eax

tdx_last:
    mov ${tables}, %eax
    mov %eax, %cr3
    lgdt {last} + tdx_gdt_pointer - tdx_last
    mov %cr4, %eax
    or $0x20, %eax              // physical address extension
    mov %eax, %cr4
    mov $0xC0000080, %ecx       // EFER: "long mode enable" may be set already, and not to be written
    rdmsr
    bts $8, %eax
    jc 2f
    wrmsr
2:  mov %cr0, %eax
    bts $31, %eax               // paging
    mov %eax, %cr0
    ljmp $8, ${stage}
    .balign 8
tdx_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF    // 8: 64-bit code
tdx_gdt_pointer:
    .short tdx_gdt_pointer - tdx_gdt - 1
    .long {last} + tdx_gdt - tdx_last
tdx_last_end:

    .org tdx_reset_page + 0xFF0
    jmp tdx_reset_page
    .balign 16
    .code64
    "#,
    tables = const STAGE_PAGE_TABLES,
    last = const LAST,
    stage = const STAGE,
    options(att_syntax)
);
