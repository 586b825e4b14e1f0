//! The domain's entry in a run directory, which the command line that started this monitor made and will remove, unless
//! it was killed. Then nobody but the monitor is left to do so.
//!
//! The entry's layout is the command line's (`cli/src/run_dir.rs`): a directory without directories, called as the domain,
//! beside a file `.lock` that is locked by whoever changes entries.

use std::fs::File;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use cofferdam_api::source::Source;
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock, openat, unlinkat};
use rustix::io::Errno;

use crate::descriptor;

const GATE: &str = "../.lock";
/// Others hold the lock for microseconds.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// An entry that is there.
pub struct RunEntry(File);

impl RunEntry {
    /// The directory that `source` names.
    pub fn open(source: &Source) -> io::Result<Self> {
        let directory = descriptor::open(source)?;
        if !directory.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self(directory))
    }

    /// Removes the entry of domain `id` and the files in it. The domain's name is free afterwards.
    pub fn remove(self, id: &str) -> io::Result<()> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let gate = openat(&self.0, GATE, flags, Mode::empty())?;
        lock(&gate)?;
        for file in Dir::read_from(&self.0)? {
            let file = file?;
            if !matches!(file.file_name().to_bytes(), b"." | b"..") {
                unlinkat(&self.0, file.file_name(), AtFlags::empty())?;
            }
        }
        Ok(unlinkat(&self.0, format!("../{id}"), AtFlags::REMOVEDIR)?)
    }
}

/// Locks the gate. Nobody may make the end of a domain wait.
fn lock(gate: &impl std::os::fd::AsFd) -> io::Result<()> {
    for _ in 0..TRIES {
        match flock(gate, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => sleep(PAUSE),
            other => return Ok(other?),
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn entry(run_dir: &Path, id: &str) -> RunEntry {
        let path = run_dir.join(id);
        fs::create_dir(&path).unwrap();
        fs::write(run_dir.join(".lock"), b"").unwrap();
        for name in ["lock", "api.sock", "domain.json"] {
            fs::write(path.join(name), b"x").unwrap();
        }
        RunEntry::open(&Source::Path(path)).unwrap()
    }

    #[test]
    fn an_entry_is_removed_and_others_are_not() {
        let run_dir = tempfile::tempdir().unwrap();
        let one = entry(run_dir.path(), "one");
        let _two = entry(run_dir.path(), "two");
        one.remove("one").unwrap();
        assert!(!run_dir.path().join("one").exists());
        assert_eq!(fs::read_dir(run_dir.path().join("two")).unwrap().count(), 3);
    }

    #[test]
    fn what_somebody_works_on_is_left_to_them() {
        let run_dir = tempfile::tempdir().unwrap();
        let one = entry(run_dir.path(), "one");
        let gate = File::open(run_dir.path().join(".lock")).unwrap();
        flock(&gate, FlockOperation::LockExclusive).unwrap();
        assert_eq!(one.remove("one").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(fs::read_dir(run_dir.path().join("one")).unwrap().count(), 3);
    }

    #[test]
    fn an_entry_is_a_directory() {
        let run_dir = tempfile::tempdir().unwrap();
        let file = run_dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        let error = RunEntry::open(&Source::Path(file)).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
