//! A kernel or initrd file: opened once, its length noted, read in place.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, ReadVolatile, VolatileMemoryError,
};

use super::error::FileError;

/// An open, regular, non-empty file.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl ImageFile {
    /// Opens `path` for reading. A pipe without a writer does not block.
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(FileError::Open)?;
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
        // One slice, thus one region: a read that returns early goes on where it stopped.
        let mut slice = memory.get_slice(GuestAddress(address), count).map_err(memory_error)?;
        (&self.file).seek(SeekFrom::Start(offset)).map_err(|reason| FileError::Read { offset, reason })?;
        (&self.file).read_exact_volatile(&mut slice).map_err(|error| match error {
            VolatileMemoryError::IOError(reason) => self.read_error(offset, reason),
            other => memory_error(other.into()),
        })
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
            assert!(matches!(ImageFile::open(path), Err(FileError::NotRegular)), "{path:?}");
        }
    }

    #[test]
    fn a_file_that_shrinks_is_noticed() {
        let image = file(&[7; 4096]);
        let open = ImageFile::open(image.path()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        open.copy_to(&memory, 0x1000, 0, 4096).unwrap();
        image.as_file().set_len(100).unwrap();
        assert!(matches!(open.copy_to(&memory, 0x1000, 0, 4096), Err(FileError::Shrunk { length: 4096 })));
        assert!(matches!(open.read_at(&mut [0; 8], 96), Err(FileError::Shrunk { .. })));
    }

    #[test]
    fn a_range_outside_guest_memory_is_refused() {
        let image = file(&[7; 4096]);
        let open = ImageFile::open(image.path()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        for address in [0x3001, 0x4000, u64::MAX] {
            let result = open.copy_to(&memory, address, 0, 4096);
            assert!(matches!(result, Err(FileError::GuestMemory { .. })), "{address:#x}");
        }
    }
}
