//! The file or block device behind a drive, opened and checked before anything starts.
//!
//! A drive has exactly the size of its file. A size that is not a whole number of
//! logical blocks is refused: rounding it down would hide the end of an image that
//! was cut off by accident.
//!
//! A writable file is locked exclusively and a read-only one shared (`flock`), so
//! that no two domains write one file, and none reads what another one writes.
//! The lock belongs to the open file and ends when the drive no longer uses it. (A file that was opened by someone
//! else is unlocked then, as they may keep it open.)

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::{Errno, FdFlags};
use thiserror::Error;

use crate::rate_limiter::RateLimits;

/// What `statfs` calls tmpfs and ramfs (Linux, `include/uapi/linux/magic.h`).
const MEMORY_MAGIC: [rustix::fs::FsWord; 2] = [0x0102_1994, 0x8584_58F6];

/// Where a drive's content is.
#[derive(Debug)]
pub enum BlockSource {
    /// A raw image file or a block device.
    Path(PathBuf),
    /// The same, opened by someone else; `PathBuf` is what messages call it.
    File(File, PathBuf),
}

/// Whether a flush of the guest reaches the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// The device offers flush, which ends in `fdatasync`.
    #[default]
    Writeback,
    /// The device offers no flush; the host writes back when it likes.
    Unsafe,
}

/// How the file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where the host has it and the file is not in memory, else `preadv` and `pwritev`. (io_uring would
    /// hand each request for a file of tmpfs to a thread, as that cannot say beforehand that it will not wait.)
    #[default]
    Auto,
    /// `preadv` and `pwritev` on the event loop.
    Sync,
    /// io_uring; refused where the host has none.
    Async,
}

/// Configuration of a drive.
#[derive(Debug)]
pub struct BlockOptions {
    /// Where the content is.
    pub source: BlockSource,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// Whether a flush reaches the disk.
    pub cache: Cache,
    /// How the file is read and written.
    pub engine: Engine,
    /// Size of a logical block in bytes: 512 or 4096.
    pub block_size: u32,
    /// Name of the drive; the guest reads its first 20 bytes as the serial number.
    pub id: String,
    /// Limits on bandwidth and operations.
    pub limits: RateLimits,
}

impl BlockOptions {
    /// A writable drive with 512-byte blocks, without limits, whose flushes reach the disk.
    pub fn new(source: BlockSource, id: &str) -> Self {
        Self {
            source,
            read_only: false,
            cache: Cache::default(),
            engine: Engine::default(),
            block_size: 512,
            id: id.to_owned(),
            limits: RateLimits::default(),
        }
    }
}

/// A drive that cannot be used.
#[derive(Debug, Error)]
pub enum BlockFileError {
    /// There is no such file.
    #[error("{}: no such file", .0.display())]
    NotFound(PathBuf),
    /// This user may not open it as asked.
    #[error("{}: no permission to open it {}", path.display(), if *.read_only { "for reading" } else { "for writing" })]
    Permission {
        /// The file.
        path: PathBuf,
        /// Whether the drive is read-only.
        read_only: bool,
    },
    /// It is on a read-only file system, and the drive is writable.
    #[error("{}: on a read-only file system; make the drive read-only", .0.display())]
    ReadOnlyFileSystem(PathBuf),
    /// A directory, pipe, socket or terminal.
    #[error("{}: neither a regular file nor a block device", .0.display())]
    FileKind(PathBuf),
    /// Someone has it already.
    #[error(
        "{}: locked: another domain, drive or program {} it", path.display(),
        if *.read_only { "writes" } else { "uses" }
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whether the drive is read-only.
        read_only: bool,
    },
    /// It has no content.
    #[error("{}: is empty", .0.display())]
    Empty(PathBuf),
    /// Its size does not fit the logical blocks.
    #[error("{}: its {size} bytes are not a multiple of the block size, {block_size}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
        /// Size of a logical block, bytes.
        block_size: u32,
    },
    /// The logical blocks have a size that is not supported.
    #[error("block size {0} is neither 512 nor 4096")]
    BlockSize(u32),
    /// The host refused something else.
    #[error("{}: {action}: {error}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        #[source]
        error: io::Error,
    },
}

/// A way to make a range of the file read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroMethod {
    /// Give the space back to the host.
    PunchHole,
    /// Keep the space.
    ZeroRange,
    /// Write zeroes.
    Write,
}

impl ZeroMethod {
    /// The mode of `fallocate`; `None` for plain writes.
    pub(super) fn mode(self) -> Option<FallocateFlags> {
        match self {
            Self::PunchHole => Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            Self::ZeroRange => Some(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            Self::Write => None,
        }
    }
}

/// An open and locked drive.
#[derive(Debug)]
pub struct BlockFile {
    pub(super) file: LockedFile,
    pub(super) path: PathBuf,
    /// Size, bytes; not 0, and a multiple of `block_size`.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) cache: Cache,
    pub(super) engine: Engine,
    pub(super) block_size: u32,
    pub(super) id: String,
    pub(super) limits: RateLimits,
    /// Whether the file is on a file system that keeps it in memory.
    pub(super) in_memory: bool,
    /// What the file system was found not to support.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
}

impl BlockFile {
    /// Opens, checks and locks the drive that `options` describe.
    pub fn open(options: BlockOptions) -> Result<Self, BlockFileError> {
        let BlockOptions { source, read_only, cache, engine, block_size, id, limits } = options;
        let (file, path) = open(source, read_only)?;
        let file = LockedFile::new(file, &path, read_only)?;
        // The size can be relied on only now.
        let size = checked_size(&file, &path, block_size)?;
        let (no_punch_hole, no_zero_range) = Default::default();
        Ok(Self {
            in_memory: is_in_memory(&file),
            file,
            path,
            size,
            read_only,
            cache,
            engine,
            block_size,
            id,
            limits,
            no_punch_hole,
            no_zero_range,
        })
    }

    /// Opens `source` for the same drive to go on with. It may be the same file, which then keeps its lock, with
    /// another size.
    pub fn reopen(&self, source: BlockSource) -> Result<Self, BlockFileError> {
        let (file, path) = open(source, self.read_only)?;
        let host = |error| BlockFileError::Host { path: path.clone(), action: "stat", error };
        let identity =
            |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino())).map_err(host);
        let file = if identity(&file)? == identity(&self.file)? {
            self.file.clone()
        } else {
            LockedFile::new(file, &path, self.read_only)?
        };
        Ok(Self {
            size: checked_size(&file, &path, self.block_size)?,
            in_memory: is_in_memory(&file),
            file,
            path,
            id: self.id.clone(),
            no_punch_hole: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            ..*self
        })
    }

    /// Checks the drive that `options` describe, but for locks.
    pub fn check(options: BlockOptions) -> Result<(), BlockFileError> {
        let (file, path) = open(options.source, options.read_only)?;
        checked_size(&file, &path, options.block_size).map(drop)
    }

    /// Size of the drive, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The best way to zero a range that the file system is not known to refuse.
    pub(super) fn zero_method(&self, unmap: bool) -> ZeroMethod {
        let punch_hole = !self.no_punch_hole.load(Ordering::Relaxed);
        let zero_range = !self.no_zero_range.load(Ordering::Relaxed);
        if punch_hole && (unmap || !zero_range) {
            ZeroMethod::PunchHole
        } else if zero_range {
            ZeroMethod::ZeroRange
        } else {
            ZeroMethod::Write
        }
    }

    /// Notes that the file system refuses `method`, so that it is not tried again.
    pub(super) fn refuses(&self, method: ZeroMethod) {
        match method {
            ZeroMethod::PunchHole => self.no_punch_hole.store(true, Ordering::Relaxed),
            ZeroMethod::ZeroRange => self.no_zero_range.store(true, Ordering::Relaxed),
            ZeroMethod::Write => {}
        }
    }
}

/// A file that is locked as long as it is used here.
#[derive(Clone, Debug)]
pub(super) struct LockedFile(Arc<Locked>);

#[derive(Debug)]
struct Locked(File);

impl LockedFile {
    fn new(file: File, path: &Path, read_only: bool) -> Result<Self, BlockFileError> {
        lock(&file, path, read_only)?;
        Ok(Self(Arc::new(Locked(file))))
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0.0
    }
}

impl AsFd for LockedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // It fails only on file systems without locks.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Opens `source`, which may be no other kind of file than a drive can be; and says what messages call it.
fn open(source: BlockSource, read_only: bool) -> Result<(File, PathBuf), BlockFileError> {
    let (file, path) = match source {
        BlockSource::Path(path) => (open_path(&path, read_only)?, path),
        BlockSource::File(file, path) => (file, path),
    };
    let kind = match file.metadata() {
        Ok(metadata) => metadata.file_type(),
        Err(error) => return Err(BlockFileError::Host { path, action: "stat", error }),
    };
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockFileError::FileKind(path));
    }
    set_flags(&file, &path, read_only)?;
    Ok((file, path))
}

fn open_path(path: &Path, read_only: bool) -> Result<File, BlockFileError> {
    // Without O_NONBLOCK a pipe would keep the caller until somebody writes to it.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC).bits().cast_signed();
    let opened = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
    opened.map_err(|error| {
        let path = path.to_owned();
        match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => BlockFileError::NotFound(path),
            Some(Errno::ACCESS | Errno::PERM) => BlockFileError::Permission { path, read_only },
            Some(Errno::ROFS) => BlockFileError::ReadOnlyFileSystem(path),
            Some(Errno::ISDIR | Errno::NXIO | Errno::NODEV) => BlockFileError::FileKind(path),
            _ => BlockFileError::Host { path, action: "open", error },
        }
    })
}

/// Makes sure that the file can be used as asked, at any offset, and is not inherited.
fn set_flags(file: &File, path: &Path, read_only: bool) -> Result<(), BlockFileError> {
    let host =
        |error: Errno| BlockFileError::Host { path: path.to_owned(), action: "fcntl", error: error.into() };
    rustix::io::fcntl_setfd(file, FdFlags::CLOEXEC).map_err(host)?;
    let flags = rustix::fs::fcntl_getfl(file).map_err(host)?;
    let mode = flags & OFlags::RWMODE;
    if mode != OFlags::RDWR && !(read_only && mode == OFlags::RDONLY) {
        return Err(BlockFileError::Permission { path: path.to_owned(), read_only });
    }
    // With O_NONBLOCK io_uring fails a request that would wait; with O_APPEND writes ignore their offset.
    rustix::fs::fcntl_setfl(file, flags.difference(OFlags::NONBLOCK | OFlags::APPEND)).map_err(host)
}

fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), BlockFileError> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    loop {
        return match rustix::fs::flock(file, operation) {
            Ok(()) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::WOULDBLOCK) => Err(BlockFileError::Locked { path: path.to_owned(), read_only }),
            // Not every file system has locks; to read, none is needed.
            Err(_) if read_only => Ok(()),
            Err(error) => {
                Err(BlockFileError::Host { path: path.to_owned(), action: "lock", error: error.into() })
            }
        };
    }
}

fn is_in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| MEMORY_MAGIC.contains(&stat.f_type))
}

fn checked_size(file: &File, path: &Path, block_size: u32) -> Result<u64, BlockFileError> {
    let path = || path.to_owned();
    if block_size != 512 && block_size != 4096 {
        return Err(BlockFileError::BlockSize(block_size));
    }
    match size(file).map_err(|error| BlockFileError::Host { path: path(), action: "size", error })? {
        0 => Err(BlockFileError::Empty(path())),
        size if size.is_multiple_of(u64::from(block_size)) => Ok(size),
        size => Err(BlockFileError::Size { path: path(), size, block_size }),
    }
}

fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    // The end of a block device is what BLKGETSIZE64 gives.
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::{NamedTempFile, TempDir};

    fn image(bytes: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn options(path: &Path, read_only: bool) -> BlockOptions {
        BlockOptions { read_only, ..BlockOptions::new(BlockSource::Path(path.to_owned()), "disk") }
    }

    fn open(path: &Path, read_only: bool) -> Result<BlockFile, BlockFileError> {
        BlockFile::open(options(path, read_only))
    }

    #[test]
    fn a_file_has_its_own_size_and_is_not_inherited() {
        let image = image(8192);
        let file = open(image.path(), false).unwrap();
        assert_eq!(file.size(), 8192);
        let flags = rustix::io::fcntl_getfd(&file.file).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
        let flags = rustix::fs::fcntl_getfl(&file.file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }

    #[test]
    fn what_is_no_disk_is_refused_by_kind() {
        let directory = TempDir::new().unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        for path in [directory.path(), &pipe, Path::new("/dev/null")] {
            for read_only in [false, true] {
                let error = open(path, read_only).unwrap_err();
                assert!(matches!(error, BlockFileError::FileKind(_)), "{error}");
            }
        }
        let missing = directory.path().join("missing");
        assert!(matches!(open(&missing, true), Err(BlockFileError::NotFound(path)) if path == missing));
        let below = image(512).path().join("file");
        assert!(matches!(open(&below, true), Err(BlockFileError::NotFound(_))));
    }

    #[test]
    fn sizes_that_make_no_disk_are_refused() {
        assert!(matches!(open(image(0).path(), true), Err(BlockFileError::Empty(_))));
        let odd = image(1000);
        let error = open(odd.path(), true).unwrap_err();
        assert!(error.to_string().ends_with("its 1000 bytes are not a multiple of the block size, 512"));
        let small = image(512);
        let blocks = |block_size| BlockFile::open(BlockOptions { block_size, ..options(small.path(), true) });
        assert!(matches!(blocks(4096), Err(BlockFileError::Size { size: 512, block_size: 4096, .. })));
        for size in [0, 1, 1024, 8192] {
            assert!(matches!(blocks(size), Err(BlockFileError::BlockSize(s)) if s == size));
        }
    }

    #[test]
    fn a_writer_excludes_everyone_and_readers_share() {
        let image = image(512);
        let writer = open(image.path(), false).unwrap();
        assert!(matches!(open(image.path(), false), Err(BlockFileError::Locked { read_only: false, .. })));
        assert!(matches!(open(image.path(), true), Err(BlockFileError::Locked { read_only: true, .. })));
        drop(writer);
        let readers = (open(image.path(), true).unwrap(), open(image.path(), true).unwrap());
        assert!(matches!(open(image.path(), false), Err(BlockFileError::Locked { .. })));
        drop(readers);
        open(image.path(), false).unwrap();
    }

    #[test]
    fn a_given_file_must_have_the_right_mode_and_loses_append() {
        let mut image = image(512);
        image.as_file_mut().write_all(b"x").unwrap();
        let given = |file: File, read_only| {
            let source = BlockSource::File(file, "given".into());
            BlockFile::open(BlockOptions { read_only, ..BlockOptions::new(source, "disk") })
        };
        let read = || File::open(image.path()).unwrap();
        assert!(matches!(given(read(), false), Err(BlockFileError::Permission { read_only: false, .. })));
        given(read(), true).unwrap();
        let append = OpenOptions::new().read(true).append(true).open(image.path()).unwrap();
        let file = given(append, false).unwrap();
        assert!(!rustix::fs::fcntl_getfl(&file.file).unwrap().contains(OFlags::APPEND));
        drop(file);
        let write = OpenOptions::new().write(true).open(image.path()).unwrap();
        assert!(matches!(given(write, true), Err(BlockFileError::Permission { read_only: true, .. })));
    }

    #[test]
    fn a_refused_way_to_zero_is_not_tried_again() {
        let image = image(512);
        let file = open(image.path(), false).unwrap();
        assert_eq!(file.zero_method(true), ZeroMethod::PunchHole);
        assert_eq!(file.zero_method(false), ZeroMethod::ZeroRange);
        file.refuses(ZeroMethod::ZeroRange);
        assert_eq!(file.zero_method(false), ZeroMethod::PunchHole);
        file.refuses(ZeroMethod::PunchHole);
        assert_eq!(file.zero_method(true), ZeroMethod::Write);
        assert_eq!(file.zero_method(false), ZeroMethod::Write);
    }
}
