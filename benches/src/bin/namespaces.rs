//! `namespaces`: a process that only enters the namespaces that a jail of root's has. It writes a byte when it is in
//! all of them, and ends.
//!
//! As in the jailer, the user namespace is the last, and the others belong to the host's; a PID namespace takes a
//! fork. Nothing is mounted, mapped, limited, given up or executed, and nothing has to be removed.
#![allow(unsafe_code)] // unshare(2) and fork(2)

use std::io::{self, Error, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("namespaces: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    unshare(
        libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWCGROUP,
    )?;
    // SAFETY: this process has one thread, so its copy can go on like itself.
    match unsafe { libc::fork() } {
        -1 => Err(Error::last_os_error()),
        0 => {
            unshare(libc::CLONE_NEWUSER)?;
            io::stdout().write_all(b"1")?;
            io::stdout().flush()
        }
        child => {
            let mut status = 0;
            // SAFETY: the child is ours, and `status` lives through the call.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            if waited == child && status == 0 { Ok(()) } else { Err(Error::other("the child failed")) }
        }
    }
}

fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: this process shares nothing with another thread.
    match unsafe { libc::unshare(namespaces) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}
