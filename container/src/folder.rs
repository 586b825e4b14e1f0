//! Reads a layer out of a folder: owners, modes, times and attributes as the files have them.
//!
//! Every name is opened from the folder that it is in, and no symbolic link is followed, so that whoever can change the folder
//! meanwhile leads nowhere else. What is found to have changed while it was read ends the build.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fgetxattr, flistxattr, fstat, lgetxattr,
    llistxattr, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;

use crate::budget::{Exceeded, MAX_NAMES};
use crate::layer::{LayerError, Reading};
use crate::spool::{Content, Spool};
use crate::tree::{Attributes, Kind};

/// Largest value of an extended attribute, and of the list of their names, in bytes: XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
const MAX_XATTR: usize = 64 << 10;
/// Bytes of a file that are read at once.
const CHUNK: usize = 256 << 10;

/// Why a folder is refused.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Something in it cannot be read.
    #[error("cannot read {name:?}: {source}")]
    Read {
        /// What.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Something in it is not what it was.
    #[error("{0:?} changed while it was read")]
    Changed(String),
    /// For what is in it.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

/// Reads the names below `root` into `layer` and the files into `spool`.
///
/// # Errors
/// If the folder, or something in it, is refused.
pub fn read_folder(root: &OwnedFd, layer: &mut Reading<'_>, spool: &mut Spool) -> Result<(), FolderError> {
    let mut walk = Walk { layer, spool, linked: BTreeMap::new(), name: Vec::new() };
    let stat = walk.check(fstat(root))?;
    walk.folder(root.as_fd(), &stat)
}

struct Walk<'a, 'b> {
    layer: &'a mut Reading<'b>,
    spool: &'a mut Spool,
    /// The first names of what has several, by device and inode.
    linked: BTreeMap<(u64, u64), Vec<u8>>,
    /// The name that is being read, from the root on.
    name: Vec<u8>,
}

impl Walk<'_, '_> {
    fn folder(&mut self, folder: BorrowedFd<'_>, stat: &Stat) -> Result<(), FolderError> {
        let attributes = self.attributes(stat, &Place::Open(folder))?;
        // Which refuses what lies too deep.
        self.layer.add_folder(&self.name, attributes)?;
        for name in self.names(folder)? {
            let length = self.name.len();
            if length > 0 {
                self.name.push(b'/');
            }
            self.name.extend_from_slice(name.to_bytes());
            self.node(folder, &name)?;
            self.name.truncate(length);
        }
        self.check_unchanged(stat, &self.check(fstat(folder))?)
    }

    /// What is in a folder, in the order of the names' bytes.
    fn names(&self, folder: BorrowedFd<'_>) -> Result<Vec<CString>, FolderError> {
        let mut names = Vec::new();
        for entry in self.check(Dir::read_from(folder))? {
            let name = self.check(entry)?.file_name().to_owned();
            if names.len() as u64 > MAX_NAMES {
                return Err(LayerError::from(Exceeded::Names).into());
            }
            if name.to_bytes() != b"." && name.to_bytes() != b".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn node(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> Result<(), FolderError> {
        let stat = self.check(statat(folder, name, AtFlags::SYMLINK_NOFOLLOW))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let id = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&id) {
                return Ok(self.layer.add_hard_link(&self.name, first)?);
            }
            if matches!(kind, FileType::RegularFile | FileType::Symlink | FileType::Fifo) {
                self.linked.insert(id, self.name.clone());
            }
        }
        match kind {
            FileType::Directory => {
                let (opened, stat) = self.open(folder, name, &stat, OFlags::DIRECTORY)?;
                self.folder(opened.as_fd(), &stat)
            }
            FileType::RegularFile => {
                let (opened, stat) = self.open(folder, name, &stat, OFlags::NONBLOCK)?;
                let attributes = self.attributes(&stat, &Place::Open(opened.as_fd()))?;
                let content = self.content(&opened, &stat)?;
                Ok(self.layer.add_leaf(&self.name, attributes, Kind::File(content))?)
            }
            FileType::Symlink => {
                let target = self.check(readlinkat(folder, name, Vec::new()))?.into_bytes();
                self.leaf(folder, name, &stat, Kind::Symlink(target))
            }
            FileType::Fifo => self.leaf(folder, name, &stat, Kind::Fifo),
            FileType::Socket => {
                self.layer.left_out(&self.name, "socket");
                Ok(())
            }
            _ => {
                self.layer.left_out(&self.name, "device node");
                Ok(())
            }
        }
    }

    /// Adds what is not opened.
    fn leaf(
        &mut self,
        folder: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        kind: Kind,
    ) -> Result<(), FolderError> {
        let attributes = self.attributes(stat, &Place::In(folder, name))?;
        self.check_unchanged(stat, &self.check(statat(folder, name, AtFlags::SYMLINK_NOFOLLOW))?)?;
        Ok(self.layer.add_leaf(&self.name, attributes, kind)?)
    }

    /// Opens what was seen to be `seen`.
    fn open(
        &self,
        folder: BorrowedFd<'_>,
        name: &CStr,
        seen: &Stat,
        flags: OFlags,
    ) -> Result<(OwnedFd, Stat), FolderError> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = match openat(folder, name, flags, Mode::empty()) {
            // A link, a file, or nothing is there now.
            Err(Errno::LOOP | Errno::NOTDIR | Errno::NOENT) => return Err(self.changed()),
            other => self.check(other)?,
        };
        let stat = self.check(fstat(&opened))?;
        self.check_unchanged(seen, &stat)?;
        Ok((opened, stat))
    }

    /// Reads a file, but not its holes.
    fn content(&mut self, opened: &OwnedFd, stat: &Stat) -> Result<Content, FolderError> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.layer.budget.spend_bytes(size).map_err(LayerError::from)?;
        let name = String::from_utf8_lossy(&self.name).into_owned();
        let failed = |source| FolderError::Read { name: name.clone(), source };
        let file = File::from(opened.try_clone().map_err(failed)?);
        let mut adding = self.spool.add();
        let mut at = 0;
        let mut buffer = vec![0; CHUNK];
        while at < size {
            let data = match seek(opened, SeekFrom::Data(at)) {
                Ok(data) => data.min(size),
                // Nothing but a hole is left.
                Err(Errno::NXIO) => size,
                Err(error) => return Err(failed(error.into())),
            };
            adding.zeros(data - at).map_err(failed)?;
            at = data;
            let end = match data < size {
                true => seek(opened, SeekFrom::Hole(data)).map_err(|error| failed(error.into()))?.min(size),
                false => size,
            };
            while at < end {
                let wanted = buffer.len().min((end - at) as usize);
                let count = file.read_at(&mut buffer[..wanted], at).map_err(failed)?;
                if count == 0 {
                    return Err(FolderError::Changed(name));
                }
                adding.write(&buffer[..count]).map_err(failed)?;
                at += count as u64;
            }
        }
        let content = adding.finish().map_err(failed)?;
        // One that grows has more than it said, or another time.
        let more = file.read_at(&mut buffer[..1], size).map_err(failed)?;
        if more > 0 {
            return Err(FolderError::Changed(name));
        }
        self.check_unchanged(stat, &self.check(fstat(opened))?)?;
        Ok(content)
    }

    fn attributes(&mut self, stat: &Stat, place: &Place<'_>) -> Result<Attributes, FolderError> {
        let mut xattrs = BTreeMap::new();
        let mut names = vec![0; MAX_XATTR];
        let length = match place.list_xattrs(&mut names) {
            Ok(length) => length,
            // The file system has none.
            Err(Errno::NOTSUP) => 0,
            Err(error) => return self.check(Err(error)),
        };
        names.truncate(length);
        for xattr in names.split(|byte| *byte == 0).filter(|xattr| !xattr.is_empty()) {
            let mut value = vec![0; MAX_XATTR];
            let key = CString::new(xattr).map_err(|_| self.changed())?;
            let length = self.check(place.get_xattr(&key, &mut value))?;
            value.truncate(length);
            xattrs.insert(xattr.to_vec(), value);
        }
        let attributes = Attributes {
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: u64::try_from(stat.st_mtime).unwrap_or(0),
            xattrs,
        };
        let name = self.name.clone();
        Ok(self.layer.without_foreign_xattrs(&name, attributes))
    }

    fn check_unchanged(&self, before: &Stat, after: &Stat) -> Result<(), FolderError> {
        if identity(before) == identity(after) { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> FolderError {
        FolderError::Changed(String::from_utf8_lossy(&self.name).into_owned())
    }

    fn check<T>(&self, result: rustix::io::Result<T>) -> Result<T, FolderError> {
        let name = || String::from_utf8_lossy(&self.name).into_owned();
        result.map_err(|error| FolderError::Read { name: name(), source: error.into() })
    }
}

/// What says that something is the same, and as it was.
fn identity(stat: &Stat) -> [i128; 8] {
    [
        i128::from(stat.st_dev),
        i128::from(stat.st_ino),
        i128::from(stat.st_mode),
        i128::from(stat.st_size),
        i128::from(stat.st_mtime),
        i128::from(stat.st_mtime_nsec),
        i128::from(stat.st_ctime),
        i128::from(stat.st_ctime_nsec),
    ]
}

/// Where extended attributes are read.
enum Place<'a> {
    /// Of what is open.
    Open(BorrowedFd<'a>),
    /// Of what has a name in a folder, and is not opened.
    In(BorrowedFd<'a>, &'a CStr),
}

impl Place<'_> {
    fn list_xattrs(&self, names: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Open(file) => flistxattr(file, names),
            Self::In(folder, name) => llistxattr(path_in(*folder, name), names),
        }
    }

    fn get_xattr(&self, xattr: &CStr, value: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Open(file) => fgetxattr(file, xattr, value),
            Self::In(folder, name) => lgetxattr(path_in(*folder, name), xattr, value),
        }
    }
}

/// The path to a name in an open folder. (There are no calls for extended attributes that take both.)
fn path_in(folder: BorrowedFd<'_>, name: &CStr) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), name.to_bytes()].concat()
}
