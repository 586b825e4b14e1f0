//! Kernel files, as [`BootFiles`] reads and loads them: ELF with a PVH note, bzImage, and what looks like one.
//!
//! Holds: a file is refused in words, or has a plan inside the domain's memory, in which kernel and initrd do not
//! overlap, and which loads into a memory that has nothing beside what the plan may write.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, Write};

use arbitrary::Arbitrary;
use cofferdam_firmware::layout::{self, MIB};
use cofferdam_fuzz::kernel;
use cofferdam_vmm::boot::{BootFiles, BootPlan, Protocol};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Largest kernel that is loaded: 64 GiB of it would say no more.
const LOADED: u64 = 1 << 30;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    kernel: kernel::File<'a>,
    protocol: u8,
    memory_mib: u16,
    initrd: Option<u16>,
    line: u16,
}

thread_local! {
    static FILES: RefCell<[NamedTempFile; 2]> = RefCell::new([(); 2].map(|()| {
        // In memory, where there is such a place.
        NamedTempFile::new_in("/dev/shm").or_else(|_| NamedTempFile::new()).unwrap()
    }));
}

fn rewrite(file: &mut NamedTempFile, bytes: &[u8]) {
    file.as_file().set_len(0).unwrap();
    file.rewind().unwrap();
    file.write_all(bytes).unwrap();
}

/// Guest memory that exists only where the plan may write.
fn memory_of(plan: &BootPlan) -> GuestMemoryMmap {
    let mut ranges = vec![0..layout::LOW_MEMORY_END, layout::RESET_STUB..layout::RESET_STUB + 16];
    ranges.push(plan.kernel_memory());
    ranges.extend(plan.initrd_memory());
    let ranges: Vec<_> = ranges
        .into_iter()
        .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fuzz_target!(|input: Input| {
    let kernel = input.kernel.bytes();
    let protocol = [Protocol::Auto, Protocol::Pvh, Protocol::Linux64][usize::from(input.protocol) % 3];
    let line = "x".repeat(usize::from(input.line) % 2200);
    let memory = u64::from(input.memory_mib % 4097) * MIB;
    FILES.with_borrow_mut(|[kernel_file, initrd_file]| {
        rewrite(kernel_file, &kernel);
        rewrite(initrd_file, &vec![0x44; usize::from(input.initrd.unwrap_or(0))]);
        let initrd = input.initrd.map(|_| initrd_file.path());
        let plan = match BootFiles::open(kernel_file.path(), initrd, &line, protocol)
            .and_then(|files| files.plan(memory))
        {
            Ok(plan) => plan,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let place = plan.kernel_memory();
        let end = memory.min(layout::GAP_START);
        assert!(place.start >= layout::HIGH_MEMORY && place.start < place.end && place.end <= end);
        if let Some(initrd) = plan.initrd_memory() {
            assert!(place.end <= initrd.start && initrd.end <= end);
        }
        if place.end - place.start <= LOADED {
            let entry = plan.load(&memory_of(&plan)).unwrap();
            assert!(place.contains(&entry.instruction()));
        }
    });
});
