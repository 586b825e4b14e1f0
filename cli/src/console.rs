//! The two directions of a console: what is typed on a terminal, and what is shown and kept.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, read, write};
use rustix::stdio::{stderr, stdout};

use crate::kept::LogWriter;
use crate::terminal::Escape;

/// Most that is kept of what is typed faster than the guest reads, bytes. What
/// comes beyond that is lost, as on any serial line; the escape key never is.
const MAX_TYPED: usize = 256 * 1024;

/// Standard input, a terminal, to the monitor.
pub struct Keyboard {
    escape: Escape,
    typed: VecDeque<u8>,
    /// Towards the monitor; `None` when it takes no more.
    pipe: Option<OwnedFd>,
    at_end: bool,
}

impl Keyboard {
    /// Writes to `pipe`, which must not block.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { escape: Escape::default(), typed: VecDeque::new(), pipe: Some(pipe), at_end: false }
    }

    /// Whether more can be typed. It is read even if the guest does not
    /// listen, because the escape key must work then too.
    pub fn listens(&self) -> bool {
        !self.at_end
    }

    /// The pipe, while something waits to be written to it.
    pub fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        if self.typed.is_empty() { None } else { self.pipe.as_ref().map(AsFd::as_fd) }
    }

    /// Takes what was typed; true if it asks for a stop.
    pub fn read(&mut self) -> bool {
        let mut bytes = [0; 1024];
        match read(io::stdin(), &mut bytes) {
            Ok(0) => self.end(),
            Ok(count) => {
                let typed = &mut self.typed;
                return self.escape.filter(bytes.get(..count).unwrap_or_default(), |byte| {
                    if typed.len() < MAX_TYPED {
                        typed.push_back(byte);
                    }
                });
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // The terminal is gone.
            Err(_) => self.end(),
        }
        false
    }

    /// Hands on what the monitor takes.
    pub fn write(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        match write(pipe, self.typed.as_slices().0) {
            Ok(count) => drop(self.typed.drain(..count)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.pipe = None;
                self.typed.clear();
            }
        }
        self.close_when_done();
    }

    fn end(&mut self) {
        self.at_end = true;
        self.close_when_done();
    }

    fn close_when_done(&mut self) {
        if self.at_end && self.typed.is_empty() {
            self.pipe = None;
        }
    }
}

/// Where output is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Our standard output.
    Stdout,
    /// Our standard error.
    Stderr,
}

impl Target {
    fn fd(self) -> BorrowedFd<'static> {
        match self {
            Self::Stdout => stdout(),
            Self::Stderr => stderr(),
        }
    }
}

/// Output of a domain to ours, byte for byte, and to a log.
pub struct Screen {
    /// Where it comes from; `None` at its end.
    pipe: Option<OwnedFd>,
    log: Option<LogWriter>,
    /// Who takes it; what nobody takes is dropped.
    target: Option<Target>,
    bytes: Vec<u8>,
    shown: usize,
    /// Bytes that the target did not take, once it has failed.
    lost: Option<usize>,
    last: Option<u8>,
}

/// Most that is taken from the monitor at once, bytes.
const CHUNK: usize = 16 * 1024;
/// Most that is written at once, bytes: a pipe that polls as writable takes `PIPE_BUF` without blocking.
const PIECE: usize = 4096;
/// Most that is taken from a monitor that has ended, bytes; a pipe holds less, unless somebody made it larger.
const MAX_REST: usize = 1 << 20;

impl Screen {
    /// Reads from `pipe`, which must not block.
    pub fn new(pipe: Option<OwnedFd>, log: Option<LogWriter>, target: Option<Target>) -> Self {
        Self { pipe, log, target, bytes: Vec::new(), shown: 0, lost: None, last: None }
    }

    /// Reads from `pipe` from now on, which must not block.
    pub fn connect(&mut self, pipe: OwnedFd) {
        self.pipe = Some(pipe);
    }

    /// Takes no more, and forgets what waits to be shown.
    pub fn close(&mut self) {
        self.pipe = None;
        self.lose();
    }

    /// Where it is shown, while bytes wait for that.
    pub fn shows_on(&self) -> Option<BorrowedFd<'static>> {
        self.target.filter(|_| self.is_pending()).map(Target::fd)
    }

    /// Whether bytes wait to be shown.
    pub fn is_pending(&self) -> bool {
        self.shown < self.bytes.len()
    }

    /// The pipe, while it may have more and nothing waits to be shown.
    pub fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        if self.is_pending() { None } else { self.pipe.as_ref().map(AsFd::as_fd) }
    }

    /// Whether nothing more is to be shown.
    pub fn is_done(&self) -> bool {
        self.pipe.is_none() && !self.is_pending()
    }

    /// Whether the last byte shown leaves a line open.
    pub fn line_is_open(&self) -> bool {
        self.last.is_some_and(|byte| byte != b'\n')
    }

    /// Bytes that the target did not take, if it has failed.
    pub fn lost(&self) -> Option<usize> {
        self.lost
    }

    /// Takes what the monitor has written when all before it is shown.
    pub fn read(&mut self) -> io::Result<()> {
        self.bytes.clear();
        self.shown = 0;
        self.take().map(drop)
    }

    /// Takes all that a monitor which has ended has written.
    pub fn read_rest(&mut self) -> io::Result<()> {
        while self.bytes.len() < MAX_REST && self.take()? {}
        Ok(())
    }

    /// Adds what the monitor has written to that which waits to be shown, and to the log; false if there is nothing
    /// (any more). An error is one of the log, which gets nothing more then.
    fn take(&mut self) -> io::Result<bool> {
        let Some(pipe) = &self.pipe else { return Ok(false) };
        let start = self.bytes.len();
        self.bytes.resize(start.saturating_add(CHUNK), 0);
        let result = read(pipe, self.bytes.get_mut(start..).unwrap_or_default());
        self.bytes.truncate(start.saturating_add(result.unwrap_or(0)));
        match result {
            Ok(1..) => {}
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::AGAIN) => return Ok(false),
            Ok(0) | Err(_) => {
                self.pipe = None;
                return Ok(false);
            }
        }
        let taken = self.bytes.get(start..).unwrap_or_default();
        let kept = self.log.as_mut().map_or(Ok(()), |log| log.write(taken));
        if self.target.is_none() {
            self.lose();
        }
        kept.map(|()| true).inspect_err(|_| self.log = None)
    }

    /// Shows a piece. An error says why nobody takes it any more.
    pub fn write(&mut self) -> io::Result<()> {
        let Some(target) = self.target else { return Ok(()) };
        let pending = self.bytes.get(self.shown..).unwrap_or_default();
        let piece = pending.get(..PIECE).unwrap_or(pending);
        match write(target.fd(), piece) {
            Ok(count) => {
                self.shown = self.shown.saturating_add(count);
                self.last = self.shown.checked_sub(1).and_then(|at| self.bytes.get(at)).copied();
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => {
                self.target = None;
                self.lost = Some(0);
                self.lose();
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn lose(&mut self) {
        let pending = self.bytes.len().saturating_sub(self.shown);
        self.lost = self.lost.map(|lost| lost.saturating_add(pending));
        self.bytes.clear();
        self.shown = 0;
    }
}

/// What the monitor of a domain in the background has to say: its standard error, to a log.
pub struct Messages {
    /// From the monitor; `None` at its end.
    pipe: Option<OwnedFd>,
    log: Option<LogWriter>,
}

impl Messages {
    /// Reads from `pipe`, which must not block.
    pub fn new(pipe: OwnedFd, log: Option<LogWriter>) -> Self {
        Self { pipe: Some(pipe), log }
    }

    /// The pipe, while it may have more.
    pub fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what the monitor has written; false if there is nothing (any more). A log that cannot be written is nobody's
    /// end.
    pub fn read(&mut self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let mut bytes = [0; PIECE];
        match read(pipe, &mut bytes) {
            Ok(count @ 1..) => {
                self.keep(bytes.get(..count).unwrap_or_default());
                true
            }
            Err(Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Ok(0) | Err(_) => {
                self.pipe = None;
                false
            }
        }
    }

    /// Adds a line of our own.
    pub fn note(&mut self, line: &str) {
        self.keep(format!("{line}\n").as_bytes());
    }

    fn keep(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.log {
            let _ = log.write(bytes);
        }
    }
}
