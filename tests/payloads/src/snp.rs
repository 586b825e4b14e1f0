//! Being a SEV-SNP domain, for payloads that may be one. They handle no exceptions, so they ask the hypervisor for every access to a
//! port or a device in so many words, through the GHCB; and [`crate::ram`] is memory that they share.
//!
//! The first stage leaves its page tables: RAM is private there, the gap with the devices shared, and the first GiB is
//! there once more, shared.
#![allow(unsafe_code)] // privileged instructions, and the GHCB by its address

use core::arch::asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use cofferdam_firmware::layout::{GIB, PAGE_SIZE, SNP_GHCB};
use cofferdam_firmware::page_tables::{SHARED_ALIAS, SNP_PRIVATE};
use cofferdam_firmware::snp::ghcb::{
    BUFFER, EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_VALID, RAX, RAX_VALID, SCRATCH, VALID_LOWER,
    VALID_UPPER, VERSION, VERSION_AND_USAGE,
};
use cofferdam_firmware::snp::msr;
use cofferdam_firmware::snp::page_state::{self, LIST_MAX, Page, Pages, State, Validation};

use crate::ram;

// Exit codes: `SVM_EXIT_IOIO`, whose first information has port, width and direction; reads and writes of devices, with address
// and width.
const PORT: u64 = 0x7B;
const PORT_IN: u64 = 1;
const PORT_BYTE: u64 = 1 << 4;
const MMIO_READ: u64 = 0x8000_0001;
const MMIO_WRITE: u64 = 0x8000_0002;

/// Bytes of [`ram`] that are shared.
const SHARED: u64 = 0x1_0000;

/// What is added to an address of [`ram`] to reach it: 0 where nothing is private.
static ALIAS: AtomicU64 = AtomicU64::new(0);

/// Finds out where it is, and gets ready. Comes first.
pub(crate) fn start() {
    let cr3: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) }
    if cr3 & SNP_PRIVATE == 0 {
        return;
    }
    // There is no console yet.
    ask(msr::change_page_state(SNP_GHCB, State::Shared));
    ask(msr::register(SNP_GHCB));
    write_ghcb(VERSION_AND_USAGE, VERSION);
    make_shared(ram::START..ram::START + SHARED);
    ALIAS.store(SHARED_ALIAS, Ordering::Relaxed);
}

/// Whether this is a SEV-SNP domain.
pub fn is_active() -> bool {
    alias() != 0
}

/// See [`ALIAS`].
pub(crate) fn alias() -> u64 {
    ALIAS.load(Ordering::Relaxed)
}

/// Makes whole pages that hold nothing of this program private; their content is gone.
pub fn make_private(range: Range<u64>) {
    change(range.clone(), State::Private);
    for page in Pages(range) {
        assert_eq!(page_state::validate(page, pvalidate), Ok(()), "{page:?}");
    }
}

/// Makes whole pages shared; their content is gone.
pub fn make_shared(range: Range<u64>) {
    change(range, State::Shared);
}

/// Has the hypervisor move pages, in lists.
fn change(range: Range<u64>, state: State) {
    let mut pages = Pages(range);
    while !pages.0.is_empty() {
        let mut count = 0;
        for page in pages.by_ref().take(LIST_MAX) {
            count += 1;
            // An entry makes its page private: the other operation is in the same bits.
            let entry = page.entry() ^ (State::Private as u64) << 52 ^ (state as u64) << 52;
            write_ghcb(BUFFER + 8 * u64::from(count), entry);
        }
        write_ghcb(BUFFER, page_state::header(count));
        let mut done = 0;
        while done < count {
            exit(page_state::EXIT_CODE, 0, 0, 0);
            assert_eq!(read_ghcb(EXIT_INFO_2), 0, "pages do not become {state:?}");
            let now = page_state::done(read_ghcb(BUFFER), count, done);
            assert!(now.is_ok(), "pages do not become {state:?}");
            done = now.unwrap_or(count);
        }
    }
}

/// The instruction of that name.
fn pvalidate(page: Page) -> Validation {
    let (code, unchanged): (u64, u8);
    // SAFETY: changes whether memory may be used that holds nothing of this program.
    unsafe {
        asm!(".byte 0xF2, 0x0F, 0x01, 0xFF", "setc {unchanged}", unchanged = out(reg_byte) unchanged,
            inout("rax") page.address => code, in("ecx") page.size as u32, in("edx") 1, options(nostack));
    }
    Validation { code: code as u32, unchanged: unchanged != 0 }
}

/// Writes a number to a page, on one of its sides.
pub fn write(page: u64, side: State, value: u64) {
    place(page, side, |place| {
        // SAFETY: `place` checks it.
        unsafe { place.write_volatile(value) }
    });
}

/// Reads what [`write`] has written.
pub fn read(page: u64, side: State) -> u64 {
    // SAFETY: `place` checks it.
    place(page, side, |place| unsafe { place.read_volatile() })
}

fn place<T>(page: u64, side: State, access: impl FnOnce(*mut u64) -> T) -> T {
    assert!(page.is_multiple_of(PAGE_SIZE) && (ram::START..GIB).contains(&page), "no page at {page:#x}");
    let alias = if side == State::Shared { SHARED_ALIAS } else { 0 };
    access((alias + page) as *mut u64)
}

/// Reads a byte from a port.
pub(crate) fn inb(port: u16) -> u8 {
    exit(PORT, u64::from(port) << 16 | PORT_BYTE | PORT_IN, 0, 0);
    read_ghcb(RAX) as u8
}

/// Writes a byte to a port.
pub(crate) fn outb(port: u16, value: u8) {
    write_ghcb(RAX, value.into());
    exit(PORT, u64::from(port) << 16 | PORT_BYTE, 0, RAX_VALID);
}

/// Reads `width` bytes of a device.
pub(crate) fn mmio_read(address: u64, width: u64) -> u64 {
    write_ghcb(BUFFER, 0);
    exit(MMIO_READ, address, width, 0);
    read_ghcb(BUFFER)
}

/// Writes `width` bytes of a device.
pub(crate) fn mmio_write(address: u64, width: u64, value: u64) {
    write_ghcb(BUFFER, value);
    exit(MMIO_WRITE, address, width, 0);
}

/// Has the hypervisor serve an exit.
fn exit(code: u64, info_1: u64, info_2: u64, valid_lower: u64) {
    write_ghcb(EXIT_CODE, code);
    write_ghcb(EXIT_INFO_1, info_1);
    write_ghcb(EXIT_INFO_2, info_2);
    write_ghcb(SCRATCH, SNP_GHCB + BUFFER);
    write_ghcb(VALID_LOWER, valid_lower);
    write_ghcb(VALID_UPPER, EXIT_VALID);
    ask(SNP_GHCB);
}

fn read_ghcb(offset: u64) -> u64 {
    // SAFETY: shared memory that is mapped and no Rust object.
    unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *const u64).read_volatile() }
}

fn write_ghcb(offset: u64, value: u64) {
    // SAFETY: as above.
    unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *mut u64).write_volatile(value) }
}

/// Gives the hypervisor a number by the GHCB MSR, and returns its answer.
fn ask(request: u64) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the hypervisor cannot change what it is not shown.
    unsafe {
        asm!("wrmsr", "rep vmmcall", "rdmsr", in("ecx") msr::GHCB, inout("eax") request as u32 => low,
            inout("edx") (request >> 32) as u32 => high, options(nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}
