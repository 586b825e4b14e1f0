//! The whole way from files to guest memory, with good, bad and random input.

use std::ops::Range;
use std::path::Path;

use cofferdam_firmware::layout::{self, MIB};
use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::testing::*;
use super::*;

fn open(kernel: &[u8], initrd: Option<&NamedTempFile>, line: &str) -> Result<BootFiles, BootError> {
    let kernel = file(kernel);
    BootFiles::open(kernel.path(), initrd.map(|file| file.path()), line, Protocol::Auto)
}

/// The message for a bad kernel, without the part that every such message has.
fn kernel_error(kernel: &[u8], protocol: Protocol) -> String {
    let kernel = file(kernel);
    let error = BootFiles::open(kernel.path(), None::<&Path>, "", protocol).unwrap_err();
    let prefix = format!("boot-source.kernel_image_path: kernel {}: ", kernel.path().display());
    error.to_string().strip_prefix(&prefix).unwrap().to_owned()
}

fn guest_memory(size: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

fn read(memory: &GuestMemoryMmap, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    memory.read_slice(&mut bytes, GuestAddress(range.start)).unwrap();
    bytes
}

#[test]
fn vmlinux_by_pvh() {
    let initrd = file(&[0x44; 5000]);
    let plan = open(&vmlinux(), Some(&initrd), "a=b").unwrap().plan(64 * MIB).unwrap();
    assert_eq!(plan.kernel_memory(), 0x100_0000..0x140_0000);
    assert_eq!(plan.initrd_memory(), Some(0x3ff_e000..0x3ff_e000 + 5000));
    let memory = guest_memory(64 * MIB);
    let entry = plan.load(&memory).unwrap();
    assert_eq!((entry.protocol(), entry.instruction()), (Protocol::Pvh, 0x100_0200));
    assert_eq!(read(&memory, 0x100_0000..0x100_1000), [0x11; 0x1000]);
    assert_eq!(read(&memory, 0x120_0000..0x120_0234), [0x22; 0x234]);
    assert_eq!(read(&memory, 0x3ff_e000..0x3ff_e000 + 5000), [0x44; 5000]);
    assert_eq!(read(&memory, 0x2_0000..0x2_0004), b"a=b\0");
    assert_eq!(read(&memory, 0x6000..0x6004), 0x336e_c578_u32.to_le_bytes());
    assert_eq!(read(&memory, 0x510..0x518), 0x00cf_9b00_0000_ffff_u64.to_le_bytes());
    assert_eq!(read(&memory, 0xf_fff0..0xf_fff6), [0xba, 0x02, 0x06, 0xb0, 0x52, 0xee]);
}

#[test]
fn vmlinux_by_the_64_bit_protocol() {
    let kernel = file(&vmlinux());
    let files = BootFiles::open(kernel.path(), None::<&Path>, "", Protocol::Linux64).unwrap();
    let memory = guest_memory(32 * MIB);
    let entry = files.plan(32 * MIB).unwrap().load(&memory).unwrap();
    assert_eq!((entry.protocol(), entry.instruction()), (Protocol::Linux64, 0x100_0100));
    assert_eq!(read(&memory, 0x7202..0x7206), b"HdrS");
    assert_eq!(read(&memory, 0x9000..0x9008), 0xa003_u64.to_le_bytes());
    assert_eq!(read(&memory, 0x510..0x518), 0x00af_9b00_0000_ffff_u64.to_le_bytes());
}

#[test]
fn without_a_note_the_64_bit_protocol_is_chosen() {
    let kernel = elf(0x10_0000, &[Piece::load(0x10_0000, &[0xf4; 16], 16)]);
    let memory = guest_memory(MIB + 4096);
    let entry = open(&kernel, None, "").unwrap().plan(MIB + 4096).unwrap().load(&memory).unwrap();
    assert_eq!((entry.protocol(), entry.instruction()), (Protocol::Linux64, 0x10_0000));
}

#[test]
fn bz_image_keeps_its_header() {
    let initrd = file(&[0x44; 5000]);
    let plan = open(&bz_image(), Some(&initrd), "quiet").unwrap().plan(64 * MIB).unwrap();
    assert_eq!(plan.kernel_memory(), 0x100_0000..0x140_0000);
    let memory = guest_memory(64 * MIB);
    let entry = plan.load(&memory).unwrap();
    assert_eq!((entry.protocol(), entry.instruction()), (Protocol::Linux64, 0x100_0200));
    assert_eq!(read(&memory, 0x100_0000..0x100_1000), [0x33; CODE_SIZE]);
    assert_eq!(read(&memory, 0x100_1000..0x100_2000), [0; 0x1000]);
    let params = read(&memory, 0x7000..0x8000);
    let image = bz_image();
    assert!(params[..0x70].iter().all(|&byte| byte == 0));
    assert_eq!(params[0x1f1..0x210], image[0x1f1..0x210]);
    assert_eq!(params[0x22c..0x26c], image[0x22c..0x26c]);
    assert_eq!(params[0x210], 0xff);
    assert_eq!(params[0x218..0x220], [0x00, 0xe0, 0xff, 0x03, 0x88, 0x13, 0, 0]);
    assert_eq!(params[0x26c..0x290], [0; 36], "what follows the header in the file is not copied");
}

#[test]
fn bz_image_goes_where_it_wants_to_run() {
    let load = |image: Vec<u8>| open(&image, None, "").map(|files| files.image.memory().start);
    let pref = |address: u64| patch(bz_image(), 0x258, &address.to_le_bytes());
    assert_eq!(load(pref(0x180_0000)).unwrap(), 0x180_0000);
    assert_eq!(load(pref(0x180_0001)).unwrap(), 0x1a0_0000, "aligned");
    assert_eq!(load(pref(0)).unwrap(), 0x20_0000, "above 1 MiB, aligned");
    assert_eq!(load(patch(pref(0x180_0001), 0x234, &[0])).unwrap(), 0x180_0001, "not relocatable");
}

#[test]
fn initrd_ends_at_the_kernels_limit_and_below_3_gib() {
    let initrd = file(&[0x44; 5000]);
    let place = |kernel: &[u8], memory: u64| {
        open(kernel, Some(&initrd), "").unwrap().plan(memory).unwrap().initrd_memory().unwrap().start
    };
    assert_eq!(place(&bz_image(), 4096 * MIB), 0x7fff_e000);
    assert_eq!(place(&vmlinux(), 8192 * MIB), 0xbfff_e000);
    assert_eq!(place(&vmlinux(), 22 * MIB), 0x15f_e000);
}

#[test]
fn missing_empty_and_foreign_kernels() {
    let error = BootFiles::open(Path::new("/nonexistent/k"), None::<&Path>, "", Protocol::Auto).unwrap_err();
    assert_eq!(
        error.to_string(),
        "boot-source.kernel_image_path: kernel /nonexistent/k: cannot be opened: No such file or directory \
         (os error 2)"
    );
    let auto = |kernel: &[u8]| kernel_error(kernel, Protocol::Auto);
    assert_eq!(auto(b""), "is empty");
    for foreign in [&b"#!"[..], b"#!/bin/sh\n", &[0; 8192], &bz_image()[..0x200], &[0x1f, 0x8b, 8, 0]] {
        assert_eq!(auto(foreign), "not a kernel: neither ELF nor bzImage");
    }
}

#[test]
fn missing_and_empty_initrd() {
    let kernel = file(&vmlinux());
    let with = |initrd: &Path| {
        BootFiles::open(kernel.path(), Some(initrd), "", Protocol::Auto).unwrap_err().to_string()
    };
    assert_eq!(
        with(Path::new("/nonexistent/i")),
        "boot-source.initrd_path: initrd /nonexistent/i: cannot be opened: No such file or directory \
         (os error 2)"
    );
    let empty = file(b"");
    let path = empty.path().display();
    assert_eq!(with(empty.path()), format!("boot-source.initrd_path: initrd {path}: is empty"));
    assert_eq!(with(Path::new("/")), "boot-source.initrd_path: initrd /: not a regular file");
}

#[test]
fn command_line_limits() {
    let with = |kernel: &[u8], length: usize| open(kernel, None, &"x".repeat(length)).map(|_| ());
    with(&vmlinux(), 2048).unwrap();
    assert_eq!(
        with(&vmlinux(), 2049).unwrap_err().to_string(),
        "boot-source.boot_args: the command line has 2049 bytes, at most 2048 are allowed"
    );
    with(&bz_image(), 2047).unwrap();
    let message = with(&bz_image(), 2048).unwrap_err().to_string();
    assert!(message.starts_with("boot-source.boot_args: the command line has 2048 bytes, kernel /"));
    assert!(message.ends_with(" takes at most 2047"));
    assert_eq!(
        open(&vmlinux(), None, "a\0b").unwrap_err().to_string(),
        "boot-source.boot_args: the command line has a NUL at byte 1"
    );
}

#[test]
fn memory_too_small() {
    let initrd = file(&vec![1; 3 << 20]);
    let plan = |kernel: &[u8], initrd, memory| open(kernel, initrd, "").unwrap().plan(memory).map(|_| ());
    assert_eq!(
        plan(&vmlinux(), None, 19 * MIB).unwrap_err().to_string(),
        "machine-config.mem_size_mib: 19 MiB is too small: the kernel needs the first 20 MiB"
    );
    plan(&vmlinux(), None, 20 * MIB).unwrap();
    for kernel in [vmlinux(), bz_image()] {
        assert_eq!(
            plan(&kernel, Some(&initrd), 22 * MIB).unwrap_err().to_string(),
            "machine-config.mem_size_mib: 22 MiB is too small: the kernel needs the first 20 MiB and the \
             initrd 3 MiB, at least 23 MiB in all"
        );
        plan(&kernel, Some(&initrd), 23 * MIB).unwrap();
    }
}

#[test]
fn an_initrd_that_no_memory_can_hold_together_with_the_kernel() {
    let initrd = file(&vec![1; 3 << 20]);
    let kernel = patch(bz_image(), 0x22c, &0x150_0000_u32.to_le_bytes());
    let error = open(&kernel, Some(&initrd), "").unwrap().plan(1024 * MIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "boot-source.initrd_path: initrd {}: 3145728 bytes are too many: the kernel ends at 0x1400000 and \
             takes no initrd that reaches 0x1500001",
            initrd.path().display()
        )
    );
}

#[test]
fn truncated_files() {
    let auto = |kernel: &[u8]| kernel_error(kernel, Protocol::Auto);
    let vmlinux = vmlinux();
    assert_eq!(auto(&vmlinux[..63]), "truncated ELF: its header ends at byte 64, the file at byte 63");
    assert_eq!(
        auto(&vmlinux[..231]),
        "truncated ELF: its program header table ends at byte 232, the file at byte 231"
    );
    assert_eq!(
        auto(&vmlinux[..0x1100]),
        "truncated ELF: its segment 1 ends at byte 4892, the file at byte 4352"
    );
    assert_eq!(
        auto(&vmlinux[..vmlinux.len() - 1]),
        "truncated ELF: its segment 2 ends at byte 4916, the file at byte 4915"
    );
    let image = bz_image();
    assert_eq!(
        auto(&image[..0x210]),
        "truncated bzImage: its setup header ends at byte 620, the file at byte 528"
    );
    assert_eq!(
        auto(&image[..0x700]),
        "truncated bzImage: its 64-bit entry ends at byte 2049, the file at byte 1792"
    );
    assert_eq!(
        auto(&image[..image.len() - 1]),
        "truncated bzImage: its code ends at byte 5632, the file at byte 5631"
    );
    assert_eq!(
        auto(&patch(image, 0x24c, &0x1000_u32.to_le_bytes())),
        "truncated bzImage: its compressed kernel ends at byte 6400, the file at byte 5632"
    );
}

#[test]
fn elf_files_that_are_no_kernels() {
    let auto = |kernel: &[u8]| kernel_error(kernel, Protocol::Auto);
    let changed = |offset, bytes: &[u8]| auto(&patch(vmlinux(), offset, bytes));
    assert_eq!(changed(4, &[1]), "not a 64-bit little-endian ELF (class 1, data 1)");
    assert_eq!(changed(5, &[2]), "not a 64-bit little-endian ELF (class 2, data 2)");
    assert_eq!(changed(18, &[183]), "an ELF for machine 183, not for x86-64 (62)");
    assert_eq!(changed(16, &[1]), "an ELF of type 1, not an executable (2 or 3)");
    assert_eq!(changed(54, &[32]), "its program headers have 32 bytes each, not 56");
    assert_eq!(changed(56, &[0]), "has 0 program headers, 1 to 64 are possible");
    assert_eq!(changed(56, &[65]), "has 65 program headers, 1 to 64 are possible");
    assert_eq!(auto(&elf(0, &[Piece::pvh(0)])), "has no segment to load");
    assert_eq!(changed(104, &[0; 2]), "the entry point 0x1000200 is in no segment");
    assert_eq!(
        changed(64 + 112 + 32, &[1, 0, 2]),
        "truncated ELF: its segment 2 ends at byte 135965, the file at byte 4916"
    );

    let one = |address, size| auto(&elf(address, &[Piece::load(address, &[1; 4], size)]));
    assert_eq!(one(0x10_0000, 3), "segment 0 has 4 bytes in the file but 3 in memory");
    assert_eq!(one(0xf_ffff, 4), "segment 0 at 0xfffff, 4 bytes, is not between 0x100000 and 0xc0000000");
    assert_eq!(
        one(u64::MAX, 4),
        "segment 0 at 0xffffffffffffffff, 4 bytes, is not between 0x100000 and 0xc0000000"
    );
    assert_eq!(one(0x3fff_fffc, 5), "needs memory up to 0x40000001, its entry can reach 0x40000000");

    let bytes = [1; 4];
    let overlap = [Piece::load(0x20_0000, &bytes, 4), Piece::load(0x10_0000, &bytes, 0x10_0001)];
    assert_eq!(auto(&elf(0x10_0000, &overlap)), "the segments at 0x100000 and 0x200000 overlap");
    let notes = Piece { bytes: vec![0; 0x1_0001], ..Piece::pvh(0) };
    let large = [Piece::load(0x10_0000, &bytes, 4), notes];
    assert_eq!(auto(&elf(0x10_0000, &large)), "note segment 1 has 65537 bytes, at most 65536 are possible");
    let odd = [Piece::load(0x10_0000, &bytes, 4), Piece::pvh(1 << 32)];
    assert_eq!(auto(&elf(0x10_0000, &odd)), "note segment 1 is malformed at byte 0");
}

#[test]
fn bz_images_that_cannot_be_started() {
    let changed = |offset, bytes: &[u8]| kernel_error(&patch(bz_image(), offset, bytes), Protocol::Auto);
    assert_eq!(changed(0x206, &[0x0b]), "speaks boot protocol 2.11, 2.12 (Linux 3.8) is the oldest possible");
    assert_eq!(changed(0x211, &[0]), "is not made to be loaded high (an old zImage)");
    assert_eq!(changed(0x236, &[0x7e]), "has no 64-bit entry");
    assert_eq!(
        changed(0x201, &[0x60]),
        "its setup header ends at 0x262, before the fields that its version promises"
    );
    assert_eq!(changed(0x230, &3_u32.to_le_bytes()), "kernel_alignment 0x3 is not a power of two");
    for address in [0xc000_0000, u64::MAX] {
        assert_eq!(
            changed(0x258, &u64::to_le_bytes(address)),
            format!("must be loaded at {address:#x}, which is not between 0x100000 and 0xc0000000")
        );
    }
    assert_eq!(
        changed(0x260, &u32::MAX.to_le_bytes()),
        "needs memory up to 0x100ffffff, its entry can reach 0x40000000"
    );
    let not_relocatable = patch(patch(bz_image(), 0x234, &[0]), 0x258, &[0; 8]);
    assert_eq!(
        kernel_error(&not_relocatable, Protocol::Auto),
        "must be loaded at 0x0, which is not between 0x100000 and 0xc0000000"
    );
}

#[test]
fn pvh_is_refused_where_it_is_not_offered() {
    let message = "offers no PVH entry (no Xen note of type 18)";
    assert_eq!(kernel_error(&bz_image(), Protocol::Pvh), message);
    let plain = elf(0x10_0000, &[Piece::load(0x10_0000, &[0xf4; 16], 16)]);
    assert_eq!(kernel_error(&plain, Protocol::Pvh), message);
}

#[test]
fn a_kernel_that_shrinks_after_the_plan_is_noticed() {
    let kernel = file(&vmlinux());
    let plan =
        BootFiles::open(kernel.path(), None::<&Path>, "", Protocol::Auto).unwrap().plan(32 * MIB).unwrap();
    kernel.as_file().set_len(0x800).unwrap();
    let message = plan.load(&guest_memory(32 * MIB)).unwrap_err().to_string();
    assert!(message.ends_with("became shorter while it was read: it had 4916 bytes when it was opened"));
}

/// Guest memory that exists only where the plan may write, to the byte.
fn memory_of(plan: &BootPlan) -> GuestMemoryMmap {
    let mut ranges = vec![0..layout::LOW_MEMORY_END, layout::RESET_STUB..layout::RESET_STUB + 16];
    let segments = plan.files.image.segments.iter().filter(|segment| segment.file_size > 0);
    ranges.extend(segments.map(|segment| segment.address..segment.address + segment.file_size));
    ranges.extend(plan.initrd_memory());
    let ranges: Vec<_> = ranges
        .into_iter()
        .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

/// Whatever the file says: an error, or a plan inside the memory that loads.
fn boots_or_is_refused(kernel: &[u8], memory: u64) -> Result<(), TestCaseError> {
    let initrd = file(&[0x44; 5000]);
    let kernel = file(kernel);
    for protocol in [Protocol::Auto, Protocol::Linux64] {
        let files = BootFiles::open(kernel.path(), Some(initrd.path()), "quiet", protocol);
        let Ok(plan) = files.and_then(|files| files.plan(memory)) else { continue };
        let initrd = plan.initrd_memory().unwrap();
        prop_assert!(plan.kernel_memory().start >= layout::HIGH_MEMORY);
        prop_assert!(plan.kernel_memory().end <= initrd.start);
        prop_assert!(initrd.end <= memory.min(layout::GAP_START));
        let entry = plan.load(&memory_of(&plan)).unwrap();
        prop_assert!(plan.kernel_memory().contains(&entry.instruction()));
    }
    Ok(())
}

/// Numbers that make trouble more often than others.
fn trouble() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..0x2000_u64,
        (0..64_u32, 0..3_u64).prop_map(|(bit, more)| (1_u64 << bit).wrapping_add(more).wrapping_sub(1)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn mutated_elf(
        fields in prop::collection::vec((0..232_usize / 4, trouble()), 0..4),
        notes in prop::collection::vec((4888..4916_usize, any::<u8>()), 0..2),
        memory in 1..4096_u64,
    ) {
        let kernel = fields
            .into_iter()
            .fold(vmlinux(), |file, (word, value)| patch(file, word * 4, &value.to_le_bytes()));
        let kernel = notes.into_iter().fold(kernel, |file, (at, byte)| patch(file, at, &[byte]));
        boots_or_is_refused(&kernel, memory * MIB)?;
    }

    #[test]
    fn mutated_bz_image(
        fields in prop::collection::vec((0x1f1..0x26c_usize, trouble(), 1..=8_usize), 0..4),
        memory in 1..4096_u64,
    ) {
        let kernel = fields
            .into_iter()
            .fold(bz_image(), |file, (at, value, size)| patch(file, at, &value.to_le_bytes()[..size]));
        boots_or_is_refused(&kernel, memory * MIB)?;
    }

    #[test]
    fn truncated_anywhere(which in any::<bool>(), keep in 1..5632_usize) {
        let mut kernel = if which { vmlinux() } else { bz_image() };
        let complete = kernel.len() <= keep;
        kernel.truncate(keep);
        boots_or_is_refused(&kernel, 64 * MIB)?;
        prop_assert_eq!(open(&kernel, None, "").is_ok(), complete);
    }

    #[test]
    fn the_memory_that_is_called_enough_is(size in 1..8_u64 << 20, memory in 1..40_u64) {
        let initrd = file(&[]);
        initrd.as_file().set_len(size).unwrap();
        for kernel in [vmlinux(), bz_image()] {
            let open = || open(&kernel, Some(&initrd), "").unwrap();
            if let Err(BootError::MemoryTooSmall { needed, .. }) = open().plan(memory * MIB) {
                let enough = needed.div_ceil(MIB);
                prop_assert!(enough > memory);
                prop_assert!(open().plan(enough * MIB).is_ok());
                prop_assert!(open().plan((enough - 1) * MIB).is_err());
            }
        }
    }
}
