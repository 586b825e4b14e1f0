//! Kernel files made byte by byte, good but for what a test changes in them. Started nevertheless, they end in a triple
//! fault.

/// A segment of an ELF file: what is loaded where.
pub struct Segment {
    /// Guest-physical address (`p_paddr`).
    pub address: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub memory_size: u64,
}

impl Segment {
    /// A page at `address`.
    pub fn page(address: u64) -> Self {
        Self { address, file_size: 4096, memory_size: 4096 }
    }
}

const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// `ud2`, an invalid instruction.
const CODE: [u8; 2] = [0x0f, 0x0b];

/// An ELF file that is entered at the first byte of the first segment.
pub fn elf(segments: &[Segment]) -> Vec<u8> {
    let entry = segments.first().map_or(0, |segment| segment.address);
    let count = segments.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    put(&mut file, 2, [2, 62]); // ET_EXEC, EM_X86_64
    put(&mut file, 4, [1]);
    put(&mut file, 8, [entry, ELF_HEADER, 0]);
    put(&mut file, 4, [0]);
    put(&mut file, 2, [ELF_HEADER, PROGRAM_HEADER, count, 0, 0, 0]);
    let mut offset = ELF_HEADER + PROGRAM_HEADER * count;
    for &Segment { address, file_size, memory_size } in segments {
        put(&mut file, 4, [1, 5]); // PT_LOAD, readable and executable
        put(&mut file, 8, [offset, address, address, file_size, memory_size, 4096]);
        offset += file_size;
    }
    let length = usize::try_from(offset).expect("a small file");
    let code = CODE.into_iter().cycle().take(length - file.len());
    file.extend(code);
    file
}

/// Where the last of the bytes that are loaded ends in an ELF file.
pub fn loaded_end(elf: &[u8]) -> usize {
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("eight bytes"));
    let headers = (ELF_HEADER as usize..).step_by(PROGRAM_HEADER as usize).take(usize::from(elf[56]));
    let ends = headers.filter(|&at| elf[at] == 1).map(|at| word(at + 8) + word(at + 32));
    ends.max().expect("a segment") as usize
}

/// First byte after the setup code of [`bz_image`].
pub const BZ_IMAGE_CODE: usize = 0x600;

/// A bzImage of boot protocol 2.15 that runs at 16 MiB, in 4 MiB.
pub fn bz_image() -> Vec<u8> {
    let mut file = vec![0; BZ_IMAGE_CODE];
    file.extend(CODE.repeat(4096 / CODE.len()));
    let fields: [(usize, usize, u64); 15] = [
        (0x1f1, 1, 2),           // setup_sects
        (0x1f4, 4, 4096 / 16),   // syssize
        (0x1fe, 2, 0xaa55),      // boot_flag
        (0x200, 2, 0x6aeb),      // jump, whose operand says where the header ends: at 0x26c
        (0x202, 4, 0x5372_6448), // header: "HdrS"
        (0x206, 2, 0x20f),       // version
        (0x211, 1, 1),           // loadflags: LOADED_HIGH
        (0x22c, 4, 0x7fff_ffff), // initrd_addr_max
        (0x230, 4, 0x20_0000),   // kernel_alignment
        (0x234, 1, 1),           // relocatable_kernel
        (0x236, 2, 0x7f),        // xloadflags: XLF_KERNEL_64 among others
        (0x238, 4, 2047),        // cmdline_size
        (0x24c, 4, 4096),        // payload_length
        (0x258, 8, 0x100_0000),  // pref_address
        (0x260, 4, 0x40_0000),   // init_size
    ];
    for (offset, size, value) in fields {
        file[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    file
}

/// `file` with other bytes at `offset`.
pub fn patched(mut file: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
    file
}

/// Appends `values`, each in `size` bytes, little-endian.
fn put<const N: usize>(file: &mut Vec<u8>, size: usize, values: [u64; N]) {
    for value in values {
        file.extend_from_slice(&value.to_le_bytes()[..size]);
    }
}
