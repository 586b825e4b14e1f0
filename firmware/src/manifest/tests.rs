use proptest::prelude::*;

use super::*;
use crate::layout::GIB;

pub(crate) fn manifest() -> Manifest {
    Manifest {
        kernel: Kernel {
            file: Item { address: 0xC000_0000, size: 14 << 20, sha256: [0x11; 32] },
            format: KernelFormat::BzImage,
            address: 0xFF_C000,
        },
        initrd: Item { address: 0xC0E0_0000, size: 5001, sha256: [0x22; 32] },
        command_line: Item { address: 0xC0E0_2000, size: 43, sha256: [0x33; 32] },
        max_vcpus: 8,
        min_memory: 128 * MIB,
        max_memory: 2 * GIB,
        host_data: true,
        accept_all: false,
    }
}

fn patched(offset: usize, bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let mut page = manifest().encode();
    page[offset..][..bytes.len()].copy_from_slice(bytes);
    Manifest::decode(&page)
}

/// The offsets are those of the table at the head of the module.
#[test]
fn every_field_has_its_offset() {
    let page = manifest().encode();
    let u32_at = |offset: usize| u32::from_le_bytes(page[offset..][..4].try_into().unwrap());
    let u64_at = |offset: usize| u64::from_le_bytes(page[offset..][..8].try_into().unwrap());
    assert_eq!(page.len(), 4096);
    assert_eq!(&page[..8], b"COFFERDM");
    assert_eq!((u32_at(8), u32_at(0xC)), (1, 1));
    assert_eq!((u64_at(0x10), u64_at(0x18), page[0x20], page[0x3F]), (0xC000_0000, 14 << 20, 0x11, 0x11));
    assert_eq!((u32_at(0x40), u32_at(0x44), u64_at(0x48)), (1, 0, 0xFF_C000));
    assert_eq!((u64_at(0x50), u64_at(0x58), page[0x60]), (0xC0E0_0000, 5001, 0x22));
    assert_eq!((u64_at(0x80), u64_at(0x88)), (0, 0));
    assert_eq!((u64_at(0x90), u64_at(0x98), page[0xA0]), (0xC0E0_2000, 43, 0x33));
    assert_eq!((u32_at(0xD0), u32_at(0xD4)), (8, 0));
    assert_eq!((u64_at(0xD8), u64_at(0xE0)), (128 << 20, 2 << 30));
    assert!(page[0xE8..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_manifest_without_initrd_and_command_line_is_read() {
    let bare =
        Manifest { initrd: Item::default(), command_line: Item::default(), host_data: false, ..manifest() };
    assert_eq!(Manifest::decode(&bare.encode()), Ok(bare));
    assert!(bare.initrd.is_empty() && !bare.kernel.file.is_empty());
}

#[test]
fn each_flag_has_its_bit() {
    let flags = |host_data, accept_all| {
        let manifest = Manifest { host_data, accept_all, ..manifest() };
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        manifest.encode()[0xC]
    };
    assert_eq!(
        [flags(false, false), flags(true, false), flags(false, true), flags(true, true)],
        [0, 1, 2, 3]
    );
}

#[test]
fn each_field_is_checked() {
    use ManifestError as E;
    let window_end = layout::LOAD_WINDOW + layout::LOAD_WINDOW_SIZE;
    let word = |value: u64| value.to_le_bytes();
    let kernel = |address, size| E::Window { part: Part::Kernel, address, size };
    let initrd = |address, size| E::Window { part: Part::Initrd, address, size };
    let memory = |min, max| E::Memory { min, max };
    let cases: &[(usize, &[u8], E)] = &[
        (0, b"c", E::Magic),
        (8, &[2], E::Version { given: 2 }),
        (0xC, &[5], E::Flags { given: 5 }),
        (0x10, &word(0xBFFF_F000), kernel(0xBFFF_F000, 14 << 20)),
        (0x10, &word(0xC000_0800), kernel(0xC000_0800, 14 << 20)),
        (0x10, &word(window_end - 0x1000), kernel(window_end - 0x1000, 14 << 20)),
        (0x10, &word(u64::MAX - 0xFFF), kernel(u64::MAX - 0xFFF, 14 << 20)),
        (0x18, &word(u64::MAX), kernel(0xC000_0000, u64::MAX)),
        (0x18, &word(layout::LOAD_WINDOW_SIZE + 1), kernel(0xC000_0000, layout::LOAD_WINDOW_SIZE + 1)),
        (0x18, &word(0), kernel(0xC000_0000, 0)),
        (0x40, &[0], E::Format { part: Part::Kernel, given: 0 }),
        (0x40, &[3], E::Format { part: Part::Kernel, given: 3 }),
        (0x44, &[1], E::Reserved),
        (0x48, &word(0xF_F000), E::CopyAddress { part: Part::Kernel, address: 0xF_F000 }),
        (0x48, &word(0xBFFF_F000), E::CopyAddress { part: Part::Kernel, address: 0xBFFF_F000 }),
        (0x48, &word(u64::MAX), E::CopyAddress { part: Part::Kernel, address: u64::MAX }),
        (0x58, &word(0), initrd(0xC0E0_0000, 0)),
        (0x50, &word(0), initrd(0, 5001)),
        (0x80, &[1], E::Format { part: Part::Initrd, given: 1 }),
        (0x84, &[1], E::Reserved),
        (0x88, &[1], E::CopyAddress { part: Part::Initrd, address: 1 }),
        (0x98, &word(2049), E::CommandLine { size: 2049 }),
        (0xC0, &[2], E::Format { part: Part::CommandLine, given: 2 }),
        (0xD0, &[0], E::Vcpus { given: 0 }),
        (0xD0, &[33], E::Vcpus { given: 33 }),
        (0xD1, &[1], E::Vcpus { given: 264 }),
        (0xD4, &[1], E::Reserved),
        (0xD8, &word(31 * MIB), memory(31 * MIB, 2 * GIB)),
        (0xD8, &word(128 * MIB + 1), memory(128 * MIB + 1, 2 * GIB)),
        (0xE0, &word(64 * GIB + MIB), memory(128 * MIB, 64 * GIB + MIB)),
        (0xE0, &word(2 * GIB - 1), memory(128 * MIB, 2 * GIB - 1)),
        (0xE0, &word(127 * MIB), memory(128 * MIB, 127 * MIB)),
        (0xE8, &[1], E::Reserved),
        (0xFFF, &[1], E::Reserved),
    ];
    for (offset, bytes, error) in cases {
        assert_eq!(patched(*offset, bytes), Err(*error), "{offset:#x} {bytes:?}");
        assert!(error.to_string().starts_with("launch manifest: "), "{error}");
    }
}

proptest! {
    /// What is read is what was written, and every byte counts: none is ignored.
    #[test]
    fn no_byte_is_ignored(offset in 0..SIZE, change in 1..=u8::MAX) {
        let mut page = manifest().encode();
        page[offset] ^= change;
        if let Ok(read) = Manifest::decode(&page) {
            prop_assert_ne!(read, manifest());
            prop_assert_eq!(read.encode(), page);
        }
    }

    /// Whatever the page holds behind its magic: refused, or within all bounds and the same when it is written again.
    #[test]
    fn any_page_is_refused_or_kept(bytes in proptest::collection::vec(any::<u8>(), 0x10..0xE8)) {
        let mut page = manifest().encode();
        page[0x10..][..bytes.len() - 0x10].copy_from_slice(&bytes[0x10..]);
        if let Ok(read) = Manifest::decode(&page) {
            prop_assert_eq!(read.encode(), page);
            let end = layout::LOAD_WINDOW + layout::LOAD_WINDOW_SIZE;
            prop_assert!(read.kernel.file.address + read.kernel.file.size <= end);
            prop_assert!(read.memory().contains(&read.min_memory) && read.max_memory <= layout::MAX_MEMORY);
        }
    }
}
