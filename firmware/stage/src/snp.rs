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
use cofferdam_firmware::page_tables::SHARED_ALIAS;
use cofferdam_firmware::reason::Reason;
use cofferdam_firmware::snp::dialogue::{self, Machine};
use cofferdam_firmware::snp::page_state::{Page, Validation};
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
        dialogue::begin(&mut Processor, cpuid_page())?;
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
        dialogue::accept(&mut Processor, memory)
    }

    fn finish(&mut self) -> Result<u64, Reason> {
        dialogue::finish(&mut Processor)?;
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

/// The instructions that only such a domain has.
struct Processor;

impl Machine for Processor {
    fn ask(&mut self, request: u64) -> u64 {
        ask(request)
    }

    fn read_ghcb(&self, offset: u64) -> u64 {
        // SAFETY: shared memory that is mapped, and no part of this program.
        unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *const u64).read_volatile() }
    }

    fn write_ghcb(&mut self, offset: u64, value: u64) {
        // SAFETY: as in `read_ghcb`.
        unsafe { ((SHARED_ALIAS + SNP_GHCB + offset) as *mut u64).write_volatile(value) }
    }

    fn pvalidate(&mut self, page: Page) -> Validation {
        pvalidate(page)
    }
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
