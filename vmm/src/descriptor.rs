//! Files given by path or, as `fd:N`, by an inherited descriptor.
#![allow(unsafe_code)] // taking over a descriptor by its number

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// Descriptors that were taken over; each can be only once.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// A path, or `fd:N` with N from 3 on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path.
    Path(PathBuf),
    /// An inherited descriptor.
    Descriptor(RawFd),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fd:") {
            None => Ok(Self::Path(text.into())),
            Some(number) => match number.parse() {
                Ok(fd) if fd > 2 => Ok(Self::Descriptor(fd)),
                _ => Err(format!("{number:?} is not a descriptor from 3 on")),
            },
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Descriptor(fd) => write!(f, "fd:{fd}"),
        }
    }
}

impl Source {
    /// Opens it for reading.
    pub fn open(&self) -> io::Result<File> {
        match self {
            Self::Path(path) => File::open(path),
            Self::Descriptor(fd) => take(*fd),
        }
    }

    /// Opens it for appending; a path is created if need be.
    pub fn append(&self) -> io::Result<File> {
        match self {
            Self::Path(path) => OpenOptions::new().append(true).create(true).open(path),
            Self::Descriptor(fd) => take(*fd),
        }
    }
}

/// Takes over descriptor `fd`, once, and closes it on exec.
fn take(fd: RawFd) -> io::Result<File> {
    if !TAKEN.lock().unwrap_or_else(PoisonError::into_inner).insert(fd) {
        return Err(io::Error::other(format!("descriptor {fd} is given twice")));
    }
    // SAFETY: borrowed for two calls, which fail on a number that is no open descriptor.
    let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
    // What is inherited has survived an exec; what this process has opened itself would not.
    if fcntl_getfd(descriptor)?.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF.into());
    }
    fcntl_setfd(descriptor, FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open, it was named for this use by whoever started us, and `TAKEN` makes
    // sure that it is taken over only once.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_paths_or_descriptors() {
        assert_eq!("/a".parse(), Ok(Source::Path("/a".into())));
        assert_eq!("fd:3".parse(), Ok(Source::Descriptor(3)));
        for bad in ["fd:", "fd:0", "fd:2", "fd:-1", "fd:x", "fd:99999999999"] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
        for text in ["/a", "fd:3"] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_closed_descriptor_is_an_error_and_a_second_taking_too() {
        assert!(Source::Descriptor(987_654).open().is_err());
        assert!(Source::Descriptor(987_654).open().unwrap_err().to_string().contains("twice"));
    }
}
