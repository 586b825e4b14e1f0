//! What a domain has printed, kept in its entry of the run directory for `cofferdam logs`.
//!
//! A log is two files: when the newer one is full it becomes the older one, in place of that. So the newest
//! half of [`MAX_LOG`] is always there, and never more than the whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fstat, openat, renameat};
use rustix::io::Errno;

/// Most that is kept of one log, bytes. The run directory is in memory.
pub const MAX_LOG: u64 = 1 << 20;

/// Which log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// What the guest prints on its console.
    Console,
    /// Standard output of a container.
    Stdout,
    /// Standard error of a container.
    Stderr,
    /// What the monitor of a domain in the background has to say.
    Monitor,
}

impl Log {
    fn newer(self) -> &'static str {
        match self {
            Self::Console => "console.log",
            Self::Stdout => "stdout.log",
            Self::Stderr => "stderr.log",
            Self::Monitor => "monitor.log",
        }
    }

    fn older(self) -> &'static str {
        match self {
            Self::Console => "console.log.1",
            Self::Stdout => "stdout.log.1",
            Self::Stderr => "stderr.log.1",
            Self::Monitor => "monitor.log.1",
        }
    }
}

/// The writing side of a log.
pub struct LogWriter {
    entry: OwnedFd,
    log: Log,
    file: File,
    size: u64,
}

impl LogWriter {
    /// Makes `log` in the directory `entry`.
    pub fn new(entry: impl AsFd, log: Log) -> io::Result<Self> {
        let entry = entry.as_fd().try_clone_to_owned()?;
        let file = make(&entry, log)?;
        Ok(Self { entry, log, file, size: 0 })
    }

    /// Appends `bytes`, which are less than a half of [`MAX_LOG`].
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let size = self.size.saturating_add(bytes.len() as u64);
        if size > MAX_LOG / 2 {
            renameat(&self.entry, self.log.newer(), &self.entry, self.log.older())?;
            self.file = make(&self.entry, self.log)?;
            self.size = 0;
        }
        self.file.write_all(bytes)?;
        self.size = self.size.saturating_add(bytes.len() as u64);
        Ok(())
    }
}

fn make(entry: &OwnedFd, log: Log) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(entry, log.newer(), flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// The reading side of a log.
pub struct LogReader<'a> {
    entry: &'a OwnedFd,
    log: Log,
    /// What is read now, and what after it.
    file: File,
    next: Option<File>,
}

impl<'a> LogReader<'a> {
    /// Opens `log` of the directory `entry`; `None` if there is none.
    pub fn open(entry: &'a OwnedFd, log: Log) -> io::Result<Option<Self>> {
        // The newer one first: if it becomes the older one meanwhile, it is opened twice, which can be seen.
        let newer = open(entry, log.newer())?;
        let older = open(entry, log.older())?;
        Ok(match (older, newer) {
            (Some(older), Some(newer)) if !same(&older, &newer)? => {
                Some(Self { entry, log, file: older, next: Some(newer) })
            }
            (older, newer) => newer.or(older).map(|file| Self { entry, log, file, next: None }),
        })
    }

    /// Reads what there is; 0 if there is no more for now.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.file.read(bytes)?;
            if count > 0 {
                return Ok(count);
            }
            if let Some(next) = self.next.take() {
                self.file = next;
                continue;
            }
            match open(self.entry, self.log.newer())? {
                // It became the older one after it was read, but perhaps not after all of it was: once more.
                Some(newer) if !same(&newer, &self.file)? => self.next = Some(newer),
                _ => return Ok(0),
            }
        }
    }
}

fn open(entry: &OwnedFd, name: &str) -> io::Result<Option<File>> {
    match openat(entry, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (fstat(one)?, fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let dir = File::open(folder.path()).unwrap().into();
        (folder, dir)
    }

    fn rest(reader: &mut LogReader<'_>) -> Vec<u8> {
        let (mut all, mut bytes) = (Vec::new(), [0; 1000]);
        loop {
            match reader.read(&mut bytes).unwrap() {
                0 => return all,
                count => all.extend_from_slice(&bytes[..count]),
            }
        }
    }

    #[test]
    fn what_is_written_can_be_read_and_followed() {
        let (_folder, dir) = folder();
        assert!(LogReader::open(&dir, Log::Console).unwrap().is_none());
        let mut writer = LogWriter::new(&dir, Log::Console).unwrap();
        let mut reader = LogReader::open(&dir, Log::Console).unwrap().unwrap();
        assert_eq!(rest(&mut reader), b"");
        writer.write(b"one").unwrap();
        assert_eq!(rest(&mut reader), b"one");
        writer.write(b"two").unwrap();
        assert_eq!(rest(&mut reader), b"two");
        assert!(LogReader::open(&dir, Log::Monitor).unwrap().is_none());
    }

    #[test]
    fn a_log_has_an_end_and_keeps_the_newest() {
        let (folder, dir) = folder();
        let mut writer = LogWriter::new(&dir, Log::Monitor).unwrap();
        let mut follower = LogReader::open(&dir, Log::Monitor).unwrap().unwrap();
        let (mut written, mut followed) = (Vec::new(), Vec::new());
        for line in 0..40_000_u32 {
            let text = format!("line {line:05}, and some more text in it that fills the log\n");
            writer.write(text.as_bytes()).unwrap();
            written.extend_from_slice(text.as_bytes());
            if line % 100 == 0 {
                followed.extend(rest(&mut follower));
            }
        }
        followed.extend(rest(&mut follower));
        assert!(followed == written, "one who follows misses nothing");
        let sizes = ["monitor.log", "monitor.log.1"]
            .map(|name| std::fs::metadata(folder.path().join(name)).unwrap().len());
        assert!(sizes.iter().sum::<u64>() <= MAX_LOG);
        let kept = rest(&mut LogReader::open(&dir, Log::Monitor).unwrap().unwrap());
        assert!(kept.len() as u64 >= MAX_LOG / 2);
        assert!(written.ends_with(&kept), "it is the newest, in order");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
