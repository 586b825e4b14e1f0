use proptest::prelude::*;

use super::*;
use crate::layout::GIB;

/// A program header to be written, and the bytes that it points to.
pub(crate) struct Piece {
    pub kind: u32,
    pub address: u64,
    pub memory_size: u64,
    pub bytes: Vec<u8>,
}

pub(crate) fn load(address: u64, bytes: &[u8], memory_size: u64) -> Piece {
    Piece { kind: 1, address, memory_size, bytes: bytes.to_vec() }
}

/// An ELF file: header, program headers, then the bytes of each piece.
pub(crate) fn elf(entry: u64, pieces: &[Piece]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([entry, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([64, 56, pieces.len() as u16, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let mut offset = 64 + 56 * pieces.len() as u64;
    for piece in pieces {
        let size = piece.bytes.len() as u64;
        file.extend([piece.kind, 5].iter().flat_map(|word| word.to_le_bytes()));
        let words =
            [offset, 0xFFFF_FFFF_8000_0000 | piece.address, piece.address, size, piece.memory_size, 4];
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        offset += size;
    }
    for piece in pieces {
        file.extend(&piece.bytes);
    }
    file
}

/// A vmlinux of two segments at 16 MiB and 18 MiB, 20 MiB its end.
pub(crate) fn vmlinux() -> Vec<u8> {
    let note = Piece { kind: 4, address: 0, memory_size: 0, bytes: vec![9; 20] };
    elf(
        0x100_0100,
        &[load(0x100_0000, &[0x11; 0x1000], 0x1800), note, load(0x120_0000, &[0x22; 0x234], 0x20_0000)],
    )
}

/// A bzImage: two setup sectors and 4 KiB of 0x33, for 16 MiB, `init_size` 4 MiB, protocol 2.15.
pub(crate) fn bz_image() -> Vec<u8> {
    let mut file = vec![0x77; 0x600];
    file.resize(0x1600, 0x33);
    let fields: [(usize, &[u8]); 18] = [
        (0x1f1, &[2]),                           // setup_sects
        (0x1f4, &0x100_u32.to_le_bytes()),       // syssize
        (0x1fe, &[0x55, 0xaa]),                  // boot_flag
        (0x200, &[0xeb, 0x6a]),                  // jump
        (0x202, b"HdrS"),                        // header
        (0x206, &[0x0f, 0x02]),                  // version
        (0x210, &[0]),                           // type_of_loader
        (0x211, &[1]),                           // loadflags
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()), // initrd_addr_max
        (0x230, &0x20_0000_u32.to_le_bytes()),   // kernel_alignment
        (0x234, &[1]),                           // relocatable_kernel
        (0x235, &[21]),                          // min_alignment
        (0x236, &[0x7f, 0]),                     // xloadflags
        (0x238, &2047_u32.to_le_bytes()),        // cmdline_size
        (0x248, &0x300_u32.to_le_bytes()),       // payload_offset
        (0x24c, &0xc00_u32.to_le_bytes()),       // payload_length
        (0x258, &0x100_0000_u64.to_le_bytes()),  // pref_address
        (0x260, &0x40_0000_u32.to_le_bytes()),   // init_size
    ];
    fields.into_iter().fold(file, |file, (offset, bytes)| patch(file, offset, bytes))
}

/// Replaces bytes of a file.
pub(crate) fn patch(mut file: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    file[offset..][..bytes.len()].copy_from_slice(bytes);
    file
}

fn read(file: &[u8]) -> Result<Kernel, KernelError> {
    Kernel::read(file, file.len() as u64)
}

#[test]
fn a_bz_image_is_copied_so_that_its_code_is_in_place() {
    let kernel = read(&bz_image()).unwrap();
    assert_eq!(kernel.format(), KernelFormat::BzImage);
    let segment = Segment { offset: 0x600, file_size: 0x1000, address: 0x100_0000, memory_size: 0x40_0000 };
    assert_eq!(kernel.segments().collect::<Vec<_>>(), [&segment]);
    assert_eq!((kernel.entry, kernel.initrd_limit, kernel.command_line_max), (0x100_0200, 0x8000_0000, 2047));
    assert_eq!(kernel.copy_address(), 0x100_0000 - 0x600);
    assert_eq!(kernel.memory(kernel.copy_address()), 0xFF_FA00..0x140_0000);
    assert!(!kernel.clears_memory());
}

#[test]
fn a_bz_image_that_wants_to_be_low_is_loaded_at_the_next_place() {
    let low = patch(bz_image(), 0x258, &0x1_0000_u64.to_le_bytes());
    let kernel = read(&low).unwrap();
    assert_eq!(kernel.segments().next().unwrap().address, 0x20_0000);
    // One that cannot be moved, and whose setup code would lie below 1 MiB: the file is copied higher, and moved down.
    let fixed = patch(patch(bz_image(), 0x258, &0x10_0000_u64.to_le_bytes()), 0x234, &[0]);
    let kernel = read(&fixed).unwrap();
    assert_eq!((kernel.segments().next().unwrap().address, kernel.copy_address()), (0x10_0000, 0x10_0000));
    assert!(kernel.can_be_copied_to(0x10_0000) && !kernel.can_be_copied_to(0xF_FFFF));
}

#[test]
fn an_elf_file_is_copied_so_that_no_segment_moves_up() {
    let kernel = read(&vmlinux()).unwrap();
    assert_eq!(kernel.format(), KernelFormat::Elf);
    let segments: Vec<_> = kernel.segments().map(|segment| (segment.address, segment.offset)).collect();
    let headers = 64 + 3 * 56;
    assert_eq!(segments, [(0x100_0000, headers), (0x120_0000, headers + 0x1014)]);
    assert_eq!(kernel.copy_address(), 0x120_0000 - headers - 0x1014);
    assert_eq!(kernel.memory(kernel.copy_address()), 0x100_0000..0x140_0000);
    assert_eq!((kernel.entry, kernel.command_line_max), (0x100_0100, 2048));
    assert!(kernel.clears_memory());
}

#[test]
fn what_is_wrong_with_a_bz_image_is_named() {
    use KernelError as E;
    let word = |value: u64| value.to_le_bytes();
    let place = |address, size| E::Place { address, size };
    let cases: &[(usize, &[u8], E)] = &[
        (0x1fe, &[0], E::NotAKernel),
        (0x202, b"hdrs", E::NotAKernel),
        (0x206, &[0x0b, 0x02], E::Version { given: 0x20b }),
        (0x201, &[0x10], E::Truncated { what: "setup header" }),
        (0x211, &[0], E::No64BitEntry),
        (0x236, &[0x7e], E::No64BitEntry),
        (0x1f1, &[255], E::Truncated { what: "code" }),
        (0x1f4, &0x101_u32.to_le_bytes(), E::Truncated { what: "code" }),
        (0x1f4, &[0xFF; 4], E::Truncated { what: "code" }),
        (0x248, &0xFFFF_FFFF_u32.to_le_bytes(), E::Truncated { what: "code" }),
        (0x230, &[3, 0, 0, 0], E::Alignment { given: 3 }),
        (0x230, &[0; 4], E::Alignment { given: 0 }),
        (0x258, &word(GAP_START), place(GAP_START, 0x40_0000)),
        (0x258, &word(u64::MAX), place(GAP_START, 0x40_0000)),
        (0x258, &word(GAP_START - 0x20_0000), place(GAP_START - 0x20_0000, 0x40_0000)),
        (0x260, &[0xFF; 4], place(0x100_0000, 0xFFFF_FFFF)),
    ];
    for (offset, bytes, error) in cases {
        assert_eq!(read(&patch(bz_image(), *offset, bytes)), Err(*error), "{offset:#x} {bytes:x?}");
        assert!(!error.to_string().is_empty());
    }
    let fixed_low = patch(patch(bz_image(), 0x258, &word(0xF_F000)), 0x234, &[0]);
    assert_eq!(read(&fixed_low), Err(place(0xF_F000, 0x40_0000)));
    // Behind the setup code there must be the 64-bit entry, whatever the header says of sizes.
    let no_code = patch(patch(bz_image()[..0x700].to_vec(), 0x1f4, &[0; 4]), 0x248, &[0; 8]);
    assert_eq!(read(&no_code), Err(E::Truncated { what: "code" }));
}

#[test]
fn what_is_wrong_with_an_elf_file_is_named() {
    use KernelError as E;
    const FIRST: usize = 64; // the first program header
    let word = |value: u64| value.to_le_bytes();
    let place = |address, size| E::Place { address, size };
    let cases: &[(usize, &[u8], E)] = &[
        (4, &[1], E::Machine),
        (5, &[2], E::Machine),
        (16, &[1], E::Machine),
        (18, &[3], E::Machine),
        (54, &[32], E::Machine),
        (56, &[17], E::SegmentCount { given: 17 }),
        (56, &[0], E::SegmentCount { given: 0 }),
        (24, &word(0x100_1000), E::Entry { address: 0x100_1000 }),
        (32, &word(u64::MAX), E::Truncated { what: "program header table" }),
        (32, &word(0x2000), E::Truncated { what: "program header table" }),
        (FIRST + 8, &word(u64::MAX), E::Truncated { what: "segment" }),
        (FIRST + 32, &word(u64::MAX), E::Truncated { what: "segment" }),
        (FIRST + 40, &word(0xFFF), E::Segment { address: 0x100_0000 }),
        (FIRST + 40, &word(0x20_0001), E::Segment { address: 0x120_0000 }),
        (FIRST + 40, &word(u64::MAX), place(0x100_0000, u64::MAX)),
        (FIRST + 24, &word(0xF_F000), place(0xF_F000, 0x1800)),
        (FIRST + 24, &word(GAP_START - 0x1000), place(GAP_START - 0x1000, 0x1800)),
        (FIRST + 24, &word(u64::MAX), place(u64::MAX, 0x1800)),
    ];
    for (offset, bytes, error) in cases {
        assert_eq!(read(&patch(vmlinux(), *offset, bytes)), Err(*error), "{offset:#x} {bytes:x?}");
        assert!(!error.to_string().is_empty());
    }
    let many: Vec<Piece> = (1..10).map(|mib| load(mib << 20, &[1], 1)).collect();
    assert_eq!(read(&elf(0x10_0000, &many)), Err(E::SegmentCount { given: 9 }));
    assert!(read(&elf(0x10_0000, &many[..8])).is_ok());
    assert_eq!(read(&elf(0, &[])), Err(E::SegmentCount { given: 0 }));
}

#[test]
fn files_that_end_early_are_refused() {
    for file in [bz_image(), vmlinux()] {
        for length in 0..file.len() {
            assert!(read(&file[..length]).is_err(), "{length}");
        }
        assert!(read(&file).is_ok());
        assert_eq!(Kernel::read(&file[..0x300], file.len() as u64), read(&file), "the head is enough");
    }
}

#[test]
fn the_initrd_goes_to_the_end_of_what_it_may_occupy() {
    let kernel = read(&bz_image()).unwrap();
    let at = kernel.copy_address();
    let place = |size, memory| kernel.place_initrd(at, size, memory);
    assert_eq!(place(0x1801, 64 * MIB), Some(0x3FF_E000..0x3FF_F801));
    assert_eq!(place(0x1000, 4 * GIB), Some(0x7FFF_F000..0x8000_0000), "below the kernel's limit");
    assert_eq!(place(0x1000, 8 * MIB), None);
    assert_eq!(place(u64::MAX, 64 * MIB), None);
    let elf = read(&vmlinux()).unwrap();
    assert_eq!(elf.place_initrd(elf.copy_address(), 1, 4 * GIB), Some(GAP_START - 0x1000..GAP_START - 0xFFF));
}

#[test]
fn the_least_memory_is_enough_and_no_more_than_that() {
    for file in [bz_image(), vmlinux()] {
        let kernel = read(&file).unwrap();
        for size in [0, 1, 20 * MIB, 100 * MIB + 5] {
            let needed = kernel.memory_needed(size).unwrap();
            let place = |memory| kernel.place_initrd(kernel.copy_address(), size, memory);
            assert!(place(needed).is_some(), "{size}");
            assert!(needed == layout::MIN_MEMORY || place(needed - MIB).is_none(), "{size}");
        }
        assert_eq!(kernel.memory_needed(3 * GIB), None);
        assert_eq!(kernel.memory_needed(u64::MAX), None);
    }
}

fn changed(file: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let change = (0..0x300_usize, proptest::collection::vec(any::<u8>(), 1..9));
    proptest::collection::vec(change, 0..4).prop_map(move |changes| {
        changes.into_iter().fold(file.clone(), |file, (offset, bytes)| patch(file, offset, &bytes))
    })
}

proptest! {
    /// Whatever the headers say: refused, or all within bounds, and no segment reaches what is yet to be moved.
    #[test]
    fn any_headers_are_refused_or_within_bounds(file in prop_oneof![changed(bz_image()), changed(vmlinux())]) {
        let Ok(kernel) = read(&file) else { return Ok(()) };
        let at = kernel.copy_address();
        prop_assert!(at >= HIGH_MEMORY && kernel.can_be_copied_to(at));
        let mut end = HIGH_MEMORY;
        for segment in kernel.segments() {
            prop_assert!(segment.offset + segment.file_size <= file.len() as u64);
            prop_assert!(segment.address >= end && segment.file_size <= segment.memory_size);
            prop_assert!(at + segment.offset >= segment.address);
            end = segment.address + segment.memory_size;
            prop_assert!(end <= GAP_START && end <= kernel.memory(at).end);
        }
        prop_assert!(kernel.memory(at).contains(&kernel.entry));
        if let Some(place) = kernel.place_initrd(at, 5000, GIB) {
            prop_assert!(place.start >= kernel.memory(at).end && place.end <= GIB);
        }
    }
}
