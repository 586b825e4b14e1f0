//! The container's namespaces: of processes, in which the container's process is not the first, and of mounts.
//!
//! ```text
//! init ──┬── first process of the namespaces: puts the root file system together, then buries the dead
//!        ├── the container's process          (enters the namespaces, then runs)
//!        └── processes of Exec                (the same)
//! ```
//!
//! The first process of a namespace ignores signals that it has no handler for, even KILL from within: programs do not
//! expect that. So it is this program itself; its end is the end of all that runs in the namespace.
#![allow(unsafe_code)] // clone and unshare

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use cofferdam_container_protocol::step::{Reason, Report, Step};
use rustix::fd::{AsFd, OwnedFd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};

use crate::failure::{Failure, Reasoned};
use crate::root::{self, Parts};

/// The namespaces, which live as long as their first process.
#[derive(Debug)]
pub struct Space {
    first: OwnedFd,
    pid: Pid,
}

impl Space {
    /// Makes them, with the root file system that `parts` become. There must be no other thread yet.
    ///
    /// # Errors
    /// If the root file system cannot be put together.
    pub fn new(parts: &Parts) -> Result<Self, Failure> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).because(Reason::KernelRefused)?;
        let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::SIGCHLD;
        // SAFETY: without a stack this is a fork; no other thread is there that could hold a lock.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
        if pid == 0 {
            let result = root::enter(parts);
            tell(writer, result);
            bury();
        }
        drop(writer);
        let pid =
            i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Failure::new(Reason::KernelRefused))?;
        let first = pidfd_open(pid, PidfdFlags::empty()).because(Reason::KernelRefused)?;
        told(reader)?;
        Ok(Self { first, pid })
    }

    /// Moves the calling thread there, so that its children are born there. It can have no threads from now on.
    ///
    /// # Errors
    /// If they have ended.
    pub fn enter(&self) -> rustix::io::Result<()> {
        // SAFETY: file descriptors stay shared; only root and working directory become this thread's own.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        let both = ThreadNameSpaceType::PROCESS_ID | ThreadNameSpaceType::MOUNT;
        move_into_thread_name_spaces(self.first.as_fd(), both)
    }

    /// Processes and threads there, without the first.
    pub fn processes(&self) -> u32 {
        let proc = format!("/proc/{}/root/proc", self.pid.as_raw_nonzero());
        let Ok(entries) = std::fs::read_dir(proc) else { return 0 };
        let processes =
            entries.flatten().filter(|entry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit));
        // A folder for each thread, `.` and `..`.
        let threads = processes
            .filter_map(|entry| std::fs::metadata(entry.path().join("task")).ok()?.nlink().checked_sub(2));
        let all = threads.fold(0_u64, u64::saturating_add);
        u32::try_from(all.saturating_sub(1)).unwrap_or(u32::MAX)
    }

    /// Ends all that runs there.
    pub fn kill(&self) {
        // It fails only if there is nothing left.
        let _ = pidfd_send_signal(&self.first, Signal::KILL);
    }

    /// Ends all that runs there, and waits until it has ended.
    pub fn end(&self) {
        self.kill();
        let _ = waitid(WaitId::PidFd(self.first.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Bytes by which the first process says how it went: a report, and an error number of the kernel's.
const TOLD: usize = 8;

fn tell(writer: OwnedFd, result: Result<(), Failure>) {
    let Err(failure) = result else { return };
    let Failure { reason, object, cause } = failure;
    let report = Report { step: Step::Root, reason: Some(reason), object, fatal: true };
    let cause = cause.map_or(0, rustix::io::Errno::raw_os_error);
    // Who does not hear of it sees that there is no first process.
    let _ = File::from(writer).write_all([report.number().to_le_bytes(), cause.to_le_bytes()].as_flattened());
    exit();
}

fn told(reader: OwnedFd) -> Result<(), Failure> {
    let mut bytes = Vec::with_capacity(TOLD);
    File::from(reader).read_to_end(&mut bytes).because(Reason::KernelRefused)?;
    let Some([number, cause]) = bytes.as_chunks::<4>().0.first_chunk::<2>() else { return Ok(()) };
    let report = Report::from_number(u32::from_le_bytes(*number));
    let cause = rustix::io::Errno::from_raw_os_error(i32::from_le_bytes(*cause));
    let reason = report.reason.unwrap_or(Reason::InitFailed);
    Err(Failure { reason, object: report.object, cause: (cause.raw_os_error() != 0).then_some(cause) })
}

fn exit() -> ! {
    // SAFETY: it ends this process, which has nothing to put in order.
    unsafe { libc::_exit(1) }
}

/// Lets the kernel bury whoever dies in the namespace, for ever.
fn bury() -> ! {
    // SAFETY: the descriptors are not used any more; ignoring a signal needs no handler, and pausing nothing at all.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, libc::c_long::from(u32::MAX), 0);
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        loop {
            libc::pause();
        }
    }
}
