//! The engine that works everywhere: one system call after the other.
#![allow(unsafe_code)] // preadv and pwritev on guest memory, which must not be seen through references

use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::file::BlockFile;
use super::operation::{Operation, Progress, Step};

/// Runs `operation` to its end.
pub(super) fn run(file: &BlockFile, operation: &mut Operation) -> Result<(), Errno> {
    loop {
        let result = call(file, &operation.step());
        if let Progress::Done(result) = operation.advance(file, result) {
            return result;
        }
    }
}

/// Makes one system call; returns the bytes that it moved.
fn call(file: &BlockFile, step: &Step<'_>) -> Result<u64, Errno> {
    let descriptor = file.file.as_raw_fd();
    match *step {
        Step::Read { offset, vectors } => {
            let (start, count) = (vectors.as_ptr().cast(), vectors.len() as libc::c_int);
            // SAFETY: each `IoVec` is an iovec (checked beside its definition) that names guest memory, which
            // the operation keeps mapped, and which Rust code only touches through volatile accesses.
            let result = unsafe { libc::preadv(descriptor, start, count, offset.cast_signed()) };
            moved(result)
        }
        Step::Write { offset, vectors } => {
            let (start, count) = (vectors.as_ptr().cast(), vectors.len() as libc::c_int);
            // SAFETY: as for reading; or the vectors name a static that the kernel only reads.
            let result = unsafe { libc::pwritev(descriptor, start, count, offset.cast_signed()) };
            moved(result)
        }
        Step::Sync => rustix::fs::fdatasync(&file.file).map(|()| 0),
        Step::Allocate { mode, offset, length } => {
            rustix::fs::fallocate(&file.file, mode, offset, length).map(|()| 0)
        }
    }
}

fn moved(result: isize) -> Result<u64, Errno> {
    u64::try_from(result)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
