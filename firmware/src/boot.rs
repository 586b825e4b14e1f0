//! Kernel files as the first stage loads them: bzImage and ELF, both entered by the
//! 64-bit boot protocol of Linux.
//!
//! The first stage copies the whole file to one place in private memory, checks its
//! hash, and only then reads its headers. The place is chosen when the image is
//! built ([`Kernel::copy_address`]): it is such that no segment has to move up.
//!
//! ```text
//! bzImage                                      ELF
//! copy address   setup code, setup header      copy address   ELF header, program headers
//! load address   protected-mode code           p_paddr        each segment, moved down to it
//!   + 0x200      entry                                        (or in place already)
//! ```
//!
//! So the code of a bzImage is in place when the file is copied. The segments of an
//! ELF file are moved by rising address, each down or not at all. As they do not
//! overlap, none can reach the bytes of one that is yet to be moved, wherever in the
//! file those are: a segment ends where the next one begins or before, and the bytes
//! of that one are not lower.
//!
//! [`Kernel::read`] looks at a bounded number of bytes, and every number in them is
//! checked before use.

mod bzimage;
mod elf;
use core::fmt;
use core::ops::Range;

use crate::layout::{self, GAP_START, HIGH_MEMORY, MIB, PAGE_SIZE};
use crate::manifest::KernelFormat;

/// Bytes of a file that hold all headers that [`Kernel::read`] looks at in any kernel that is made today.
pub const HEAD: usize = 4096;
/// Most segments of a kernel.
const MAX_SEGMENTS: usize = 8;

/// What the headers of a kernel file say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    format: KernelFormat,
    /// Length of the file, bytes.
    length: u64,
    /// By rising address, without overlap, all between 1 MiB and 3 GiB; those behind the last one are empty.
    segments: [Segment; MAX_SEGMENTS],
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// First address that the initrd may not occupy.
    pub initrd_limit: u64,
    /// Longest command line, bytes, without its NUL.
    pub command_line_max: u64,
}

/// Bytes of the file that are wanted at a guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where they lie in the file.
    pub offset: u64,
    /// How many there are.
    pub file_size: u64,
    /// Guest-physical address of the first one.
    pub address: u64,
    /// Bytes of memory, at least `file_size`.
    pub memory_size: u64,
}

/// What is wrong with a kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelError {
    /// Neither ELF nor bzImage.
    NotAKernel,
    /// Headers or code that they speak of end behind the end of the file (or headers behind the bytes that were given).
    Truncated {
        /// What is missing.
        what: &'static str,
    },
    /// A bzImage that is older than the 64-bit entry, of boot protocol 2.12.
    Version {
        /// The version of its boot protocol.
        given: u16,
    },
    /// A bzImage without a 64-bit entry, or one that is not loaded high.
    No64BitEntry,
    /// A bzImage whose alignment is no power of two.
    Alignment {
        /// The alignment given.
        given: u32,
    },
    /// An ELF file that is no 64-bit x86-64 executable.
    Machine,
    /// An ELF file with too many program headers or segments, or with none.
    SegmentCount {
        /// The number of program headers.
        given: u16,
    },
    /// A segment with more bytes in the file than in memory, or one that lies lower than the one before.
    Segment {
        /// Its address.
        address: u64,
    },
    /// A segment or the code is not between 1 MiB and 3 GiB.
    Place {
        /// Its address.
        address: u64,
        /// Its size in memory, bytes.
        size: u64,
    },
    /// The entry point is in no segment.
    Entry {
        /// Its address.
        address: u64,
    },
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAKernel => f.write_str("neither ELF nor bzImage"),
            Self::Truncated { what } => write!(f, "truncated: its {what} ends behind the end of the file"),
            Self::Version { given } => write!(
                f,
                "speaks boot protocol {}.{:02}, 2.12 (Linux 3.8) is the oldest possible",
                given >> 8,
                given & 0xff
            ),
            Self::No64BitEntry => f.write_str("a bzImage without a 64-bit entry"),
            Self::Alignment { given } => write!(f, "kernel_alignment {given:#x} is not a power of two"),
            Self::Machine => f.write_str("not a 64-bit x86-64 executable"),
            Self::SegmentCount { given } => write!(
                f,
                "has {given} program headers; 1 to {} with 1 to {MAX_SEGMENTS} segments are possible",
                elf::MAX_PROGRAM_HEADERS
            ),
            Self::Segment { address } => {
                write!(f, "the segment at {address:#x} is larger in the file, or not in order")
            }
            Self::Place { address, size } => {
                write!(f, "memory at {address:#x}, {size} bytes, is not between 0x100000 and 0xc0000000")
            }
            Self::Entry { address } => write!(f, "the entry point {address:#x} is in no segment"),
        }
    }
}

impl core::error::Error for KernelError {}

impl Kernel {
    /// Reads the headers of a kernel file of `length` bytes, of which `head` is the beginning: [`HEAD`] bytes or more,
    /// or all there are.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub fn read(head: &[u8], length: u64) -> Result<Self, KernelError> {
        if head.starts_with(&elf::MAGIC) { elf::read(head, length) } else { bzimage::read(head, length) }
    }

    /// The format of the file.
    pub fn format(&self) -> KernelFormat {
        self.format
    }

    /// The segments, in the order in which they are to be moved.
    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.memory_size != 0)
    }

    /// Whether memory behind the bytes of a segment must be cleared. The code of a bzImage clears its own.
    pub fn clears_memory(&self) -> bool {
        self.format == KernelFormat::Elf
    }

    /// The lowest guest-physical address to which the whole file can be copied so that no segment has to move up. It is
    /// at least 1 MiB.
    pub fn copy_address(&self) -> u64 {
        self.segments()
            .map(|segment| segment.address.saturating_sub(segment.offset))
            .fold(HIGH_MEMORY, u64::max)
    }

    /// Whether no segment has to move up when the file is at `copy_address`.
    pub fn can_be_copied_to(&self, copy_address: u64) -> bool {
        self.copy_address() <= copy_address
    }

    /// All memory that holds the kernel or its file, which is at `copy_address`, at some time before the kernel runs
    /// and as it begins.
    pub fn memory(&self, copy_address: u64) -> Range<u64> {
        let file = copy_address..copy_address.saturating_add(self.length);
        self.segments().fold(file, |all, segment| {
            all.start.min(segment.address)..all.end.max(segment.address.saturating_add(segment.memory_size))
        })
    }

    /// Where an initrd of `size` bytes goes in a domain with `memory` bytes of RAM: the highest whole page from which it
    /// ends inside the RAM below 3 GiB and below the kernel's own limit, and that is not the kernel's.
    pub fn place_initrd(&self, copy_address: u64, size: u64, memory: u64) -> Option<Range<u64>> {
        let [(_, low), _] = layout::ram_ranges(memory);
        let start = low.min(self.initrd_limit).checked_sub(size)? & !(PAGE_SIZE - 1);
        (start >= self.memory(copy_address).end).then(|| start..start.wrapping_add(size))
    }

    /// The least memory with which a domain can start the kernel with an initrd of `size` bytes: a multiple of 1 MiB, and
    /// not less than any domain has. None if no amount is enough, because the kernel takes no initrd so high.
    pub fn memory_needed(&self, size: u64) -> Option<u64> {
        let end = self.memory(self.copy_address()).end.checked_next_multiple_of(PAGE_SIZE)?;
        let needed = end.checked_add(size.checked_next_multiple_of(PAGE_SIZE)?)?;
        let memory = needed.checked_next_multiple_of(MIB)?.max(layout::MIN_MEMORY);
        let fits = memory <= GAP_START && self.place_initrd(self.copy_address(), size, memory).is_some();
        fits.then_some(memory)
    }
}

/// The segment, if its memory is where a kernel can be.
fn placed(segment: Segment) -> Result<Segment, KernelError> {
    let Segment { address, memory_size: size, .. } = segment;
    if !(HIGH_MEMORY..GAP_START).contains(&address) || size > GAP_START - address {
        return Err(KernelError::Place { address, size });
    }
    Ok(segment)
}

/// The `N` bytes at `offset`.
fn field<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
pub(crate) mod tests;
