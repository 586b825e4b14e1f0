//! The headers of bzImage and ELF kernels, as the first stage and the image builder read them.
//!
//! Holds: headers are refused in words, or all that follows from them is inside the file and between 1 MiB and 3 GiB; no
//! segment has to move up when the file lies where it is to be copied to, nor reaches one that is yet to be moved; and
//! what is said of the initrd and of the least memory is so.
#![no_main]

use arbitrary::Arbitrary;
use cofferdam_firmware::boot::{HEAD, Kernel};
use cofferdam_firmware::layout::{GAP_START, MIB};
use cofferdam_fuzz::kernel;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    kernel: kernel::File<'a>,
    /// Bytes of the file behind those that are given.
    more: Option<u64>,
    initrd: u64,
    memory_mib: u16,
}

fn check(kernel: &Kernel, length: u64) {
    let at = kernel.copy_address();
    assert!(at >= MIB && kernel.can_be_copied_to(at) && !kernel.can_be_copied_to(at - 1));
    let mut last = MIB;
    for segment in kernel.segments() {
        let file_end = segment.offset.checked_add(segment.file_size).unwrap();
        let end = segment.address.checked_add(segment.memory_size).unwrap();
        assert!(file_end <= length && segment.file_size <= segment.memory_size);
        assert!(segment.address >= last && end <= GAP_START);
        assert!(at + segment.offset >= segment.address);
        assert!(kernel.memory(at).start <= segment.address && end <= kernel.memory(at).end);
        last = end;
    }
    let entered = |address| {
        kernel.segments().any(|part| (part.address..part.address + part.file_size).contains(&address))
    };
    assert!(entered(kernel.entry) && kernel.command_line_max <= 2048);
}

fuzz_target!(|input: Input| {
    let file = input.kernel.bytes();
    let head = if input.more.is_some() { &file[..file.len().min(HEAD)] } else { &file[..] };
    // No file is longer.
    let length = (file.len() as u64).saturating_add(input.more.unwrap_or(0)).min(i64::MAX as u64);
    let kernel = match Kernel::read(head, length) {
        Ok(kernel) => kernel,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    check(&kernel, length);
    let (at, memory) = (kernel.copy_address(), u64::from(input.memory_mib) * MIB);
    if let Some(place) = kernel.place_initrd(at, input.initrd, memory) {
        assert!(place.start % 4096 == 0 && place.end - place.start == input.initrd);
        assert!(kernel.memory(at).end <= place.start);
        assert!(place.end <= memory.min(GAP_START).min(kernel.initrd_limit));
    }
    if let Some(needed) = kernel.memory_needed(input.initrd) {
        assert!(needed % MIB == 0 && needed >= 32 * MIB && needed <= GAP_START);
        assert!(kernel.place_initrd(at, input.initrd, needed).is_some());
        let less = kernel.place_initrd(at, input.initrd, needed - MIB);
        assert!(needed == 32 * MIB || less.is_none());
    }
});
