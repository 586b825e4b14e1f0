//! A descriptor that the console, the log or the metrics go to, written without ever blocking.
//!
//! It may be anything that a shell or a service manager left on standard output,
//! and its file description may be shared with other processes, so O_NONBLOCK
//! must not be set on it. A pipe or terminal is opened anew through /proc, which
//! gives a description of our own to set it on. Where that is not possible (no
//! /proc, or not our terminal), and for sockets and files, each write follows a
//! poll and is no larger than what a pipe takes at once when poll calls it
//! writable.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::termios::isatty;

/// Largest single write, bytes: `PIPE_BUF` of Linux (pipe(7)).
pub const CHUNK: usize = 4096;

/// Where output goes.
pub struct Sink {
    file: File,
}

impl Sink {
    /// Writes to `descriptor`, which may be shared with other processes.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self { file: private_description(&descriptor).unwrap_or(descriptor).into() }
    }

    /// Writes to `file`, which this process has opened itself, with `O_NONBLOCK`.
    pub fn own(file: File) -> Self {
        Self { file }
    }

    /// Writes some of the first [`CHUNK`] bytes of `bytes` if that is possible within `patience`, and says how
    /// many; 0 if it is not.
    pub fn write(&self, bytes: &[u8], patience: Duration) -> io::Result<usize> {
        let mut descriptors = [PollFd::new(&self.file, PollFlags::OUT)];
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        let written = match poll(&mut descriptors, Some(&patience)) {
            Ok(0) => return Ok(0),
            Ok(_) => (&self.file).write(bytes.get(..CHUNK).unwrap_or(bytes)),
            Err(error) => Err(error.into()),
        };
        match written {
            Ok(0) if !bytes.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(0)
            }
            written => written,
        }
    }
}

impl AsRawFd for Sink {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn private_description(descriptor: &OwnedFd) -> Option<OwnedFd> {
    let kind = FileType::from_raw_mode(fstat(descriptor).ok()?.st_mode);
    if kind != FileType::Fifo && !isatty(descriptor) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_full_pipe_takes_nothing_and_keeps_its_flags() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let observer = writer.try_clone().unwrap();
        let sink = Sink::new(writer);
        assert!(fcntl_getfl(&sink.file).unwrap().contains(OFlags::NONBLOCK), "has a description of its own");
        let mut total = 0;
        loop {
            match sink.write(&[7; 2 * CHUNK], Duration::ZERO).unwrap() {
                0 => break,
                count => total += count,
            }
            assert!(total <= 1 << 24);
        }
        assert!(total >= CHUNK);
        assert!(!fcntl_getfl(&observer).unwrap().contains(OFlags::NONBLOCK));
        drop((reader, observer));
        assert_eq!(sink.write(b"x", Duration::ZERO).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn sockets_are_polled_first() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sink = Sink::new(ours.into());
        let mut writes = 0;
        while sink.write(&[7; CHUNK], Duration::ZERO).unwrap() > 0 {
            writes += 1;
            assert!(writes < 10_000);
        }
        drop(theirs);
        sink.write(b"x", Duration::ZERO).unwrap_err();
    }

    #[test]
    fn a_full_device_is_an_error() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = Sink::new(full.into()).write(b"x", Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
