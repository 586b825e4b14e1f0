//! Kernel files: small valid ones, and what becomes of them.

use arbitrary::Arbitrary;

/// A kernel file, valid or not.
#[derive(Arbitrary, Debug)]
pub struct File<'a> {
    base: Base<'a>,
    patches: Vec<Patch>,
    /// Its length, if it is cut off.
    keep: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Base<'a> {
    Raw(&'a [u8]),
    Elf,
    BzImage,
}

#[derive(Arbitrary, Debug)]
enum Patch {
    Byte(u16, u8),
    Half(u16, u16),
    Word(u16, u32),
    Long(u16, u64),
    /// A power of two, and one more or less.
    Edge(u16, u8, i8),
    /// A field of the bzImage's setup header.
    Setup(u8, u32),
    /// A field of an ELF program header: which header, which field.
    Program(u8, u8, u64),
}

impl Patch {
    fn apply(&self, file: &mut [u8]) {
        let (offset, bytes, size) = match *self {
            Self::Byte(offset, value) => (offset, u64::from(value), 1),
            Self::Half(offset, value) => (offset, u64::from(value), 2),
            Self::Word(offset, value) => (offset, u64::from(value), 4),
            Self::Long(offset, value) => (offset, value, 8),
            Self::Edge(offset, bit, more) => {
                (offset, (1_u64 << (bit % 64)).wrapping_add_signed(i64::from(more % 3)), 8)
            }
            Self::Setup(offset, value) => (0x1f1 + u16::from(offset % 0x7b), u64::from(value), 4),
            Self::Program(header, field, value) => {
                (64 + 56 * u16::from(header % 3) + 8 * u16::from(field % 7), value, 8)
            }
        };
        patch(file, offset.into(), &bytes.to_le_bytes()[..size]);
    }
}

impl File<'_> {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = match self.base {
            Base::Raw(bytes) => bytes.to_vec(),
            Base::Elf => vmlinux(),
            Base::BzImage => bz_image(),
        };
        for patch in &self.patches {
            patch.apply(&mut file);
        }
        file.truncate(self.keep.map_or(usize::MAX, usize::from));
        file
    }
}

/// Writes `new` at `offset`, as far as there is room.
pub fn patch(bytes: &mut [u8], offset: usize, new: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(offset).zip(new) {
        *place = *byte;
    }
}

/// Program headers of [`vmlinux`]: kind, address, bytes in the file, bytes in memory.
const SEGMENTS: [(u32, u64, u64, u64); 2] =
    [(1, 0x100_0000, 0x400, 0x1800), (1, 0x120_0000, 0x234, 0x20_0000)];

/// An ELF file of two segments at 16 MiB and 18 MiB, 20 MiB its end, with Xen's note.
pub fn vmlinux() -> Vec<u8> {
    let mut note: Vec<u8> = [4_u32, 8, 18].iter().flat_map(|word| word.to_le_bytes()).collect();
    note.extend(b"Xen\0");
    note.extend(0x100_0200_u64.to_le_bytes());

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([0x100_0100_u64, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend([0, 0, 64, 56, 3, 0, 0, 0].iter().flat_map(|half: &u16| half.to_le_bytes()));
    let mut offset = 64 + 56 * 3;
    let notes = (4, 0, note.len() as u64, 0);
    for (kind, address, size, memory) in SEGMENTS.into_iter().chain([notes]) {
        file.extend([kind, 5].iter().flat_map(|word: &u32| word.to_le_bytes()));
        file.extend(
            [offset, address, address, size, memory, 4].iter().flat_map(|word: &u64| word.to_le_bytes()),
        );
        offset += size;
    }
    for (_, _, size, _) in SEGMENTS {
        file.resize(file.len() + size as usize, 0x11);
    }
    file.extend(note);
    file
}

/// A bzImage: two setup sectors and 1 KiB of code, to be loaded at 16 MiB, protocol 2.15.
pub fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 0x600];
    file.resize(0xA00, 0x33);
    let fields: [(usize, &[u8]); 15] = [
        (0x1f1, &[2]),                           // setup_sects
        (0x1f4, &0x40_u32.to_le_bytes()),        // syssize
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),      // boot_flag, jump
        (0x202, b"HdrS"),                        // header
        (0x206, &[0x0f, 0x02]),                  // version
        (0x211, &[1]),                           // loadflags
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()), // initrd_addr_max
        (0x230, &0x20_0000_u32.to_le_bytes()),   // kernel_alignment
        (0x234, &[1, 21, 0x7f, 0]),              // relocatable_kernel, min_alignment, xloadflags
        (0x238, &2047_u32.to_le_bytes()),        // cmdline_size
        (0x248, &0x100_u32.to_le_bytes()),       // payload_offset
        (0x24c, &0x200_u32.to_le_bytes()),       // payload_length
        (0x258, &0x100_0000_u64.to_le_bytes()),  // pref_address
        (0x260, &0x40_0000_u32.to_le_bytes()),   // init_size
        (0x264, &[0; 4]),                        // handover_offset
    ];
    for (offset, bytes) in fields {
        file[offset..][..bytes.len()].copy_from_slice(bytes);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_vmm::boot::{BootFiles, Protocol};
    use std::io::Write;

    #[test]
    fn they_are_good_kernels() {
        for (kernel, protocol) in [(vmlinux(), Protocol::Pvh), (bz_image(), Protocol::Linux64)] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&kernel).unwrap();
            BootFiles::open(file.path(), None::<&std::path::Path>, "", protocol)
                .unwrap()
                .plan(32 << 20)
                .unwrap();
        }
    }
}
