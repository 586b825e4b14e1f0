//! Where kernel and initrd go in a domain of a given size, and putting them there.

use std::ops::Range;

use cofferdam_firmware::layout::{self, PAGE_SIZE};
use cofferdam_firmware::reset_stub;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::entry::{Entry, page_tables};
use super::error::BootError;
use super::file::ImageFile;
use super::kernel::EntryPoint;
use super::{BootFiles, pvh, zero_page};

/// Files that fit into the memory, each with its place.
#[derive(Debug)]
pub struct BootPlan {
    pub(super) files: BootFiles,
    memory: u64,
    initrd: Option<Range<u64>>,
}

impl BootPlan {
    pub(super) fn new(files: BootFiles, memory: u64) -> Result<Self, BootError> {
        let kernel_end = files.image.memory().end.next_multiple_of(PAGE_SIZE);
        let [(_, low), _] = layout::ram_ranges(memory);
        let initrd = match &files.initrd {
            Some(file) => {
                let limit = files.image.initrd_limit.min(layout::GAP_START);
                Some(place_initrd(file, memory, kernel_end, limit)?)
            }
            None if kernel_end > low => {
                return Err(BootError::MemoryTooSmall { memory, kernel_end, initrd: 0, needed: kernel_end });
            }
            None => None,
        };
        Ok(Self { files, memory, initrd })
    }

    /// The files, for somebody else to load.
    pub(crate) fn into_files(self) -> BootFiles {
        self.files
    }

    /// The guest-physical memory that belongs to the kernel.
    pub fn kernel_memory(&self) -> Range<u64> {
        self.files.image.memory()
    }

    /// The guest-physical memory that holds the initrd.
    pub fn initrd_memory(&self) -> Option<Range<u64>> {
        self.initrd.clone()
    }

    /// Copies the files into `memory`, which must be fresh (all zero), and writes the
    /// structures that the kernel expects. The ACPI tables are left to the caller.
    ///
    /// # Errors
    /// A file cannot be read or has become shorter since it was opened, or `memory` does
    /// not have the ranges of [`layout::ram_ranges`].
    pub fn load(&self, memory: &GuestMemoryMmap) -> Result<Entry, BootError> {
        self.copy_files(memory)?;
        let mut line = self.files.command_line.as_bytes().to_vec();
        line.push(0);
        write(memory, "command line", layout::COMMAND_LINE, &line)?;
        write(memory, "reset stub", layout::RESET_STUB, &reset_stub::CODE)?;
        let entry = match &self.files.image.entry {
            EntryPoint::Pvh { address } => {
                let info = pvh::start_info(self.memory, self.initrd_memory());
                write(memory, "PVH start info", layout::PVH_START_INFO, &info)?;
                Entry::pvh(*address)
            }
            EntryPoint::Linux64 { address, zero_page } => {
                let params = zero_page::complete(zero_page, self.memory, self.initrd_memory());
                write(memory, "boot parameters", layout::BOOT_PARAMS, params.as_slice())?;
                write(memory, "page tables", layout::BOOT_PAGE_TABLES, &bytes(&page_tables()))?;
                Entry::linux64(*address)
            }
        };
        write(memory, "GDT", layout::BOOT_GDT, &bytes(&entry.gdt()))?;
        Ok(entry)
    }

    fn copy_files(&self, memory: &GuestMemoryMmap) -> Result<(), BootError> {
        let kernel = &self.files.kernel;
        for segment in self.files.image.segments.iter().filter(|segment| segment.file_size > 0) {
            kernel.copy_to(memory, segment.address, segment.file_offset, segment.file_size).map_err(
                |error| BootError::Kernel { path: kernel.path().to_owned(), reason: error.into() },
            )?;
        }
        if let (Some(initrd), Some(place)) = (&self.files.initrd, &self.initrd) {
            initrd
                .copy_to(memory, place.start, 0, initrd.length())
                .map_err(|reason| BootError::Initrd { path: initrd.path().to_owned(), reason })?;
        }
        Ok(())
    }
}

/// The place of the initrd: the highest whole page from which it ends below `limit` and
/// inside the RAM, and that is not the kernel's.
fn place_initrd(file: &ImageFile, memory: u64, kernel_end: u64, limit: u64) -> Result<Range<u64>, BootError> {
    let size = file.length();
    let below = |end: u64| {
        let address = end.checked_sub(size)? & !(PAGE_SIZE - 1);
        (address >= kernel_end).then(|| address..address.saturating_add(size))
    };
    if below(limit).is_none() {
        return Err(BootError::InitrdTooLarge { path: file.path().to_owned(), size, kernel_end, limit });
    }
    let [(_, low), _] = layout::ram_ranges(memory);
    below(limit.min(low)).ok_or_else(|| {
        let needed = kernel_end.saturating_add(size.next_multiple_of(PAGE_SIZE));
        BootError::MemoryTooSmall { memory, kernel_end, initrd: size, needed }
    })
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn write(memory: &GuestMemoryMmap, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|reason| BootError::GuestMemory {
        what,
        address,
        reason,
    })
}
