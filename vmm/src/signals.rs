//! Signals as events: the ones that stop a domain are read from a descriptor.
#![allow(unsafe_code)] // signalfd has no safe wrapper in the crates we use

use std::fs::File;
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// What asks for an orderly stop.
const STOP_SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Arrivals of the stop signals.
pub struct StopSignals(File);

impl StopSignals {
    /// Blocks the stop signals on this thread, and so on all that it starts, and ignores `SIGPIPE`: a reader
    /// that went away is an error of the write. To be called before the first thread is started.
    pub fn new() -> io::Result<Self> {
        for signal in STOP_SIGNALS {
            block_signal(signal).map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let set = create_sigset(&STOP_SIGNALS)?;
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
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
        let mut arrived = 0;
        while (&self.0).read(&mut buffer).is_ok_and(|length| length == buffer.len()) {
            arrived += 1;
        }
        arrived
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
