//! The directory of one jail, `BASE/PROGRAM/ID`: its making, its lock, its removal.
//!
//! Beside `root`, the jail's root directory, there is `jailer.lock`. Whoever holds its lock owns the jail, and
//! its content says what of `root` was there before, prepared by somebody else, and what cgroups there are.
//! So a lock file with a content that nobody has locked is what is left of a jail whose keeper was killed, and
//! the next owner starts by removing it. It is written before anything else of the jail is made.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, flock, fstat,
    ftruncate, mkdirat, open, openat, openat2, unlinkat,
};
use rustix::io::{Errno, pread, pwrite};
use rustix::process::Pid;

use crate::cgroup;

const LOCK: &str = "jailer.lock";
const ROOT: &str = "root";
/// Where Firecracker's clients have it make its sockets.
const RUN: &str = "run";
/// The lock of a jail that is being removed is free within this many tries, 10 ms apart.
const LOCK_TRIES: u32 = 200;

/// Why there is no directory for the jail, or why it is still there.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A call failed.
    #[error("directory: {call} {path}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Another jailer holds it.
    #[error("directory: {path} is in use: a domain of this id runs")]
    InUse {
        /// The jail's directory.
        path: PathBuf,
    },
    /// A part of the path is a symbolic link, or not a directory.
    #[error("directory: {path} leads through a symbolic link, which could lead out of the chroot base")]
    Link {
        /// The path.
        path: PathBuf,
    },
    /// A cgroup stays.
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
}

/// Where a jail lies.
#[derive(Clone, Debug)]
pub struct Place {
    /// `--chroot-base-dir`, absolute.
    pub base: PathBuf,
    /// Name of the program's file.
    pub program: OsString,
    /// Name of the domain.
    pub id: String,
}

impl Place {
    fn program_directory(&self) -> PathBuf {
        self.base.join(&self.program)
    }

    fn directory(&self) -> PathBuf {
        self.program_directory().join(&self.id)
    }

    /// The jail's root directory.
    pub fn root(&self) -> PathBuf {
        self.directory().join(ROOT)
    }

    /// Opens `path`, which is beneath the base, without following a link on the way from there.
    pub fn open(&self, path: &Path) -> Result<OwnedFd, DirectoryError> {
        let base = open(&self.base, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed("open", &self.base))?;
        let beneath = path.strip_prefix(&self.base).unwrap_or(path);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match openat2(&base, beneath, flags, Mode::empty(), resolve) {
            Err(Errno::LOOP | Errno::NOTDIR) => Err(DirectoryError::Link { path: path.to_owned() }),
            other => other.map_err(failed("open", path)),
        }
    }

    /// Gives the directory `path`, which is beneath the base, to `owner`. What is given is what was opened, without
    /// following a link, whatever has its name then.
    fn give(&self, path: &Path, (uid, gid): (Uid, Gid)) -> Result<(), DirectoryError> {
        fchown(self.open(path)?, Some(uid), Some(gid)).map_err(failed("chown", path))
    }
}

/// What was there before the jail, and what is to go with it.
#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// Names in `root` that are not ours; absent when `root` itself is ours.
    prepared: Option<Vec<OsString>>,
    cgroups: Vec<PathBuf>,
}

impl State {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = b"cofferdam-jailer\0".to_vec();
        let mut add = |tag: &[u8], name: &OsStr| bytes.extend([tag, name.as_bytes(), b"\0"].concat());
        if let Some(names) = &self.prepared {
            add(b"root", OsStr::new(""));
            names.iter().for_each(|name| add(b"keep ", name));
        }
        self.cgroups.iter().for_each(|path| add(b"cgroup ", path.as_os_str()));
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut state = Self::default();
        for entry in bytes.split(|byte| *byte == 0) {
            if entry == b"root" {
                state.prepared.get_or_insert_default();
            } else if let Some(name) = entry.strip_prefix(b"keep ") {
                state.prepared.get_or_insert_default().push(OsString::from_vec(name.to_vec()));
            } else if let Some(path) = entry.strip_prefix(b"cgroup ") {
                state.cgroups.push(OsString::from_vec(path.to_vec()).into());
            }
        }
        state
    }
}

/// A jail's directory that is ours.
#[derive(Debug)]
pub struct Claim {
    place: Place,
    directory: OwnedFd,
    /// Held as long as this lives, also by copies of it in other processes.
    lock: OwnedFd,
    state: State,
}

impl Claim {
    /// Makes the jail's directory or takes over one that was prepared, and removes what is left of a jail
    /// there whose keeper was killed.
    pub fn new(place: &Place) -> Result<Self, DirectoryError> {
        fs::create_dir_all(&place.base).map_err(failed("mkdir", &place.base))?;
        let (directory, lock) = lock(place)?;
        let mut claim = Self { place: place.clone(), directory, lock, state: State::default() };
        let text = claim.read_lock_file()?;
        if text.is_empty() {
            claim.state.prepared = names_in(&place.root())?;
            if let Some(prepared) = &mut claim.state.prepared {
                prepared.retain(|name| *name != pid_file(place));
            }
        } else {
            claim.state = State::from_bytes(&text);
            claim.empty()?;
            claim.state.cgroups.clear();
        }
        Ok(claim)
    }

    /// Notes what there will be, and makes the root directory and `/run` in it, for `owner` if that is somebody else.
    pub fn furnish(
        &mut self,
        cgroups: Vec<PathBuf>,
        owner: Option<(Uid, Gid)>,
    ) -> Result<(), DirectoryError> {
        self.state.cgroups = cgroups;
        let path = self.place.directory().join(LOCK);
        ftruncate(&self.lock, 0).map_err(failed("truncate", &path))?;
        pwrite(&self.lock, &self.state.to_bytes(), 0).map_err(failed("write", &path))?;
        let root = self.place.root();
        match mkdirat(&self.directory, ROOT, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("mkdir", &root)(error)),
        }
        let opened = self.place.open(&root)?;
        fchmod(&opened, Mode::RWXU).map_err(failed("chmod", &root))?;
        if let Some((uid, gid)) = owner {
            fchown(&opened, Some(uid), Some(gid)).map_err(failed("chown", &root))?;
        }
        let run = root.join(RUN);
        match mkdirat(&opened, RUN, Mode::RWXU) {
            // Somebody has prepared it, or something else of this name, for the program or for nobody.
            Err(Errno::EXIST) => return Ok(()),
            other => other.map_err(failed("mkdir", &run))?,
        }
        // The root directory is theirs already, and what has this name now may be a link to something else.
        owner.map_or(Ok(()), |owner| self.place.give(&run, owner))
    }

    /// Writes the monitor's process id, as the host has it, to `PROGRAM.pid` in the root directory. The file is
    /// always a new one, so that a link that somebody put there leads nowhere.
    pub fn note_process(&self, pid: Pid) -> Result<(), DirectoryError> {
        let name = pid_file(&self.place);
        let path = self.place.root().join(&name);
        let root = self.place.open(&self.place.root())?;
        match unlinkat(&root, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(failed("unlink", &path)(error)),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = openat(&root, &name, flags, mode).map_err(failed("open", &path))?;
        let text = pid.as_raw_nonzero().to_string();
        pwrite(&file, text.as_bytes(), 0).map(drop).map_err(failed("write", &path))
    }

    /// Removes all that was made for the jail. Its processes are dead.
    pub fn release(self) -> Result<(), DirectoryError> {
        self.empty()?;
        let path = self.place.directory();
        unlinkat(&self.directory, LOCK, AtFlags::empty()).map_err(failed("unlink", &path.join(LOCK)))?;
        if self.state.prepared.is_none() {
            // Not empty when the next jail of this id has begun; then they are its own.
            remove_if_empty(&path)?;
            remove_if_empty(&self.place.program_directory())?;
        }
        Ok(())
    }

    /// Removes what is in the root directory, but for what was prepared, and the cgroups.
    fn empty(&self) -> Result<(), DirectoryError> {
        cgroup::remove(&self.state.cgroups)?;
        let root = self.place.root();
        let prepared = self.state.prepared.as_deref().unwrap_or_default();
        for name in names_in(&root)?.unwrap_or_default() {
            if !prepared.contains(&name) {
                remove_tree(&root.join(name))?;
            }
        }
        if self.state.prepared.is_none() { remove_if_empty(&root) } else { Ok(()) }
    }

    fn read_lock_file(&self) -> Result<Vec<u8>, DirectoryError> {
        let path = self.place.directory().join(LOCK);
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = pread(&self.lock, &mut buffer, text.len() as u64).map_err(failed("read", &path))?;
            match buffer.get(..length) {
                None | Some([]) => return Ok(text),
                Some(bytes) => text.extend_from_slice(bytes),
            }
        }
    }
}

/// Makes the jail's directory and locks it. Meanwhile the last jail of this id may be removing it, so that
/// each step may find nothing of the one before.
fn lock(place: &Place) -> Result<(OwnedFd, OwnedFd), DirectoryError> {
    let path = place.directory();
    for _ in 0..LOCK_TRIES {
        make_directory(&place.program_directory())?;
        match make_directory(&path).and_then(|()| try_lock(place)) {
            Ok(Some(locked)) => return Ok(locked),
            Ok(None) => thread::sleep(Duration::from_millis(10)),
            Err(DirectoryError::Call { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(DirectoryError::InUse { path })
}

/// `None` when somebody else has the lock, or had it and has removed its file.
fn try_lock(place: &Place) -> Result<Option<(OwnedFd, OwnedFd)>, DirectoryError> {
    let path = place.directory().join(LOCK);
    let directory = place.open(&place.directory())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&directory, LOCK, flags, Mode::RUSR | Mode::WUSR).map_err(failed("open", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        other => other.map_err(failed("flock", &path))?,
    }
    let links = fstat(&file).map_err(failed("stat", &path))?.st_nlink;
    Ok((links > 0).then_some((directory, file)))
}

fn pid_file(place: &Place) -> OsString {
    let mut name = place.program.clone();
    name.push(".pid");
    name
}

fn make_directory(path: &Path) -> Result<(), DirectoryError> {
    let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    match mkdirat(CWD, path, mode) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(failed("mkdir", path)(error)),
    }
}

/// The names in `directory`; `None` if it does not exist.
fn names_in(directory: &Path) -> Result<Option<Vec<OsString>>, DirectoryError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match open(directory, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(DirectoryError::Link { path: directory.to_owned() }),
        other => other.map_err(failed("open", directory))?,
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(&opened).map_err(failed("read", directory))? {
        let entry = entry.map_err(failed("read", directory))?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    Ok(Some(names))
}

/// Removes a file, or a directory with all that is in it. Links in it are removed, not followed.
fn remove_tree(path: &Path) -> Result<(), DirectoryError> {
    match fs::symlink_metadata(path)
        .and_then(|found| if found.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) })
    {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn remove_if_empty(path: &Path) -> Result<(), DirectoryError> {
    match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT | Errno::EXIST) => Ok(()),
        Err(error) => Err(failed("rmdir", path)(error)),
    }
}

fn failed<E: Into<io::Error>>(call: &'static str, path: &Path) -> impl FnOnce(E) -> DirectoryError {
    let path = path.to_owned();
    move |error| DirectoryError::Call { call, path, error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn place(base: &Path) -> Place {
        Place { base: base.to_owned(), program: "vmm".into(), id: "a".into() }
    }

    fn begin(place: &Place) -> Claim {
        let mut claim = Claim::new(place).unwrap();
        claim.furnish(Vec::new(), None).unwrap();
        claim
    }

    #[test]
    fn a_jail_leaves_nothing_and_keeps_what_was_prepared() {
        let base = tempfile::tempdir().unwrap();
        let place = place(base.path());
        let claim = begin(&place);
        fs::write(place.root().join("socket"), "").unwrap();
        claim.release().unwrap();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);

        fs::create_dir_all(place.root()).unwrap();
        fs::write(place.root().join("kernel"), "k").unwrap();
        let claim = begin(&place);
        fs::create_dir(place.root().join("new")).unwrap();
        fs::write(place.root().join("new/file"), "").unwrap();
        claim.release().unwrap();
        assert_eq!(names_in(&place.root()).unwrap().unwrap(), ["kernel"]);
        assert_eq!(names_in(&place.directory()).unwrap().unwrap(), ["root"]);
    }

    #[test]
    fn what_a_killed_keeper_left_is_removed_by_the_next() {
        let base = tempfile::tempdir().unwrap();
        let place = place(base.path());
        fs::create_dir_all(place.root()).unwrap();
        fs::write(place.root().join("kernel"), "k").unwrap();
        drop(begin(&place));
        fs::write(place.root().join("socket"), "").unwrap();
        symlink("/etc", place.root().join("link")).unwrap();
        let claim = begin(&place);
        let mut names = names_in(&place.root()).unwrap().unwrap();
        names.sort();
        assert_eq!(names, ["kernel", "run"]);
        claim.release().unwrap();
        assert_eq!(names_in(&place.root()).unwrap().unwrap(), ["kernel"]);
    }

    #[test]
    fn a_jail_in_use_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let place = place(base.path());
        let claim = begin(&place);
        assert!(matches!(Claim::new(&place), Err(DirectoryError::InUse { .. })));
        claim.release().unwrap();
    }

    #[test]
    fn links_on_the_way_are_refused_and_what_they_point_to_is_left_alone() {
        let base = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "").unwrap();
        let place = place(base.path());
        fs::create_dir(place.program_directory()).unwrap();
        symlink(outside.path(), place.directory()).unwrap();
        assert!(matches!(Claim::new(&place), Err(DirectoryError::Link { .. })));
        fs::remove_file(place.directory()).unwrap();
        fs::create_dir(place.directory()).unwrap();
        symlink(outside.path(), place.root()).unwrap();
        assert!(matches!(Claim::new(&place), Err(DirectoryError::Link { .. })));
        assert_eq!(names_in(outside.path()).unwrap().unwrap(), ["file"]);
    }

    /// Whoever has the root directory can put a link in place of `/run` between its making and its giving away.
    #[test]
    fn what_is_no_directory_any_more_is_not_given_away() {
        let base = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let place = place(base.path());
        let claim = begin(&place);
        let (run, own) = (place.root().join(RUN), fs::metadata(outside.path()).unwrap());
        let owner = (Uid::from_raw(own.uid()), Gid::from_raw(own.gid()));
        place.give(&run, owner).unwrap();
        fs::remove_dir(&run).unwrap();
        symlink(outside.path(), &run).unwrap();
        let changed = fs::metadata(outside.path()).unwrap().ctime_nsec();
        assert!(matches!(place.give(&run, owner), Err(DirectoryError::Link { .. })));
        assert_eq!(
            fs::metadata(outside.path()).unwrap().ctime_nsec(),
            changed,
            "somebody else's directory was given"
        );
        fs::remove_file(&run).unwrap();
        claim.release().unwrap();
    }

    #[test]
    fn states_round_trip() {
        let full = State { prepared: Some(vec!["a b".into(), "c\n".into()]), cgroups: vec!["/s/x".into()] };
        for state in [full, State::default(), State { prepared: Some(vec![]), cgroups: vec![] }] {
            assert_eq!(State::from_bytes(&state.to_bytes()), state);
        }
    }
}
