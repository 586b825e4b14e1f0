//! Signals as events: the ones that stop a domain are read from a descriptor.
#![allow(unsafe_code)] // signalfd has no safe wrapper in the crates we use

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};

use vmm_sys_util::signal::create_sigset;

/// What asks for an orderly stop. One that whoever started the monitor had set to be ignored, as nohup(1)
/// does, stays ignored.
const STOP_SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Arrivals of the stop signals.
pub struct StopSignals(File);

impl StopSignals {
    /// Blocks the stop signals on this thread, and so on all that it starts, and ignores `SIGPIPE` and `SIGXFSZ`:
    /// a reader that went away, or a file that may not grow (`RLIMIT_FSIZE`), is an error of the write. To be called
    /// before the first thread is started.
    pub fn new() -> io::Result<Self> {
        let signals: Vec<i32> = STOP_SIGNALS.into_iter().filter(|signal| !is_ignored(*signal)).collect();
        let set = create_sigset(&signals)?;
        // SAFETY: `set` lives through the call, and nobody wants to know the old mask.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
        for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
            // SAFETY: ignoring a signal installs no handler.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        // SAFETY: `set` lives through the call, which makes a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The number of signals that have arrived since the last call.
    pub fn take(&self) -> usize {
        let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
        let mut arrived = 0_usize;
        while (&self.0).read(&mut buffer).is_ok_and(|length| length == buffer.len()) {
            arrived = arrived.saturating_add(1);
        }
        arrived
    }
}

/// A blocked signal is queued even while it is ignored, so those have to be left out.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: a sigaction of zeros is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action this only writes the present one to `action`.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Sends `signal` to this thread, and to no other one of this process.
    pub fn raise(signal: i32) {
        // SAFETY: the signals of these tests are blocked or ignored on this thread.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    #[test]
    fn signals_that_were_blocked_already_are_no_error() {
        StopSignals::new().unwrap();
        let signals = StopSignals::new().unwrap();
        raise(libc::SIGTERM);
        assert_eq!(signals.take(), 1);
    }

    #[test]
    fn signals_are_kept_until_they_are_taken() {
        let signals = StopSignals::new().unwrap();
        assert_eq!(signals.take(), 0);
        STOP_SIGNALS.into_iter().for_each(raise);
        assert_eq!(signals.take(), STOP_SIGNALS.len());
        assert_eq!(signals.take(), 0);
    }
}
