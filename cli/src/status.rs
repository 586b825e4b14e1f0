//! The monitor's report: one JSON [`Event`] per line, read from a pipe without
//! waiting and without trust in its length or form.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cofferdam_api::status::Event;
use rustix::io::Errno;

/// Longest line that is read, bytes.
const MAX_LINE: usize = 64 * 1024;

/// The reading end of the report.
pub struct StatusReader {
    pipe: OwnedFd,
    line: Vec<u8>,
    /// The rest of an overlong line is being skipped.
    skipping: bool,
    open: bool,
    fault: Option<String>,
}

impl StatusReader {
    /// Reads from `pipe`, which must not block.
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe, line: Vec::new(), skipping: false, open: true, fault: None }
    }

    /// Whether more can come.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// What was wrong with the first line that could not be understood.
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Reads what is there, and hands over each event.
    pub fn read(&mut self, mut event: impl FnMut(Event)) {
        let mut bytes = [0; 4096];
        while self.open {
            match rustix::io::read(&self.pipe, &mut bytes) {
                Ok(0) => self.open = false,
                Ok(count) => self.take(bytes.get(..count).unwrap_or_default(), &mut event),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.open = false,
            }
        }
    }

    fn take(&mut self, bytes: &[u8], event: &mut impl FnMut(Event)) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, ends) = match part.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (part, false),
            };
            if !self.skipping && self.line.len().saturating_add(text.len()) <= MAX_LINE {
                self.line.extend_from_slice(text);
            } else {
                self.skipping = true;
                self.line.clear();
            }
            if ends {
                self.finish_line(event);
            }
        }
    }

    fn finish_line(&mut self, event: &mut impl FnMut(Event)) {
        if self.skipping {
            self.note(format!("a line is longer than {MAX_LINE} bytes"));
        } else {
            match serde_json::from_slice(&self.line) {
                Ok(read) => event(read),
                Err(error) => self.note(error.to_string()),
            }
        }
        self.skipping = false;
        self.line.clear();
    }

    fn note(&mut self, fault: String) {
        self.fault.get_or_insert(fault);
    }
}

impl AsFd for StatusReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_api::status::Platform;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::time::{Duration, Instant};

    const RUNNING: &[u8] = br#"{"event":"running","platform":"plain","protected":false}"#;

    fn reader() -> (StatusReader, OwnedFd) {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (StatusReader::new(read_end), write_end)
    }

    fn read(reader: &mut StatusReader) -> Vec<Event> {
        let mut events = Vec::new();
        reader.read(|event| events.push(event));
        events
    }

    #[test]
    fn lines_in_pieces() {
        let (mut reader, pipe) = reader();
        let running = Event::Running { platform: Platform::Plain, protected: false };
        rustix::io::write(&pipe, &RUNNING[..10]).unwrap();
        assert_eq!(read(&mut reader), []);
        rustix::io::write(&pipe, &RUNNING[10..]).unwrap();
        rustix::io::write(&pipe, b"\n").unwrap();
        rustix::io::write(&pipe, RUNNING).unwrap();
        assert_eq!(read(&mut reader), [running]);
        assert!(reader.is_open() && reader.fault().is_none());
        drop(pipe);
        // A child that another test has just forked may hold the pipe until it executes its program.
        let end = Instant::now() + Duration::from_secs(240);
        while reader.is_open() {
            assert!(Instant::now() < end, "the pipe is still open");
            assert_eq!(read(&mut reader), []);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn garbage_is_noted_and_passed_over() {
        let (mut reader, pipe) = reader();
        rustix::io::write(&pipe, b"{\"event\":\"new\"}\n\xff\n").unwrap();
        rustix::io::write(&pipe, RUNNING).unwrap();
        rustix::io::write(&pipe, b"\n").unwrap();
        assert_eq!(read(&mut reader).len(), 1);
        assert!(reader.fault().is_some_and(|fault| fault.contains("new")), "{:?}", reader.fault());
    }

    #[test]
    fn an_endless_line_takes_no_memory() {
        let (mut reader, pipe) = reader();
        for _ in 0..40 {
            rustix::io::write(&pipe, &[b'x'; 4096]).unwrap();
            assert_eq!(read(&mut reader), []);
            assert!(reader.line.capacity() <= 2 * MAX_LINE);
        }
        rustix::io::write(&pipe, b"\n").unwrap();
        rustix::io::write(&pipe, RUNNING).unwrap();
        rustix::io::write(&pipe, b"\n").unwrap();
        assert_eq!(read(&mut reader).len(), 1);
        assert_eq!(reader.fault(), Some("a line is longer than 65536 bytes"));
    }
}
