//! The run directory: an entry for each domain that `cofferdam run` has started, and for no other.
//!
//! ```text
//! RUN_DIR/            0700, ours
//!   .lock             held while entries are made, looked through or removed
//!   ID/
//!     lock            locked for as long as the command or the monitor lives
//!     api.sock        the monitor's API
//!     domain.json     process id and time of the start
//!     console.log …   see `kept`
//!   .ended/           see `record`
//! ```
//!
//! The command and the monitor share one open file description of `ID/lock`, so the kernel drops the lock with the
//! last of the two, however they end. An entry is live while its lock is held. The command removes its entry when
//! the monitor has ended. If the command was killed, the monitor does so at its end. If both were, what they left is removed by
//! the next command that looks, and shown by none.
//!
//! All that looks at locks or changes entries holds `.lock`, for microseconds. So of two starts with one id the
//! second finds the first one's lock, and nobody takes an entry that is being made for one that was left.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cofferdam_api::status::Outcome;
use cofferdam_api::validate::check_id;
use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, flock, fstat, mkdirat, openat, renameat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::record;

/// Names the run directory if `--run-dir` does not.
pub const VARIABLE: &str = "COFFERDAM_RUN_DIR";
const GATE: &str = ".lock";
const LOCK: &str = "lock";
const SOCKET: &str = "api.sock";
const FACTS: &str = "domain.json";
/// Largest `domain.json` that is read, bytes.
const MAX_FACTS: u64 = 4096;

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const FILE: OFlags = OFlags::RDWR.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why an entry, or the run directory, is not to be had.
#[derive(Debug, Error)]
pub enum RunDirError {
    /// The host refused something.
    #[error("run directory: cannot {what} {}: {error}; --run-dir DIR or {VARIABLE} names another", path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// It belongs to another user.
    #[error("run directory: {} belongs to user {owner}, not to {}", path.display(), geteuid().as_raw())]
    Owner {
        /// Its path.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Others may enter it, and whoever can reach an entry controls its domain.
    #[error("run directory: others may enter {0}: its mode is {mode:o}; chmod 700 {0}", path.display())]
    Mode {
        /// Its path.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A domain of that id runs.
    #[error("--id: a domain {id:?} is there already, in {}", path.display())]
    InUse {
        /// The id.
        id: String,
        /// The run directory.
        path: PathBuf,
    },
    /// No domain of that id runs.
    #[error(
        "there is no domain {id:?} in {}{}", path.display(),
        if others.is_empty() { ", and no other".to_owned() } else { format!("; there is {}", others.join(", ")) }
    )]
    NotFound {
        /// The id.
        id: String,
        /// The run directory.
        path: PathBuf,
        /// Those there are.
        others: Vec<String>,
    },
    /// It is no id.
    #[error("{0}")]
    BadId(String),
}

/// Where the run directory is: as `option` or the environment says; else root's is below /run, and that of others in
/// the directory that their login has made, or, without one, below /tmp.
pub fn locate(option: Option<&Path>) -> PathBuf {
    locate_with(option, |name| env::var_os(name), geteuid().as_raw())
}

fn locate_with(option: Option<&Path>, variable: impl Fn(&str) -> Option<OsString>, user: u32) -> PathBuf {
    let named = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = option.map(Path::to_owned).or_else(|| named(VARIABLE)) {
        return path;
    }
    if user == 0 {
        return "/run/cofferdam".into();
    }
    match named("XDG_RUNTIME_DIR").filter(|path| path.is_absolute()) {
        Some(path) => path.join("cofferdam"),
        None => format!("/tmp/cofferdam-{user}").into(),
    }
}

/// A run directory that is ours alone.
pub struct RunDir {
    path: PathBuf,
    dir: OwnedFd,
}

/// What is written down of a domain when its monitor is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Process id of the monitor.
    pub pid: u32,
    /// When it was started, microseconds of CLOCK_BOOTTIME.
    pub start_us: u64,
}

impl Facts {
    /// Those of a monitor that is started now.
    pub fn now(pid: u32) -> Self {
        Self { pid, start_us: boot_time_us() }
    }

    /// Time since the start, microseconds.
    pub fn uptime_us(&self) -> u64 {
        boot_time_us().saturating_sub(self.start_us)
    }
}

fn boot_time_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let micros = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
    u64::try_from(micros).unwrap_or(0)
}

/// The entry of a domain, whoever started it.
pub struct Entry {
    /// Name of the domain.
    pub id: String,
    /// The entry's directory.
    pub dir: OwnedFd,
}

impl Entry {
    /// The monitor's socket, by a path of this process that is short however long that of the run directory is.
    pub fn socket(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{SOCKET}", self.dir.as_raw_fd()).into()
    }

    /// What is written down; nothing in the first moment.
    pub fn facts(&self) -> Option<Facts> {
        let file = openat(&self.dir, FACTS, FILE.difference(OFlags::RDWR), Mode::empty()).ok()?;
        let mut text = Vec::new();
        File::from(file).take(MAX_FACTS).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn open(run_dir: &OwnedFd, id: &str) -> Result<Self, Errno> {
        let dir = openat(run_dir, id, DIRECTORY, Mode::empty())?;
        Ok(Self { id: id.to_owned(), dir })
    }

    /// Whether its lock is held. Without a lock it was never finished.
    fn is_live(&self) -> Result<bool, Errno> {
        let lock = match openat(&self.dir, LOCK, FILE, Mode::empty()) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Removes it from `run_dir`. Nothing in an entry is a directory.
    fn remove(&self, run_dir: &OwnedFd) -> Result<(), Errno> {
        for file in Dir::read_from(&self.dir)? {
            let file = file?;
            if !matches!(file.file_name().to_bytes(), b"." | b"..") {
                unless_gone(unlinkat(&self.dir, file.file_name(), AtFlags::empty()))?;
            }
        }
        unless_gone(unlinkat(run_dir, &self.id, AtFlags::REMOVEDIR))
    }
}

fn unless_gone(result: Result<(), Errno>) -> Result<(), Errno> {
    if result == Err(Errno::NOENT) { Ok(()) } else { result }
}

/// The entry of a domain of this process. Dropping it removes it.
pub struct OwnEntry {
    entry: Entry,
    run_dir: RunDir,
    lock: OwnedFd,
}

impl OwnEntry {
    /// The entry.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Makes the socket of the monitor's API. Connections that come before the monitor serves wait for it.
    pub fn listen(&self) -> Result<UnixListener, RunDirError> {
        UnixListener::bind(self.entry.socket())
            .map_err(|error| self.run_dir.failed("make", &format!("{}/{SOCKET}", self.entry.id), error))
    }

    /// Removes it, and keeps for a while how the domain ended.
    pub fn end(self, outcome: &Outcome) {
        // Before it goes, so that who waits for that finds the record. Without one less can be told.
        let _ = record::keep(&self.run_dir.dir, &self.entry.id, outcome);
    }

    /// Removes what others have left in the run directory.
    pub fn sweep(&self) {
        // What cannot be looked at now, the next command looks at.
        let _ = self.run_dir.live();
    }

    /// Writes down what is known of the monitor, and forgets how an earlier domain of the id ended.
    pub fn begin(&self, facts: Facts) -> io::Result<()> {
        const NEW: &str = "domain.json.new";
        record::forget(&self.run_dir.dir, &self.entry.id);
        let dir = &self.entry.dir;
        let file = openat(dir, NEW, FILE | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR)?;
        File::from(file).write_all(&serde_json::to_vec(&facts)?)?;
        Ok(renameat(dir, NEW, dir, FACTS)?)
    }
}

/// The lock, for the monitor to inherit.
impl AsFd for OwnEntry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Drop for OwnEntry {
    fn drop(&mut self) {
        // What cannot be removed now, the next command removes.
        if let Ok(_gate) = self.run_dir.gate() {
            let _ = self.entry.remove(&self.run_dir.dir);
        }
    }
}

/// While it is there, nobody else looks at locks or changes entries.
struct Gate {
    _file: OwnedFd,
}

impl RunDir {
    /// Opens the run directory at `path`, and makes it if it is missing.
    pub fn open_or_make(path: &Path) -> Result<Self, RunDirError> {
        if let Some(run_dir) = Self::open(path)? {
            return Ok(run_dir);
        }
        let host =
            |what, error: Errno| RunDirError::Host { what, path: path.to_owned(), error: error.into() };
        match mkdirat(CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(host("make", error)),
        }
        Self::open(path)?.ok_or_else(|| host("open", Errno::NOENT))
    }

    /// Opens the run directory at `path`, if there is one.
    pub fn open(path: &Path) -> Result<Option<Self>, RunDirError> {
        let host =
            |what, error: Errno| RunDirError::Host { what, path: path.to_owned(), error: error.into() };
        let dir = match openat(CWD, path, DIRECTORY, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(host("open", error)),
        };
        let stat = fstat(&dir).map_err(|error| host("look at", error))?;
        if stat.st_uid != geteuid().as_raw() {
            return Err(RunDirError::Owner { path: path.to_owned(), owner: stat.st_uid });
        }
        let mode = stat.st_mode & 0o7777;
        if mode & 0o077 != 0 {
            return Err(RunDirError::Mode { path: path.to_owned(), mode });
        }
        Ok(Some(Self { path: path.to_owned(), dir }))
    }

    /// Makes the entry of domain `id`, in place of one that was left, unless there is a live one.
    pub fn make_entry(self, id: &str) -> Result<OwnEntry, RunDirError> {
        checked("--id", id)?;
        let gate = self.gate()?;
        let make = || mkdirat(&self.dir, id, Mode::RWXU);
        let mut made = make();
        if made == Err(Errno::EXIST) {
            let old = Entry::open(&self.dir, id).map_err(|error| self.failed("open", id, error))?;
            if old.is_live().map_err(|error| self.failed("look at", id, error))? {
                return Err(RunDirError::InUse { id: id.to_owned(), path: self.path });
            }
            old.remove(&self.dir).map_err(|error| self.failed("remove", id, error))?;
            made = make();
        }
        made.map_err(|error| self.failed("make", id, error))?;
        let entry = Entry::open(&self.dir, id).map_err(|error| self.failed("open", id, error))?;
        let lock = openat(&entry.dir, LOCK, FILE | OFlags::CREATE, Mode::RUSR | Mode::WUSR)
            .and_then(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).map(|()| lock))
            .map_err(|error| self.failed("lock", id, error))?;
        drop(gate);
        Ok(OwnEntry { entry, run_dir: self, lock })
    }

    /// The entries of domains that live, by their ids. Those that were left behind are removed.
    pub fn live(&self) -> Result<Vec<Entry>, RunDirError> {
        let _gate = self.gate()?;
        let mut live = Vec::new();
        let names = Dir::read_from(&self.dir).map_err(|error| self.failed("read", "", error))?;
        for name in names {
            let name = name.map_err(|error| self.failed("read", "", error))?;
            // Whatever else somebody has put there is not ours to touch.
            let Ok(id) = name.file_name().to_str() else { continue };
            if check_id("", id).is_err() {
                continue;
            }
            let entry = match Entry::open(&self.dir, id) {
                Ok(entry) => entry,
                Err(Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(self.failed("open", id, error)),
            };
            match entry.is_live() {
                Ok(true) => live.push(entry),
                // One that cannot be removed is not shown, and the next command tries again.
                Ok(false) => {
                    let _ = entry.remove(&self.dir);
                }
                Err(error) => return Err(self.failed("look at", id, error)),
            }
        }
        live.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(live)
    }

    /// The live entry of domain `id` in the run directory at `path`.
    pub fn find(path: &Path, id: &str) -> Result<(Self, Entry), RunDirError> {
        checked("ID", id)?;
        let not_found = |others| RunDirError::NotFound { id: id.to_owned(), path: path.to_owned(), others };
        let Some(run_dir) = Self::open(path)? else { return Err(not_found(Vec::new())) };
        let (mut wanted, others): (Vec<Entry>, Vec<Entry>) =
            run_dir.live()?.into_iter().partition(|entry| entry.id == id);
        match wanted.pop() {
            Some(entry) => Ok((run_dir, entry)),
            None => Err(not_found(others.into_iter().map(|entry| entry.id).collect())),
        }
    }

    /// How domain `id` of the run directory at `path` ended, if that is kept.
    pub fn record(path: &Path, id: &str) -> Option<Outcome> {
        record::read(&Self::open(path).ok()??.dir, id)
    }

    /// Whether the domain of `entry` still lives.
    pub fn is_live(&self, entry: &Entry) -> Result<bool, RunDirError> {
        let _gate = self.gate()?;
        entry.is_live().map_err(|error| self.failed("look at", &entry.id, error))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn gate(&self) -> Result<Gate, RunDirError> {
        let file = openat(&self.dir, GATE, FILE | OFlags::CREATE, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.failed("open", GATE, error))?;
        retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|error| self.failed("lock", GATE, error))?;
        Ok(Gate { _file: file })
    }

    fn failed(&self, what: &'static str, name: &str, error: impl Into<io::Error>) -> RunDirError {
        RunDirError::Host { what, path: self.path.join(name), error: error.into() }
    }
}

fn checked(field: &str, id: &str) -> Result<(), RunDirError> {
    check_id(field, id).map_err(|error| RunDirError::BadId(error.to_string()))
}

#[cfg(test)]
mod tests;
