//! Waiting for several things at once.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Those of `waits` for which something has happened, or none at `deadline`.
pub fn wait_for<S: Copy>(waits: &[(S, BorrowedFd<'_>, PollFlags)], deadline: Option<Instant>) -> Vec<S> {
    let mut polled: Vec<PollFd<'_>> =
        waits.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let timeout = deadline.map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => {}
        // The signal is in its pipe.
        Err(Errno::INTR) => return Vec::new(),
        // Short of memory: not for long, and not in a busy loop.
        Err(_) => std::thread::sleep(Duration::from_millis(10)),
    }
    let happened = |fd: &PollFd<'_>| !fd.revents().is_empty();
    waits.iter().zip(&polled).filter(|(_, fd)| happened(fd)).map(|((source, ..), _)| *source).collect()
}
