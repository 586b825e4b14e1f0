//! What can be wrong with the input of a boot. Every message starts with the field of
//! the configuration that has to change.

use std::io;
use std::path::PathBuf;

use cofferdam_firmware::layout::{COMMAND_LINE_MAX, MIB};
use vm_memory::GuestMemoryError;

/// A boot that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be used.
    #[error("boot-source.kernel_image_path: kernel {}: {reason}", path.display())]
    Kernel {
        /// The kernel file.
        path: PathBuf,
        /// What is wrong with it.
        reason: KernelError,
    },
    /// The initrd file cannot be used.
    #[error("boot-source.initrd_path: initrd {}: {reason}", path.display())]
    Initrd {
        /// The initrd file.
        path: PathBuf,
        /// What is wrong with it.
        reason: FileError,
    },
    /// There is no room for the initrd, whatever the size of the memory.
    #[error(
        "boot-source.initrd_path: initrd {}: {size} bytes are too many: the kernel ends at {kernel_end:#x} \
         and takes no initrd that reaches {limit:#x}", path.display()
    )]
    InitrdTooLarge {
        /// The initrd file.
        path: PathBuf,
        /// Size of the initrd, bytes.
        size: u64,
        /// First address after the kernel.
        kernel_end: u64,
        /// First address that the initrd may not occupy.
        limit: u64,
    },
    /// The command line is longer than any kernel takes.
    #[error(
        "boot-source.boot_args: the command line has {length} bytes, at most {COMMAND_LINE_MAX} are allowed"
    )]
    CommandLineTooLong {
        /// Length of the command line, bytes.
        length: usize,
    },
    /// The command line is longer than this kernel takes.
    #[error(
        "boot-source.boot_args: the command line has {length} bytes, kernel {} takes at most {limit}",
        path.display()
    )]
    CommandLineTooLongForKernel {
        /// The kernel file.
        path: PathBuf,
        /// Length of the command line, bytes.
        length: usize,
        /// The kernel's limit, bytes.
        limit: u64,
    },
    /// The command line contains the byte that ends it.
    #[error("boot-source.boot_args: the command line has a NUL at byte {offset}")]
    CommandLineNul {
        /// Where the NUL is.
        offset: usize,
    },
    /// Kernel and initrd do not fit into the memory.
    #[error(
        "machine-config.mem_size_mib: {} MiB is too small: the kernel needs the first {} MiB{}",
        memory / MIB, kernel_end.div_ceil(MIB), initrd_share(*initrd, *needed)
    )]
    MemoryTooSmall {
        /// Size of the guest memory, bytes.
        memory: u64,
        /// First address after the kernel.
        kernel_end: u64,
        /// Size of the initrd, bytes, 0 if there is none.
        initrd: u64,
        /// The smallest memory that would do, bytes.
        needed: u64,
    },
    /// Guest memory is not where the plan needs it.
    #[error("cannot write the {what} to {address:#x}: {reason}")]
    GuestMemory {
        /// What was to be written.
        what: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// What guest memory said.
        reason: GuestMemoryError,
    },
}

/// What the initrd adds to the memory that the kernel needs.
fn initrd_share(initrd: u64, needed: u64) -> String {
    match initrd {
        0 => String::new(),
        _ => format!(
            " and the initrd {} MiB, at least {} MiB in all",
            initrd.div_ceil(MIB),
            needed.div_ceil(MIB)
        ),
    }
}

/// What is wrong with a file as such.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    /// It is a directory, a pipe or a device.
    #[error("not a regular file")]
    NotRegular,
    /// It has no bytes.
    #[error("is empty")]
    Empty,
    /// A read failed.
    #[error("cannot be read at byte {offset}: {reason}")]
    Read {
        /// Where the read began.
        offset: u64,
        /// The host's reason.
        reason: io::Error,
    },
    /// It has become shorter since it was opened.
    #[error("became shorter while it was read: it had {length} bytes when it was opened")]
    Shrunk {
        /// The length that it had, bytes.
        length: u64,
    },
    /// The guest memory that is to hold it is not there.
    #[error("cannot be copied to {address:#x}: {reason}")]
    GuestMemory {
        /// Start of the range, guest-physical.
        address: u64,
        /// What guest memory said.
        reason: GuestMemoryError,
    },
}

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file as such.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file has neither of the two formats.
    #[error("not a kernel: neither ELF nor bzImage")]
    NotAKernel,
    /// An ELF file that is no kernel for this machine.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A bzImage that cannot be started.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// PVH was asked for and the kernel does not offer it.
    #[error("offers no PVH entry (no Xen note of type 18)")]
    NoPvhEntry,
    /// The kernel's own place is out of reach at its entry.
    #[error("needs memory up to {end:#x}, its entry can reach {limit:#x}")]
    TooHigh {
        /// First address after the kernel.
        end: u64,
        /// First address out of reach.
        limit: u64,
    },
}

/// What is wrong with an ELF kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Something the headers speak of lies behind the end of the file.
    #[error("truncated ELF: its {part} ends at byte {end}, the file at byte {length}")]
    Truncated {
        /// What is missing.
        part: Part,
        /// Where the part would end in the file.
        end: u64,
        /// Length of the file, bytes.
        length: u64,
    },
    /// Not a 64-bit little-endian ELF.
    #[error("not a 64-bit little-endian ELF (class {class}, data {data})")]
    Class {
        /// `EI_CLASS`.
        class: u8,
        /// `EI_DATA`.
        data: u8,
    },
    /// Made for another processor.
    #[error("an ELF for machine {0}, not for x86-64 (62)")]
    Machine(u16),
    /// An object file or a core dump.
    #[error("an ELF of type {0}, not an executable (2 or 3)")]
    Type(u16),
    /// Program headers of an unknown size.
    #[error("its program headers have {0} bytes each, not 56")]
    ProgramHeaderSize(u16),
    /// No program headers, or too many.
    #[error("has {0} program headers, 1 to 64 are possible")]
    ProgramHeaderCount(u16),
    /// Nothing to load.
    #[error("has no segment to load")]
    NoSegment,
    /// A segment with more bytes in the file than in memory.
    #[error("segment {index} has {file_size} bytes in the file but {memory_size} in memory")]
    SegmentSize {
        /// Index of the program header.
        index: usize,
        /// `p_filesz`.
        file_size: u64,
        /// `p_memsz`.
        memory_size: u64,
    },
    /// A segment where this monitor keeps its own structures, or behind the RAM below 4 GiB.
    #[error("segment {index} at {address:#x}, {size} bytes, is not between 0x100000 and 0xc0000000")]
    SegmentPlace {
        /// Index of the program header.
        index: usize,
        /// `p_paddr`.
        address: u64,
        /// `p_memsz`.
        size: u64,
    },
    /// Two segments want the same memory.
    #[error("the segments at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// `p_paddr` of one of them.
        first: u64,
        /// `p_paddr` of the other.
        second: u64,
    },
    /// The entry point is not in the file.
    #[error("the entry point {0:#x} is in no segment")]
    Entry(u64),
    /// A note segment of absurd size.
    #[error("note segment {index} has {size} bytes, at most 65536 are possible")]
    NotesTooLarge {
        /// Index of the program header.
        index: usize,
        /// `p_filesz`.
        size: u64,
    },
    /// A note that ends behind its segment, or a Xen entry note of an odd size.
    #[error("note segment {index} is malformed at byte {offset}")]
    Notes {
        /// Index of the program header.
        index: usize,
        /// Where in the segment.
        offset: usize,
    },
}

/// A part of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The ELF header.
    Header,
    /// The table of program headers.
    ProgramHeaders,
    /// The segment with this index.
    Segment(usize),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::ProgramHeaders => f.write_str("program header table"),
            Self::Segment(index) => write!(f, "segment {index}"),
        }
    }
}

/// What is wrong with a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// Older than the 64-bit entry.
    #[error("speaks boot protocol {}.{:02}, 2.12 (Linux 3.8) is the oldest possible", .0 >> 8, .0 & 0xff)]
    Version(u16),
    /// A zImage.
    #[error("is not made to be loaded high (an old zImage)")]
    NotLoadedHigh,
    /// A 32-bit kernel.
    #[error("has no 64-bit entry")]
    No64BitEntry,
    /// The header ends before the fields that its version promises.
    #[error("its setup header ends at {0:#x}, before the fields that its version promises")]
    HeaderTooShort(usize),
    /// The file ends before the kernel does.
    #[error("truncated bzImage: its {part} ends at byte {end}, the file at byte {length}")]
    Truncated {
        /// What is missing.
        part: &'static str,
        /// Where the part would end in the file.
        end: u64,
        /// Length of the file, bytes.
        length: u64,
    },
    /// An alignment that is none.
    #[error("kernel_alignment {0:#x} is not a power of two")]
    Alignment(u32),
    /// It must run where it cannot.
    #[error("must be loaded at {0:#x}, which is not between 0x100000 and 0xc0000000")]
    Place(u64),
}
