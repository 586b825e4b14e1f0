//! A kernel or initrd file: opened once, its length noted, read in place. It is read by offset only: a descriptor that
//! was inherited shares its position with everybody who has it.
#![allow(unsafe_code)] // pread into guest memory, which must not be seen through references

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use cofferdam_firmware::sha256;
use rustix::io::{Errno, preadv};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};

use super::error::FileError;

/// How much is read at a time to be hashed, bytes: whole blocks, and small enough to stay in a cache.
const HASH_BUFFER: usize = 128 << 10;

/// Where a kernel, an initrd or an image is.
#[derive(Debug)]
pub enum ImageSource<'a> {
    /// A regular file.
    Path(&'a Path),
    /// The same, opened by someone else; the path is what messages call it.
    File(File, &'a Path),
}

impl ImageSource<'_> {
    /// What messages call it.
    pub(crate) fn path(&self) -> &Path {
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
pub(crate) struct ImageFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl ImageFile {
    /// Opens `source` for reading. A pipe without a writer does not block.
    pub(crate) fn open(source: ImageSource<'_>) -> Result<Self, FileError> {
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
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` with the bytes at `offset`. By preadv(2), which the threads of a running domain may call.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), FileError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let read = match preadv(&self.file, &mut [IoSliceMut::new(rest)], at) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(Errno::INTR) => continue,
                result => result.map_err(io::Error::from),
            };
            done = done.saturating_add(read.map_err(|reason| self.read_error(at, reason))?);
        }
        Ok(())
    }

    /// The first `length` bytes, or all there are.
    pub(crate) fn head(&self, length: usize) -> Result<Vec<u8>, FileError> {
        let length = usize::try_from(self.length).map_or(length, |all| all.min(length));
        let mut head = vec![0; length];
        self.read_at(&mut head, 0)?;
        Ok(head)
    }

    /// The SHA-256 of the file.
    pub(crate) fn sha256(&self) -> Result<[u8; sha256::SIZE], FileError> {
        let mut hashing = Hashing::default();
        loop {
            if let Some(hash) = hashing.advance(self)? {
                return Ok(hash);
            }
        }
    }

    /// Reads `length` bytes at `offset` straight into guest memory at `address`.
    pub(crate) fn copy_to(
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

/// The SHA-256 of a file, as far as it has been read.
pub(crate) struct Hashing {
    hash: sha256::Hash,
    buffer: Vec<u8>,
    offset: u64,
}

impl Default for Hashing {
    fn default() -> Self {
        Self { hash: sha256::Method::detect().begin(), buffer: vec![0; HASH_BUFFER], offset: 0 }
    }
}

impl Hashing {
    /// Reads the next piece of `file`, which is some tenth of a millisecond's work. At the end of it the hash is there,
    /// and this is as if nothing had been read.
    pub(crate) fn advance(&mut self, file: &ImageFile) -> Result<Option<[u8; sha256::SIZE]>, FileError> {
        let left = usize::try_from(file.length.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let piece = self.buffer.get_mut(..left.min(HASH_BUFFER)).unwrap_or_default();
        file.read_at(piece, self.offset)?;
        let (blocks, rest) = piece.as_chunks();
        self.hash.blocks(blocks);
        if piece.len() == HASH_BUFFER {
            self.offset = self.offset.saturating_add(HASH_BUFFER as u64);
            return Ok(None);
        }
        let hash = std::mem::replace(&mut self.hash, sha256::Method::detect().begin());
        self.offset = 0;
        Ok(Some(hash.finish(rest)))
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
    fn the_hash_is_that_of_the_whole_file() {
        for length in [1, 4096, HASH_BUFFER - 1, HASH_BUFFER, HASH_BUFFER + 1, 3 * HASH_BUFFER + 100] {
            let bytes: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            let image = ImageFile::open(file(&bytes).path().into()).unwrap();
            assert_eq!(image.sha256().unwrap(), sha256::Method::PORTABLE.digest(&bytes), "{length}");
        }
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
