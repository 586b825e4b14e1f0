//! What is typed: read from a descriptor, handed to the UART as it has room.
//!
//! Bytes that the UART does not take stay here, at most a FIFO full, and the
//! descriptor is not read until they are gone: the rest waits in the pipe or
//! terminal. The UART wakes the event loop when the guest has made room.
//!
//! epoll refuses what is always readable, such as files and /dev/null. Those are
//! read when there is nothing left to hand over, so the guest's own reading paces
//! them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use event_manager::{Error, EventOps, EventSet, Events};
use tracing::warn;

use crate::platform::serial::SerialPort;

/// Most bytes that are read at a time: one more than the UART's FIFO holds, so that what is always readable
/// cannot keep the event loop reading, however fast the guest is.
const READ_AHEAD: usize = 65;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Readiness {
    /// epoll watches the descriptor.
    Watched,
    /// epoll could, but the UART is full.
    Paused,
    /// Always readable: epoll refuses the descriptor.
    Always,
}

/// Where input comes from.
pub struct Source {
    /// None after its end.
    file: Option<File>,
    readiness: Readiness,
    token: u32,
    bytes: [u8; READ_AHEAD],
    /// The part of `bytes` that the UART has not taken.
    start: usize,
    end: usize,
}

impl Source {
    /// Reads `descriptor`, if there is one; events come with `token`.
    pub fn new(descriptor: Option<OwnedFd>, token: u32) -> Self {
        let file = descriptor.map(File::from);
        Self { file, readiness: Readiness::Paused, token, bytes: [0; READ_AHEAD], start: 0, end: 0 }
    }

    /// Hands over what waits, and goes on reading if that is everything.
    pub fn serve(&mut self, port: &SerialPort, ops: &mut EventOps) {
        while self.hand_over(port) {
            if self.readiness == Readiness::Paused {
                self.watch(port, ops);
            }
            if self.readiness != Readiness::Always || !self.read(port, ops) {
                return;
            }
        }
        self.pause(ops);
    }

    /// The descriptor is readable: reads it once.
    pub fn readable(&mut self, port: &SerialPort, ops: &mut EventOps) {
        if self.start == self.end && self.read(port, ops) {
            self.serve(port, ops);
        }
    }

    /// True if the UART took everything.
    fn hand_over(&mut self, port: &SerialPort) -> bool {
        let waiting = self.bytes.get(self.start..self.end).unwrap_or_default();
        if !waiting.is_empty() {
            self.start = self.start.saturating_add(port.receive(waiting));
        }
        self.start >= self.end
    }

    /// True if bytes were read.
    fn read(&mut self, port: &SerialPort, ops: &mut EventOps) -> bool {
        let Some(file) = &mut self.file else { return false };
        match file.read(&mut self.bytes) {
            Ok(0) => self.finish(ops),
            Ok(count) => {
                (self.start, self.end) = (0, count);
                return true;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                port.metrics().error_count.count();
                warn!(%error, "console input ends");
                self.finish(ops);
            }
        }
        false
    }

    fn events(&self) -> Option<Events> {
        self.file.as_ref().map(|file| Events::with_data(file, self.token, EventSet::IN))
    }

    fn watch(&mut self, port: &SerialPort, ops: &mut EventOps) {
        let Some(events) = self.events() else { return };
        match ops.add(events) {
            Ok(()) => self.readiness = Readiness::Watched,
            Err(Error::Epoll(errno)) if errno.errno() == libc::EPERM => self.readiness = Readiness::Always,
            Err(error) => {
                port.metrics().error_count.count();
                warn!(%error, "console input cannot be watched, and ends");
                self.file = None;
            }
        }
    }

    /// An ended pipe would report that without pause, so it is not enough to watch for nothing.
    fn pause(&mut self, ops: &mut EventOps) {
        if let (Readiness::Watched, Some(events)) = (self.readiness, self.events()) {
            // It is there: it was added.
            let _ = ops.remove(events);
            self.readiness = Readiness::Paused;
        }
    }

    fn finish(&mut self, ops: &mut EventOps) {
        self.pause(ops);
        self.file = None;
    }
}
