//! Signals as events: the ones that stop a domain are read from a descriptor.
#![allow(unsafe_code)] // signalfd has no safe wrapper in the crates we use

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};

use std::sync::Arc;

use cofferdam_metrics::{Counter, group};
use vmm_sys_util::signal::create_sigset;

/// What asks for an orderly stop. One that whoever started the monitor had set to be ignored, as nohup(1)
/// does, stays ignored.
const STOP_SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

group! {
    /// Of the signals that stop a domain.
    pub struct SignalMetrics {
        /// SIGHUPs
        pub sighup: Counter,
        /// SIGINTs
        pub sigint: Counter,
        /// SIGTERMs
        pub sigterm: Counter,
    }
}

/// Arrivals of the stop signals.
pub struct StopSignals {
    file: File,
    metrics: Arc<SignalMetrics>,
}

impl StopSignals {
    /// Blocks the stop signals on this thread, and so on all that it starts, and ignores `SIGPIPE` and `SIGXFSZ`:
    /// a reader that went away, or a file that may not grow (`RLIMIT_FSIZE`), is an error of the write. To be called
    /// before the first thread is started. Signals are counted in `metrics`.
    pub fn new(metrics: Arc<SignalMetrics>) -> io::Result<Self> {
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
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file, metrics })
    }

    /// The number of signals that have arrived since the last call.
    pub fn take(&self) -> usize {
        let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
        let mut arrived = 0_usize;
        while (&self.file).read(&mut buffer).is_ok_and(|length| length == buffer.len()) {
            arrived = arrived.saturating_add(1);
            // `ssi_signo` is the first field.
            match buffer.first_chunk().map(|signal| i32::from_ne_bytes(*signal)) {
                Some(libc::SIGHUP) => self.metrics.sighup.count(),
                Some(libc::SIGINT) => self.metrics.sigint.count(),
                Some(libc::SIGTERM) => self.metrics.sigterm.count(),
                _ => {}
            }
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
        self.file.as_fd()
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
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

    /// None of them stays ignored, as some are in what a shell starts in the background.
    pub fn stop_signals(metrics: Arc<SignalMetrics>) -> StopSignals {
        for signal in STOP_SIGNALS {
            // SAFETY: the default action installs no handler.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        StopSignals::new(metrics).unwrap()
    }

    #[test]
    fn signals_that_were_blocked_already_are_no_error() {
        stop_signals(Arc::default());
        let signals = stop_signals(Arc::default());
        raise(libc::SIGTERM);
        assert_eq!(signals.take(), 1);
    }

    #[test]
    fn signals_are_kept_until_they_are_taken() {
        let metrics = Arc::<SignalMetrics>::default();
        let signals = stop_signals(metrics.clone());
        assert_eq!(signals.take(), 0);
        STOP_SIGNALS.into_iter().for_each(raise);
        assert_eq!(signals.take(), STOP_SIGNALS.len());
        let counted = [&metrics.sighup, &metrics.sigint, &metrics.sigterm].map(Counter::total);
        assert_eq!(counted, [1; 3]);
        assert_eq!(signals.take(), 0);
    }
}
