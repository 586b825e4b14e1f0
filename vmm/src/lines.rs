//! Whole lines to a file, a pipe or a terminal that may be full or without a reader, without ever waiting.
//!
//! A line that does not fit is dropped whole. Of one that fits in part the rest is kept, and written before
//! anything else: so whoever reads finds whole lines.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use cofferdam_api::source::Source;
use cofferdam_devices::sink::Sink;

use crate::descriptor;

/// Where lines go.
pub struct Lines {
    sink: Sink,
    /// What is left of the last line.
    rest: Vec<u8>,
}

impl Lines {
    /// To `source`: a file that is created or appended to, a named pipe with or without a reader, or an inherited
    /// descriptor.
    pub fn open(source: &Source) -> io::Result<Self> {
        let sink = match source {
            // Reading too, as Firecracker does: so a named pipe keeps what it has room for until there is a reader.
            Source::Path(path) => Sink::own(
                OpenOptions::new()
                    .read(true)
                    .append(true)
                    .create(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)?,
            ),
            Source::Descriptor(_) => Sink::new(descriptor::append(source)?.into()),
        };
        Ok(Self { sink, rest: Vec::new() })
    }

    /// To `descriptor`, which may be shared with other processes.
    pub fn shared(descriptor: OwnedFd) -> Self {
        Self { sink: Sink::new(descriptor), rest: Vec::new() }
    }

    /// Where they are written.
    pub fn descriptor(&self) -> RawFd {
        self.sink.as_raw_fd()
    }

    /// Writes `line`, with the newline at its end. On an error nothing of it is written.
    pub fn write(&mut self, line: &[u8]) -> io::Result<()> {
        self.write_rest(Duration::ZERO)?;
        self.rest.extend_from_slice(line);
        let result = self.write_rest(Duration::ZERO);
        if self.rest.len() == line.len() {
            self.rest.clear();
            return result;
        }
        Ok(())
    }

    /// Writes what is left of the last line, if that is possible within `patience`.
    pub fn finish(&mut self, patience: Duration) {
        // Whoever does not read it now never will.
        let _ = self.write_rest(patience);
    }

    /// `WouldBlock`, if not all is written.
    fn write_rest(&mut self, patience: Duration) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.sink.write(&self.rest, patience)? {
                0 => return Err(io::ErrorKind::WouldBlock.into()),
                written => drop(self.rest.drain(..written.min(self.rest.len()))),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use rustix::fs::{Mode, OFlags, fcntl_setfl, mkfifoat, open};

    use super::*;

    fn line(number: usize, length: usize) -> Vec<u8> {
        let mut line = format!("{number}:").into_bytes();
        line.resize(length, b'.');
        line.push(b'\n');
        line
    }

    #[test]
    fn a_full_pipe_loses_whole_lines_and_goes_on_when_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let mut lines = Lines::open(&Source::Path(path.clone())).unwrap();
        // Lines longer than what a pipe takes at once, and no divisor of its size.
        let fitting = (0..1000).take_while(|&number| lines.write(&line(number, 9999)).is_ok()).count();
        assert!((1..100).contains(&fitting), "{fitting}");
        assert_eq!(lines.write(b"lost\n").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let reader = open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let mut reader = File::from(reader);
        let mut text = vec![0; 40_000];
        let mut seen = Vec::new();
        let mut read = |seen: &mut Vec<u8>| {
            while let Ok(count) = reader.read(&mut text) {
                seen.extend_from_slice(&text[..count]);
            }
        };
        read(&mut seen);
        lines.write(b"found\n").unwrap();
        read(&mut seen);
        let seen = String::from_utf8(seen).unwrap();
        let mut expected: Vec<u8> = (0..fitting).flat_map(|number| line(number, 9999)).collect();
        expected.extend_from_slice(b"found\n");
        assert!(seen.as_bytes() == expected, "{} of {} bytes", seen.len(), expected.len());
    }

    #[test]
    fn a_full_disk_is_an_error_of_each_line() {
        let mut lines = Lines::open(&Source::Path("/dev/full".into())).unwrap();
        for _ in 0..3 {
            assert_eq!(lines.write(b"x\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
        assert!(lines.rest.is_empty());
    }

    #[test]
    fn a_reader_that_went_away_is_an_error() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut lines = Lines::shared(writer);
        lines.write(b"x\n").unwrap();
        drop(reader);
        assert_eq!(lines.write(b"x\n").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn files_are_created_and_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for _ in 0..2 {
            Lines::open(&Source::Path(path.clone())).unwrap().write(b"x\n").unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"x\nx\n");
        let none = Source::Path(directory.path().join("no/log"));
        assert_eq!(Lines::open(&none).err().unwrap().kind(), io::ErrorKind::NotFound);
        assert!(Lines::open(&Source::Path(directory.path().into())).is_err());
    }

    #[test]
    fn the_end_of_a_line_is_waited_for_at_the_end() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut lines = Lines::shared(writer);
        let mut count = 0;
        while lines.write(&line(count, 9999)).is_ok() {
            count += 1;
        }
        assert!(!lines.rest.is_empty());
        let thread = std::thread::spawn(move || {
            let mut text = Vec::new();
            File::from(reader).read_to_end(&mut text).map(|_| text)
        });
        lines.finish(Duration::from_secs(60));
        drop(lines);
        let text = thread.join().unwrap().unwrap();
        assert_eq!(text.len(), count * 10_000);
    }

    #[test]
    fn what_is_shared_stays_as_it_was() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let observer = writer.try_clone().unwrap();
        fcntl_setfl(&observer, OFlags::empty()).unwrap();
        let _lines = Lines::shared(writer);
        assert!(!rustix::fs::fcntl_getfl(&observer).unwrap().contains(OFlags::NONBLOCK));
    }
}
