//! The launch manifest: the measured page of an image that says which kernel,
//! initrd and command line the first stage may start, and in what domains.
//!
//! One page at [`layout::LAUNCH_MANIFEST`]; all numbers are little-endian, all
//! that is not named is zero.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x000 | 8 | magic, "COFFERDM" |
//! | 0x008 | 4 | version, 1 |
//! | 0x00C | 4 | flags: bit 0, the domain wants host data; bit 1, all memory is accepted before the kernel runs |
//! | 0x010 | 64 | kernel |
//! | 0x050 | 64 | initrd |
//! | 0x090 | 64 | command line |
//! | 0x0D0 | 4 | most vCPUs |
//! | 0x0D4 | 4 | zero |
//! | 0x0D8 | 8 | least memory, bytes |
//! | 0x0E0 | 8 | most memory, bytes |
//!
//! Each of the three items:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x00 | 8 | guest-physical address in the load window, a multiple of 4 KiB |
//! | 0x08 | 8 | size, bytes |
//! | 0x10 | 32 | SHA-256 |
//! | 0x30 | 4 | format of a kernel: 1 bzImage, 2 ELF; else 0 |
//! | 0x34 | 4 | zero |
//! | 0x38 | 8 | guest-physical address to which the first stage copies a kernel; else 0 |
//!
//! An initrd or command line that there is not is all zero.

use core::fmt;
use core::ops::RangeInclusive;

use crate::fields::{Fields, Place, is_zero};
use crate::layout::{self, COMMAND_LINE_MAX, GAP_START, HIGH_MEMORY, MIB, PAGE_SIZE};

/// Size of the manifest, bytes.
pub const SIZE: usize = PAGE_SIZE as usize;
/// Its first bytes. An image with these at [`layout::LAUNCH_MANIFEST`] is one of ours.
pub const MAGIC: [u8; 8] = *b"COFFERDM";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;

const FLAG_HOST_DATA: u32 = 1 << 0;
const FLAG_ACCEPT_ALL: u32 = 1 << 1;

const FORMAT_BZ_IMAGE: u32 = 1;
const FORMAT_ELF: u32 = 2;

/// What the first stage may start, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The kernel.
    pub kernel: Kernel,
    /// The initrd; one of no bytes is none.
    pub initrd: Item,
    /// The kernel command line, without a NUL at its end; at most [`COMMAND_LINE_MAX`] bytes.
    pub command_line: Item,
    /// Most vCPUs, 1 to [`layout::MAX_VCPUS`].
    pub max_vcpus: u8,
    /// Least memory, bytes: a multiple of 1 MiB from [`layout::MIN_MEMORY`] on.
    pub min_memory: u64,
    /// Most memory, bytes: a multiple of 1 MiB up to [`layout::MAX_MEMORY`].
    pub max_memory: u64,
    /// Whether the domain is given the host's data: an unprotected one by the first stage, from the parameter page, to the end
    /// of the kernel's command line; a protected one has them in its report. Without, they must be zero.
    pub host_data: bool,
    /// Whether the first stage of a protected domain accepts all memory, for a kernel that does not accept what is left
    /// (Linux without `CONFIG_UNACCEPTED_MEMORY`).
    pub accept_all: bool,
}

/// The kernel of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file.
    pub file: Item,
    /// Its format.
    pub format: KernelFormat,
    /// Where the first stage copies the file, guest-physical, from 1 MiB on.
    pub address: u64,
}

/// Format of a kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// bzImage (`vmlinuz`).
    BzImage,
    /// ELF (`vmlinux`).
    Elf,
}

/// Bytes in the load window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Item {
    /// Guest-physical address in the load window, a multiple of 4 KiB.
    pub address: u64,
    /// Number of bytes.
    pub size: u64,
    /// Their SHA-256.
    pub sha256: [u8; 32],
}

impl Item {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }
}

/// One of the three items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The kernel.
    Kernel,
    /// The initrd.
    Initrd,
    /// The command line.
    CommandLine,
}

/// Why a page is no launch manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestError {
    /// It does not begin with [`MAGIC`].
    Magic,
    /// Another version.
    Version {
        /// The version given.
        given: u32,
    },
    /// Flags that this version does not have.
    Flags {
        /// The flags given.
        given: u32,
    },
    /// An item is not at a multiple of 4 KiB inside the load window, or has an address or a hash but no bytes.
    Window {
        /// The item.
        part: Part,
        /// Its address in the load window.
        address: u64,
        /// Its size, bytes.
        size: u64,
    },
    /// The command line is too long.
    CommandLine {
        /// Its size, bytes.
        size: u64,
    },
    /// An unknown format, or one for an item that has none.
    Format {
        /// The item.
        part: Part,
        /// The format given.
        given: u32,
    },
    /// The kernel is not to be copied to between 1 MiB and 3 GiB, or another item has such an address.
    CopyAddress {
        /// The item.
        part: Part,
        /// The address given.
        address: u64,
    },
    /// The number of vCPUs is out of range.
    Vcpus {
        /// The number given.
        given: u32,
    },
    /// The bounds of the memory are out of range, not multiples of 1 MiB, or in the wrong order.
    Memory {
        /// Least memory, bytes.
        min: u64,
        /// Most memory, bytes.
        max: u64,
    },
    /// Something is set that must be zero.
    Reserved,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::CommandLine => "command line",
        })
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("launch manifest: ")?;
        match self {
            Self::Magic => f.write_str("does not begin with \"COFFERDM\""),
            Self::Version { given } => write!(f, "version {given}, not {VERSION}"),
            Self::Flags { given } => write!(f, "unknown flags {given:#x}"),
            Self::Window { part, address, size } => {
                write!(f, "{part} at {address:#x}, {size} bytes, is no range of the load window")
            }
            Self::CommandLine { size } => {
                write!(f, "the command line has {size} bytes, at most {COMMAND_LINE_MAX} are allowed")
            }
            Self::Format { part, given } => write!(f, "{part} of format {given}"),
            Self::CopyAddress { part, address } => write!(f, "{part} to be copied to {address:#x}"),
            Self::Vcpus { given } => {
                write!(f, "up to {given} vCPUs, not 1 to {}", layout::MAX_VCPUS)
            }
            Self::Memory { min, max } => {
                write!(f, "memory from {min} to {max} bytes is no range of whole MiB that a domain can have")
            }
            Self::Reserved => f.write_str("something is set that must be zero"),
        }
    }
}

impl core::error::Error for ManifestError {}

/// The fields of an item as they are written.
#[derive(Clone, Copy, Default)]
struct RawItem {
    item: Item,
    format: u32,
    reserved: u32,
    copy_address: u64,
}

impl RawItem {
    fn read(fields: &mut Fields<'_>) -> Self {
        let item = Item { address: fields.u64(), size: fields.u64(), sha256: fields.bytes() };
        Self { item, format: fields.u32(), reserved: fields.u32(), copy_address: fields.u64() }
    }

    fn write(&self, place: &mut Place<'_>) {
        place.put(&self.item.address.to_le_bytes());
        place.put(&self.item.size.to_le_bytes());
        place.put(&self.item.sha256);
        place.put(&self.format.to_le_bytes());
        place.put(&self.reserved.to_le_bytes());
        place.put(&self.copy_address.to_le_bytes());
    }

    /// An item that is just bytes, or none.
    fn plain(&self, part: Part) -> Result<Item, ManifestError> {
        if self.format != 0 {
            return Err(ManifestError::Format { part, given: self.format });
        }
        if self.copy_address != 0 {
            return Err(ManifestError::CopyAddress { part, address: self.copy_address });
        }
        if self.item.is_empty() && self.item.address == 0 && is_zero(&self.item.sha256) {
            return Ok(self.item);
        }
        self.in_window(part)
    }

    fn in_window(&self, part: Part) -> Result<Item, ManifestError> {
        let Item { address, size, .. } = self.item;
        if self.reserved != 0 {
            return Err(ManifestError::Reserved);
        }
        let end = layout::LOAD_WINDOW + layout::LOAD_WINDOW_SIZE;
        let inside = (layout::LOAD_WINDOW..end).contains(&address) && size <= end - address;
        if !inside || size == 0 || !address.is_multiple_of(PAGE_SIZE) {
            return Err(ManifestError::Window { part, address, size });
        }
        Ok(self.item)
    }
}

impl Manifest {
    /// The bounds of the memory, bytes.
    pub fn memory(&self) -> RangeInclusive<u64> {
        self.min_memory..=self.max_memory
    }

    /// Reads a page.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn decode(page: &[u8; SIZE]) -> Result<Self, ManifestError> {
        let mut fields = Fields(page);
        if fields.bytes() != MAGIC {
            return Err(ManifestError::Magic);
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(ManifestError::Version { given: version });
        }
        let flags = fields.u32();
        if flags & !(FLAG_HOST_DATA | FLAG_ACCEPT_ALL) != 0 {
            return Err(ManifestError::Flags { given: flags });
        }
        let kernel = read_kernel(&RawItem::read(&mut fields))?;
        let initrd = RawItem::read(&mut fields).plain(Part::Initrd)?;
        let command_line = RawItem::read(&mut fields).plain(Part::CommandLine)?;
        if command_line.size > COMMAND_LINE_MAX as u64 {
            return Err(ManifestError::CommandLine { size: command_line.size });
        }
        let vcpus = fields.u32();
        if vcpus == 0 || vcpus > u32::from(layout::MAX_VCPUS) {
            return Err(ManifestError::Vcpus { given: vcpus });
        }
        let reserved = fields.u32();
        let (min, max) = (fields.u64(), fields.u64());
        let ordered = layout::MIN_MEMORY <= min && min <= max && max <= layout::MAX_MEMORY;
        if !ordered || !min.is_multiple_of(MIB) || !max.is_multiple_of(MIB) {
            return Err(ManifestError::Memory { min, max });
        }
        if reserved != 0 || !fields.rest_is_zero() {
            return Err(ManifestError::Reserved);
        }
        Ok(Self {
            kernel,
            initrd,
            command_line,
            max_vcpus: vcpus as u8,
            min_memory: min,
            max_memory: max,
            host_data: flags & FLAG_HOST_DATA != 0,
            accept_all: flags & FLAG_ACCEPT_ALL != 0,
        })
    }

    /// The page. Whatever [`Self::decode`] refuses is written all the same.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut page = [0; SIZE];
        let mut place = Place(&mut page);
        place.put(&MAGIC);
        place.put(&VERSION.to_le_bytes());
        let host_data = if self.host_data { FLAG_HOST_DATA } else { 0 };
        let accept_all = if self.accept_all { FLAG_ACCEPT_ALL } else { 0 };
        place.put(&(host_data | accept_all).to_le_bytes());
        let format = match self.kernel.format {
            KernelFormat::BzImage => FORMAT_BZ_IMAGE,
            KernelFormat::Elf => FORMAT_ELF,
        };
        let kernel =
            RawItem { item: self.kernel.file, format, reserved: 0, copy_address: self.kernel.address };
        kernel.write(&mut place);
        RawItem { item: self.initrd, ..RawItem::default() }.write(&mut place);
        RawItem { item: self.command_line, ..RawItem::default() }.write(&mut place);
        place.put(&u32::from(self.max_vcpus).to_le_bytes());
        place.put(&[0; 4]);
        place.put(&self.min_memory.to_le_bytes());
        place.put(&self.max_memory.to_le_bytes());
        page
    }
}

fn read_kernel(raw: &RawItem) -> Result<Kernel, ManifestError> {
    let part = Part::Kernel;
    let file = raw.in_window(part)?;
    let format = match raw.format {
        FORMAT_BZ_IMAGE => KernelFormat::BzImage,
        FORMAT_ELF => KernelFormat::Elf,
        given => return Err(ManifestError::Format { part, given }),
    };
    let address = raw.copy_address;
    if !(HIGH_MEMORY..GAP_START).contains(&address) || file.size > GAP_START - address {
        return Err(ManifestError::CopyAddress { part, address });
    }
    Ok(Kernel { file, format, address })
}

#[cfg(test)]
pub(crate) mod tests;
