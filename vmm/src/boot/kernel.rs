//! A kernel file after its headers have been read, in the form that both formats share:
//! segments to copy, and an address to enter.

use std::ops::Range;

use cofferdam_firmware::layout;
use linux_loader::bootparam::boot_params;

use super::entry::IDENTITY_MAP_END;
use super::error::KernelError;
use super::file::ImageFile;
use super::{Protocol, bzimage, elf};

/// Bytes of the file that are wanted at a guest-physical address, and the memory that
/// the kernel uses from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where the bytes lie in the file.
    pub(super) file_offset: u64,
    /// How many bytes are copied; the rest of the memory stays untouched, hence zero.
    pub(super) file_size: u64,
    /// Guest-physical address of the first byte.
    pub(super) address: u64,
    /// Bytes of memory, at least `file_size`. `address + memory_size` does not overflow.
    pub(super) memory_size: u64,
}

impl Segment {
    /// The memory of the segment.
    pub(super) fn memory(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.memory_size)
    }
}

/// How the kernel is entered.
#[derive(Debug)]
pub(super) enum EntryPoint {
    /// By PVH.
    Pvh {
        /// Guest-physical address of the first instruction.
        address: u64,
    },
    /// By the Linux 64-bit protocol.
    Linux64 {
        /// Guest-physical address of the first instruction.
        address: u64,
        /// `boot_params` with the kernel's own setup header, all else zero.
        zero_page: Box<boot_params>,
    },
}

/// What the headers of a kernel file say.
#[derive(Debug)]
pub(super) struct KernelImage {
    /// At least one, by rising address, without overlap, all from 1 MiB on.
    pub(super) segments: Vec<Segment>,
    /// How it is entered.
    pub(super) entry: EntryPoint,
    /// First address that the initrd may not occupy.
    pub(super) initrd_limit: u64,
    /// Longest command line in bytes, without the NUL.
    pub(super) command_line_max: u64,
}

impl KernelImage {
    /// Reads the headers of `file`.
    pub(super) fn parse(file: &ImageFile, protocol: Protocol) -> Result<Self, KernelError> {
        let mut magic = [0; 4];
        if file.length() < magic.len() as u64 {
            return Err(KernelError::NotAKernel);
        }
        file.read_at(&mut magic, 0)?;
        let image =
            if magic == elf::MAGIC { elf::parse(file, protocol)? } else { bzimage::parse(file, protocol)? };
        let limit = match image.entry {
            EntryPoint::Pvh { .. } => layout::GAP_START,
            EntryPoint::Linux64 { .. } => IDENTITY_MAP_END,
        };
        match image.memory().end {
            end if end > limit => Err(KernelError::TooHigh { end, limit }),
            _ => Ok(image),
        }
    }

    /// The memory from the first to the last byte of the kernel.
    pub(super) fn memory(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |segment| segment.address);
        let end = self.segments.last().map_or(0, |segment| segment.memory().end);
        start..end
    }
}
