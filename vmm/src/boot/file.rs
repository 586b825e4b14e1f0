//! A kernel or initrd file: opened once, its length noted, read in place. It is read by offset only: a descriptor that
//! was inherited shares its position with everybody who has it.
#![allow(unsafe_code)] // pread into guest memory, which must not be seen through references

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

use super::error::FileError;

/// Where a kernel or initrd is.
#[derive(Debug)]
pub enum ImageSource<'a> {
    /// A regular file.
    Path(&'a Path),
    /// The same, opened by someone else; the path is what messages call it.
    File(File, &'a Path),
}

impl ImageSource<'_> {
    /// What messages call it.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Path(path) | Self::File(_, path) => path,
        }
    }
}

impl<'a> From<&'a Path> for ImageSource<'a> {
    fn from(path: &'a Path) -> Self {
        Self::Path(path)
    }
}

/// An open, regular, non-empty file.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl ImageFile {
    /// Opens `source` for reading. A pipe without a writer does not block.
    pub(super) fn open(source: ImageSource<'_>) -> Result<Self, FileError> {
        let (file, path) = match source {
            ImageSource::File(file, path) => (Ok(file), path),
            ImageSource::Path(path) => {
                let mut options = OpenOptions::new();
                options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
                (options.open(path), path)
            }
        };
        let file = file.map_err(FileError::Open)?;
        let metadata = file.metadata().map_err(FileError::Open)?;
        if !metadata.is_file() {
            return Err(FileError::NotRegular);
        }
        match metadata.len() {
            0 => Err(FileError::Empty),
            length => Ok(Self { file, path: path.to_owned(), length }),
        }
    }

    /// The path that the file was opened by, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` with the bytes at `offset`.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), FileError> {
        self.file.read_exact_at(buffer, offset).map_err(|reason| self.read_error(offset, reason))
    }

    /// Reads `length` bytes at `offset` straight into guest memory at `address`.
    pub(super) fn copy_to(
        &self,
        memory: &GuestMemoryMmap,
        address: u64,
        offset: u64,
        length: u64,
    ) -> Result<(), FileError> {
        let memory_error = |reason| FileError::GuestMemory { address, reason };
        let count = usize::try_from(length)
            .map_err(|_| memory_error(GuestMemoryError::InvalidGuestAddress(GuestAddress(address))))?;
        // One slice, thus one region.
        let mut slice = memory.get_slice(GuestAddress(address), count).map_err(memory_error)?;
        let mut offset = offset;
        while !slice.is_empty() {
            let read = self.read_into(&slice, offset).map_err(|reason| self.read_error(offset, reason))?;
            slice = slice.offset(read).map_err(|error| memory_error(error.into()))?;
            offset = offset.saturating_add(read as u64);
        }
        Ok(())
    }

    /// Reads bytes at `offset`, one at least.
    fn read_into(&self, slice: &VolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        let target = slice.ptr_guard_mut();
        loop {
            // SAFETY: the guard keeps that many bytes of guest memory mapped and writable, and Rust code only
            // touches them through volatile accesses.
            let read = unsafe {
                libc::pread(self.file.as_raw_fd(), target.as_ptr().cast(), slice.len(), offset.cast_signed())
            };
            match usize::try_from(read) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => return Ok(read),
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn read_error(&self, offset: u64, reason: io::Error) -> FileError {
        match reason.kind() {
            io::ErrorKind::UnexpectedEof => FileError::Shrunk { length: self.length },
            _ => FileError::Read { offset, reason },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::file;

    #[test]
    fn directory_pipe_and_device_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        for path in [folder.path(), &pipe, Path::new("/dev/null")] {
            assert!(matches!(ImageFile::open(path.into()), Err(FileError::NotRegular)), "{path:?}");
        }
    }

    #[test]
    fn a_file_that_shrinks_is_noticed() {
        let image = file(&[7; 4096]);
        let open = ImageFile::open(image.path().into()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        open.copy_to(&memory, 0x1000, 0, 4096).unwrap();
        image.as_file().set_len(100).unwrap();
        assert!(matches!(open.copy_to(&memory, 0x1000, 0, 4096), Err(FileError::Shrunk { length: 4096 })));
        assert!(matches!(open.read_at(&mut [0; 8], 96), Err(FileError::Shrunk { .. })));
    }

    #[test]
    fn a_range_outside_guest_memory_is_refused() {
        let image = file(&[7; 4096]);
        let open = ImageFile::open(image.path().into()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        for address in [0x3001, 0x4000, u64::MAX] {
            let result = open.copy_to(&memory, address, 0, 4096);
            assert!(matches!(result, Err(FileError::GuestMemory { .. })), "{address:#x}");
        }
    }
}
