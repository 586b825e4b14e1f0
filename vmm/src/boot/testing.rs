//! Small valid kernels for tests, made byte by byte.

use std::io::Write;

use tempfile::NamedTempFile;

/// A file with these bytes.
pub(crate) fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A program header to be written, and the bytes that it points to.
#[derive(Clone)]
pub(crate) struct Piece {
    pub(crate) kind: u32,
    pub(crate) address: u64,
    pub(crate) memory_size: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Piece {
    pub(crate) fn load(address: u64, bytes: &[u8], memory_size: u64) -> Self {
        Self { kind: 1, address, memory_size, bytes: bytes.to_vec() }
    }

    /// A note segment with Xen's PVH entry.
    pub(crate) fn pvh(entry: u64) -> Self {
        let mut bytes = Vec::new();
        for word in [4_u32, 8, 18] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(entry.to_le_bytes());
        Self { kind: 4, address: 0, memory_size: 0, bytes }
    }
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
        let words = [offset, piece.address, piece.address, size, piece.memory_size, 4];
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        offset += size;
    }
    for piece in pieces {
        file.extend(&piece.bytes);
    }
    file
}

/// A vmlinux of two segments at 16 MiB and 18 MiB, 20 MiB its end, with a PVH note.
pub(crate) fn vmlinux() -> Vec<u8> {
    elf(
        0x100_0100,
        &[
            Piece::load(0x100_0000, &[0x11; 0x1000], 0x1800),
            Piece::load(0x120_0000, &[0x22; 0x234], 0x20_0000),
            Piece::pvh(0x100_0200),
        ],
    )
}

/// Replaces bytes of a file.
pub(crate) fn patch(mut file: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    file[offset..][..bytes.len()].copy_from_slice(bytes);
    file
}

/// Bytes of the protected-mode code of [`bz_image`].
pub(crate) const CODE_SIZE: usize = 0x1000;

/// A bzImage: two setup sectors and [`CODE_SIZE`] bytes of 0x33, to be loaded at 16 MiB,
/// `init_size` 4 MiB, protocol 2.15.
pub(crate) fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 0x600];
    file.resize(0x600 + CODE_SIZE, 0x33);
    let fields: [(usize, &[u8]); 17] = [
        (0x1f1, &[2]),                                   // setup_sects
        (0x1f4, &(CODE_SIZE as u32 / 16).to_le_bytes()), // syssize
        (0x1fe, &[0x55, 0xaa]),                          // boot_flag
        (0x200, &[0xeb, 0x6a]),                          // jump
        (0x202, b"HdrS"),                                // header
        (0x206, &[0x0f, 0x02]),                          // version
        (0x211, &[1]),                                   // loadflags
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),         // initrd_addr_max
        (0x230, &0x20_0000_u32.to_le_bytes()),           // kernel_alignment
        (0x234, &[1]),                                   // relocatable_kernel
        (0x235, &[21]),                                  // min_alignment
        (0x236, &[0x7f, 0]),                             // xloadflags
        (0x238, &2047_u32.to_le_bytes()),                // cmdline_size
        (0x248, &0x300_u32.to_le_bytes()),               // payload_offset
        (0x24c, &0xc00_u32.to_le_bytes()),               // payload_length
        (0x258, &0x100_0000_u64.to_le_bytes()),          // pref_address
        (0x260, &0x40_0000_u32.to_le_bytes()),           // init_size
    ];
    fields.into_iter().fold(file, |file, (offset, bytes)| patch(file, offset, bytes))
}
