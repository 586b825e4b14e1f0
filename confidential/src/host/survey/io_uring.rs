//! Whether the kernel makes io_urings, asked without having one made.
#![allow(unsafe_code)] // a system call that has to be made in a wrong way

use std::io;

/// Asks for a ring without saying where its parameters are. A kernel that makes rings for this process answers
/// `EFAULT`; one that has none, or does not allow them, says that first (Linux `io_uring/io_uring.c`,
/// `io_uring_setup`). So this works under a seccomp policy too that allows no ring at all, as a running monitor's.
pub(super) fn ask() -> io::Result<()> {
    // SAFETY: the kernel reads and writes nothing at address 0, and makes nothing.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, std::ptr::null_mut::<libc::c_void>()) };
    match io::Error::last_os_error() {
        error if result < 0 && error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        error => Err(error),
    }
}
