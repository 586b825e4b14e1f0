//! A file, mapped for the guest to read. The monitor never looks into it: the file may be cut off at any time.
#![allow(unsafe_code)] // mmap

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::error::ImageError;
use crate::boot::file::ImageFile;

/// A read-only mapping of a whole file; what follows its end in the last page is zero.
pub(super) struct MappedFile {
    address: *mut c_void,
    length: usize,
}

// SAFETY: the mapping is no thread's own, and nothing writes through it.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `file`.
    pub(super) fn new(file: &ImageFile) -> Result<Self, ImageError> {
        let failed =
            |error: rustix::io::Errno| ImageError::Map { path: file.path().to_owned(), error: error.into() };
        let length = usize::try_from(file.length()).map_err(|_| failed(rustix::io::Errno::FBIG))?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            mmap(null_mut(), length, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::NORESERVE, file.file(), 0)
        }
        .map_err(failed)?;
        Ok(Self { address, length })
    }

    /// Lets go of the file, but not of its addresses: zeros are there from now on, which take no memory, as long as this
    /// process lives. So a VM that has a slot here sees nothing else, and is not disturbed, which the removal of the slot
    /// would do: KVM forgets where all memory of such a VM is, and each of its pages faults again.
    pub(super) fn empty(self) -> std::io::Result<()> {
        let Self { address, length } = self;
        std::mem::forget(self);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: it replaces the mapping made in `new`, to which there are no references any more.
        unsafe { mmap_anonymous(address, length, ProtFlags::READ, flags) }?;
        Ok(())
    }

    /// Its addresses.
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.address as usize;
        start..start.saturating_add(self.length)
    }

    /// Its bytes, of which the address and the number are to be used, and nothing else.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.length) }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and borrowed by nobody any more.
        let _ = unsafe { munmap(self.address, self.length) };
    }
}
