//! From a kernel file to the first instruction of the first vCPU.
//!
//! Nothing may start when the input is bad, so the work is done in three steps,
//! and only the last one touches guest memory:
//!
//! 1. [`BootFiles::open`] opens the files, reads their headers and checks what
//!    can be checked without knowing the size of the memory.
//! 2. [`BootFiles::plan`] decides where everything goes in a domain of a given size.
//! 3. [`BootPlan::load`] copies the files straight into guest memory (no buffer in
//!    between), writes what the kernel expects to find beside itself, and returns
//!    the [`Entry`]: the register state in which the first vCPU starts.
//!
//! Two file formats and two ways to enter a kernel are known:
//!
//! | file | entered by | state of the vCPU | handed over |
//! |---|---|---|---|
//! | ELF with a Xen note (`vmlinux`) | PVH | 32-bit, paging off | `hvm_start_info` in EBX |
//! | ELF without (or when asked) | Linux 64-bit protocol at `e_entry` | 64-bit, identity map | `boot_params` in RSI |
//! | bzImage (`vmlinuz`) | Linux 64-bit protocol at load address + 0x200 | the same | the same |
//!
//! A note is the kernel's own word on how it wants to be entered, and it stays true
//! for kernels that are not Linux; so [`Protocol::Auto`] prefers it where there is
//! one. The 32-bit detour costs the kernel a few hundred instructions. `e_entry` of
//! an ELF file is taken as a physical address, which is what Linux stores there.
//!
//! Where things lie in guest memory is written down in [`cofferdam_firmware::layout`]:
//! everything this module places below 1 MiB has a fixed address there, kernels go to
//! their own address at or above 1 MiB, and the initrd ends where the RAM below 3 GiB
//! (or the kernel's own limit for it) ends. The ACPI tables are the caller's.
//!
//! The files are not trusted. Every number read from them is checked before use, the
//! headers read are bounded, and the work done is at most one copy of each file.

use std::path::Path;

use cofferdam_firmware::layout;

mod bzimage;
mod elf;
mod entry;
mod error;
pub(crate) mod file;
mod kernel;
mod plan;
mod pvh;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod zero_page;

pub use self::entry::Entry;
pub use self::error::{BootError, BzImageError, ElfError, FileError, KernelError};
pub use self::file::ImageSource;
pub use self::plan::BootPlan;

use self::file::ImageFile;
use self::kernel::KernelImage;

/// The way in which a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// PVH if the kernel has a note that offers it, else the 64-bit protocol.
    #[default]
    Auto,
    /// Xen's x86/HVM direct boot ABI: 32-bit, paging off.
    Pvh,
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux64,
}

/// A kernel, an initrd and a command line that passed all checks which need no memory size.
#[derive(Debug)]
pub struct BootFiles {
    kernel: ImageFile,
    image: KernelImage,
    initrd: Option<ImageFile>,
    command_line: String,
}

impl BootFiles {
    /// Opens the files and reads their headers.
    ///
    /// # Errors
    /// The first thing that is wrong with the kernel, the initrd or the command line,
    /// in this order.
    pub fn open<'a>(
        kernel: impl Into<ImageSource<'a>>,
        initrd: Option<impl Into<ImageSource<'a>>>,
        command_line: &str,
        protocol: Protocol,
    ) -> Result<Self, BootError> {
        let kernel = open_kernel(kernel.into())?;
        let kernel_error = |reason| BootError::Kernel { path: kernel.path().to_owned(), reason };
        let image = KernelImage::parse(&kernel, protocol).map_err(kernel_error)?;
        let initrd = initrd.map(|initrd| open_initrd(initrd.into())).transpose()?;
        check_command_line(command_line, kernel.path(), &image)?;
        Ok(Self { kernel, image, initrd, command_line: command_line.to_owned() })
    }

    /// Checks that the files are there and can be opened, and not what is in them.
    ///
    /// # Errors
    /// What is wrong with the kernel or the initrd.
    pub fn check(kernel: ImageSource<'_>, initrd: Option<ImageSource<'_>>) -> Result<(), BootError> {
        open_kernel(kernel)?;
        initrd.map(open_initrd).transpose().map(drop)
    }

    /// The kernel, the initrd and the command line.
    pub(crate) fn into_parts(self) -> (ImageFile, Option<ImageFile>, String) {
        (self.kernel, self.initrd, self.command_line)
    }

    /// Decides where everything goes in a domain with `memory` bytes of RAM.
    ///
    /// # Errors
    /// [`BootError::MemoryTooSmall`], or [`BootError::InitrdTooLarge`] if no amount of
    /// memory would help.
    pub fn plan(self, memory: u64) -> Result<BootPlan, BootError> {
        BootPlan::new(self, memory)
    }
}

fn open_kernel(source: ImageSource<'_>) -> Result<ImageFile, BootError> {
    let path = source.path().to_owned();
    ImageFile::open(source).map_err(|error| BootError::Kernel { path, reason: error.into() })
}

fn open_initrd(source: ImageSource<'_>) -> Result<ImageFile, BootError> {
    let path = source.path().to_owned();
    ImageFile::open(source).map_err(|reason| BootError::Initrd { path, reason })
}

fn check_command_line(line: &str, kernel: &Path, image: &KernelImage) -> Result<(), BootError> {
    if line.len() > layout::COMMAND_LINE_MAX {
        return Err(BootError::CommandLineTooLong { length: line.len() });
    }
    if let Some(offset) = line.find('\0') {
        return Err(BootError::CommandLineNul { offset });
    }
    if line.len() as u64 > image.command_line_max {
        return Err(BootError::CommandLineTooLongForKernel {
            path: kernel.to_owned(),
            length: line.len(),
            limit: image.command_line_max,
        });
    }
    Ok(())
}
