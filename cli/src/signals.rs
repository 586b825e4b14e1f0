//! Signals as bytes of a pipe, so that one `poll` waits for them with
//! everything else.
//!
//! A handler and not a signalfd: blocked signals stay blocked across exec, and
//! the monitor must not be born deaf; handlers go back to their default there.
#![allow(unsafe_code)] // sigaction has no safe form

use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};

/// The signals that ask for an end.
pub const ENDS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Where the handler writes; -1 as long as there is no pipe.
static WRITE_END: AtomicI32 = AtomicI32::new(-1);

/// The pipe. It is made once and lives as long as the process.
pub struct Signals {
    read_end: OwnedFd,
}

impl Signals {
    /// Begins to catch `signals`. One that the parent process had set to be
    /// ignored (nohup(1) does that) stays ignored.
    pub fn catch(signals: &[libc::c_int]) -> io::Result<Self> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The descriptor stays open for good: a handler may run at any time.
        WRITE_END.store(write_end.into_raw_fd(), Ordering::SeqCst);
        for &signal in signals {
            catch_one(signal)?;
        }
        Ok(Self { read_end })
    }

    /// Signals of which none ever comes, for tests that share a process.
    #[cfg(test)]
    pub fn none() -> (Self, OwnedFd) {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (Self { read_end }, write_end)
    }

    /// The signals that have come since the last call.
    pub fn take(&self) -> Vec<libc::c_int> {
        let mut bytes = [0; 64];
        let count = rustix::io::read(&self.read_end, &mut bytes).unwrap_or(0);
        bytes.iter().take(count).map(|&signal| signal.into()).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read_end.as_fd()
    }
}

/// Makes a file that may not grow (`RLIMIT_FSIZE`) an error of the write instead of this process's end; that
/// console output to a pipe without a reader is one, Rust has seen to.
pub fn ignore_limits() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn catch_one(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a sigaction of zeros is a valid one (default action, empty mask).
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action this only writes the current one to `old`.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &mut old) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if old.sa_sigaction == libc::SIG_IGN {
        return Ok(());
    }
    // SAFETY: as above. No SA_RESTART: a blocking write to a stuck terminal must end too.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `new` is valid, and the handler makes async-signal-safe calls only.
    if unsafe { libc::sigaction(signal, &new, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn handler(signal: libc::c_int) {
    // SAFETY: errno is this thread's own, and write(2) is async-signal-safe. The
    // descriptor is never closed; if the pipe is full, enough signals are in it.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        libc::write(WRITE_END.load(Ordering::SeqCst), [signal as u8].as_ptr().cast(), 1);
        *errno = saved;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_becomes_a_byte() {
        for signal in ENDS {
            // Ignored ones stay ignored, and a shell's background job is born with some.
            // SAFETY: the default action installs no handler.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let signals = Signals::catch(&ENDS).unwrap();
        assert!(signals.take().is_empty());
        for signal in ENDS {
            // SAFETY: raises a signal that is caught.
            assert_eq!(unsafe { libc::raise(signal) }, 0);
        }
        assert_eq!(signals.take(), ENDS);
        assert!(signals.take().is_empty());
    }
}
