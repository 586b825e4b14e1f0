//! The two directions of a console that does not go straight from the monitor
//! to our own standard streams: what is typed on a terminal, and what is shown
//! where a line of JSON must follow it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, read, write};

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

/// The monitor's standard output to ours, byte for byte.
pub struct Screen {
    /// From the monitor; `None` at its end, or when nobody reads ours.
    pipe: Option<OwnedFd>,
    bytes: Vec<u8>,
    shown: usize,
    last: Option<u8>,
}

/// Most that is taken from the monitor at once, bytes.
const CHUNK: usize = 16 * 1024;
/// Most that is written at once, bytes: a pipe that polls as writable takes `PIPE_BUF` without blocking.
const PIECE: usize = 4096;

impl Screen {
    /// Reads from `pipe`, which must not block.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Some(pipe), bytes: Vec::with_capacity(CHUNK), shown: 0, last: None }
    }

    /// Whether bytes wait to be shown.
    pub fn is_pending(&self) -> bool {
        self.shown < self.bytes.len()
    }

    /// The pipe, while it may have more and nothing waits to be shown.
    pub fn waits_for(&self) -> Option<BorrowedFd<'_>> {
        if self.is_pending() { None } else { self.pipe.as_ref().map(AsFd::as_fd) }
    }

    /// Whether the last byte shown leaves a line open.
    pub fn line_is_open(&self) -> bool {
        self.last.is_some_and(|byte| byte != b'\n')
    }

    /// Takes what the monitor has written; false if there is nothing (any more).
    pub fn read(&mut self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        self.shown = 0;
        self.bytes.resize(CHUNK, 0);
        let result = read(pipe, &mut self.bytes);
        self.bytes.truncate(result.unwrap_or(0));
        match result {
            Ok(1..) | Err(Errno::INTR) => true,
            Err(Errno::AGAIN) => false,
            Ok(0) | Err(_) => {
                self.pipe = None;
                false
            }
        }
    }

    /// Shows a piece. If nobody reads our standard output the pipe is closed,
    /// and the monitor learns of it as if it had written there itself.
    pub fn write(&mut self) {
        let pending = self.bytes.get(self.shown..).unwrap_or_default();
        let piece = pending.get(..PIECE).unwrap_or(pending);
        match write(io::stdout(), piece) {
            Ok(count) => {
                self.shown = self.shown.saturating_add(count);
                self.last = self.shown.checked_sub(1).and_then(|at| self.bytes.get(at)).copied();
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.pipe = None;
                self.bytes.clear();
                self.shown = 0;
            }
        }
    }
}
