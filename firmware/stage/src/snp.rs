//! The first stage in a SEV-SNP domain. Here are the instructions that only such a domain has; what is said by them, and what
//! is believed, is in [`cofferdam_firmware::snp`], where it is tested.
//!
//! Nothing here asks the hypervisor by an exception (#VC): there is no CPUID instruction, no port, no memory-mapped
//! device. The program with its stack is in pages that the launch has validated; all other memory is validated before it is
//! touched.

use core::arch::asm;
use core::ops::Range;

use cofferdam_firmware::first_stage::Platform;
use cofferdam_firmware::layout::{SNP_CC_BLOB, SNP_CC_NODE, SNP_CPUID, SNP_GHCB};
use cofferdam_firmware::manifest;
use cofferdam_firmware::page_tables::{SHARED_ALIAS, SNP_PRIVATE};
use cofferdam_firmware::reason::Reason;
use cofferdam_firmware::snp::ghcb::{
    BUFFER, EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_VALID, SCRATCH, VALID_LOWER, VALID_UPPER, VERSION,
    VERSION_AND_USAGE,
};
use cofferdam_firmware::snp::page_state::{self, LIST_MAX, Page, Pages, Size, State, Validation};
use cofferdam_firmware::snp::{cc_blob, cpuid_table, low_memory, msr};

use crate::memory;

/// A SEV-SNP domain. There is one value of it, which owns all memory that is free, and the GHCB.
pub struct Snp;

unsafe extern "C" {
    /// The end of the stack, which is the end of the first stage's memory.
    static stage_stack: u8;
}

impl Platform for Snp {
    fn start(&mut self) -> Result<(), Reason> {
        msr::check_information(ask(msr::INFORMATION))?;
        msr::check_features(ask(msr::FEATURES))?;
        cpuid_table::check(cpuid_page(), SNP_PRIVATE)?;

        msr::check_page_state(ask(msr::change_page_state(SNP_GHCB, State::Shared)))?;
        msr::check_registered(SNP_GHCB, ask(msr::register(SNP_GHCB)))?;
        for range in low_memory((&raw const stage_stack).addr() as u64) {
            self.accept(range)?;
        }
        // A kernel looks here for what a BIOS would have left.
        clear_page_0();
        Ok(())
    }

    fn must_accept(&self) -> bool {
        true
    }

    fn accept(&mut self, memory: Range<u64>) -> Result<(), Reason> {
        let mut pages = Pages(memory);
        while !pages.0.is_empty() {
            make_private(pages.clone().take(LIST_MAX))?;
            for page in pages.by_ref().take(LIST_MAX) {
                validate(page)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<u64, Reason> {
        msr::check_page_state(ask(msr::change_page_state(SNP_GHCB, State::Private)))?;
        validate(Page { address: SNP_GHCB, size: Size::Small })?;
        self.write(SNP_CC_BLOB, &cc_blob::BLOB);
        self.write(SNP_CC_NODE, &cc_blob::NODE);
        Ok(SNP_CC_NODE)
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
        cpuid_table::lookup(cpuid_page(), leaf, subleaf)
    }

    /// There is none: the monitor says in words what it is told in [`Self::terminate`].
    fn console(&mut self, _byte: u8) {}

    fn terminate(&mut self, reason: Reason) -> ! {
        loop {
            ask(msr::terminate(reason));
        }
    }
}

impl Snp {
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let place = self.memory(address, bytes.len() as u64);
        place.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }
}

fn cpuid_page() -> &'static cpuid_table::Page {
    // SAFETY: the firmware has written it at the launch, and nothing writes it any more.
    unsafe { memory::image_page(SNP_CPUID) }
}

/// Has the hypervisor make up to [`LIST_MAX`] pages private, which it may do in several steps.
fn make_private(pages: impl Iterator<Item = Page>) -> Result<(), Reason> {
    let mut count = 0;
    for page in pages {
        count += 1;
        write_ghcb(BUFFER + 8 * u64::from(count), page.entry());
    }
    write_ghcb(BUFFER, page_state::header(count));
    write_ghcb(VERSION_AND_USAGE, VERSION);
    let mut done = 0;
    while done < count {
        write_ghcb(EXIT_CODE, page_state::EXIT_CODE);
        write_ghcb(EXIT_INFO_1, 0);
        write_ghcb(EXIT_INFO_2, 0);
        write_ghcb(SCRATCH, SNP_GHCB + BUFFER);
        write_ghcb(VALID_LOWER, 0);
        write_ghcb(VALID_UPPER, EXIT_VALID);
        ask(SNP_GHCB);
        if read_ghcb(EXIT_INFO_1) as u32 != 0 || read_ghcb(EXIT_INFO_2) != 0 {
            return Err(Reason::PageState);
        }
        done = page_state::done(read_ghcb(BUFFER), count, done)?;
    }
    Ok(())
}

/// Reads a field of the GHCB. The hypervisor may change it at any time.
fn read_ghcb(offset: u64) -> u64 {
    // SAFETY: shared memory that is mapped, and no part of this program.
    unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *const u64).read_volatile() }
}

fn write_ghcb(offset: u64, value: u64) {
    // SAFETY: as in `read_ghcb`.
    unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *mut u64).write_volatile(value) }
}

/// Gives the hypervisor a number by the GHCB MSR, and returns the number that it leaves there.
fn ask(request: u64) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: whatever the hypervisor does, it cannot change private memory or registers that it is not shown.
    unsafe {
        asm!(
            "wrmsr",
            "rep vmmcall", // VMGEXIT
            "rdmsr",
            in("ecx") msr::GHCB,
            inout("eax") request as u32 => low,
            inout("edx") (request >> 32) as u32 => high,
            options(nostack)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Validates a page.
#[inline(never)]
fn validate(page: Page) -> Result<(), Reason> {
    page_state::validate(page, pvalidate)
}

/// The instruction of that name, for a page that is mapped onto itself.
fn pvalidate(page: Page) -> Validation {
    let (code, unchanged): (u64, u8);
    // SAFETY: `first_stage` and `low_memory` name pages that were never validated, so nothing of this program is in them.
    unsafe {
        asm!(
            ".byte 0xF2, 0x0F, 0x01, 0xFF",
            "setc {unchanged}",
            unchanged = out(reg_byte) unchanged,
            inout("rax") page.address => code,
            in("ecx") page.size as u32,
            in("edx") 1,
            options(nostack)
        );
    }
    Validation { code: code as u32, unchanged: unchanged != 0 }
}

/// Fills the page at address 0 with zeroes.
fn clear_page_0() {
    // SAFETY: it holds nothing of this program.
    unsafe {
        asm!("rep stosq", inout("rdi") 0_u64 => _, inout("rcx") 512_u64 => _, in("rax") 0, options(nostack, preserves_flags));
    }
}
