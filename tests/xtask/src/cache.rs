//! A directory of things that take long to get: fetched kernels, the emulator,
//! initial RAM disks.
//!
//! Each entry is a directory `NAME-KEY`, where KEY is a digest of its recipe,
//! so that a changed recipe makes a new entry and two checkouts of different
//! age can share the cache. An entry is made in a directory of another name and
//! renamed when it is complete: whoever sees it sees all of it. Whoever makes it
//! has a lock on that directory, so that two processes do not make the same entry
//! at once; others they make, and entries that exist are read without any lock.
//! The cache may be deleted at any time nobody uses it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{Error, tool};

/// Directories that a killed process may have left start with this.
const UNFINISHED: &str = "unfinished-";

/// The cache directory.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the user's cache: `$COFFERDAM_CACHE`, else
    /// `$XDG_CACHE_HOME/cofferdam`, else `~/.cache/cofferdam`.
    pub fn open() -> Result<Self, Error> {
        let directory =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = directory("COFFERDAM_CACHE")
            .or_else(|| directory("XDG_CACHE_HOME").map(|base| base.join("cofferdam")))
            .or_else(|| directory("HOME").map(|home| home.join(".cache/cofferdam")))
            .ok_or_else(|| Error::Unavailable {
                what: "cache directory".into(),
                reason: "none of COFFERDAM_CACHE, XDG_CACHE_HOME and HOME is set".into(),
            })?;
        Self::at(&root)
    }

    /// Opens, or creates, the cache in `root`.
    pub fn at(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(Error::file("create", root))?;
        let root = root.canonicalize().map_err(Error::file("resolve", root))?;
        Ok(Self { root })
    }

    /// A directory for state that is no entry, such as package lists, which is this caller's until the lock is dropped.
    pub fn state(&self, name: &str) -> Result<(PathBuf, Lock), Error> {
        let path = self.root.join("state").join(name);
        let lock = self.lock_directory(&path)?;
        Ok((path, lock))
    }

    /// Whether there is an entry `name` made by `recipe`.
    pub fn has(&self, name: &str, recipe: &[&[u8]]) -> bool {
        self.root.join(full_name(name, recipe)).is_dir()
    }

    /// The entry `name` made by `recipe`: as it is if there is one, else `make`
    /// fills a new directory. `recipe` must say everything that the result
    /// depends on.
    pub fn entry(
        &self,
        name: &str,
        recipe: &[&[u8]],
        make: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let name = full_name(name, recipe);
        let path = self.root.join(&name);
        if path.is_dir() {
            return Ok(path);
        }
        let unfinished = self.root.join(format!("{UNFINISHED}{name}"));
        let _lock = loop {
            self.remove_left()?;
            let lock = self.lock_directory(&unfinished)?;
            // Else its maker was killed while this process waited.
            if fs::read_dir(&unfinished).map_err(Error::file("read", &unfinished))?.next().is_none() {
                break lock;
            }
        };
        if path.is_dir() {
            // Another process has made it meanwhile.
            fs::remove_dir(&unfinished).map_err(Error::file("remove", unfinished))?;
            return Ok(path);
        }
        if let Err(error) = make(&unfinished) {
            // The error tells more than a failure to clean up would, and the
            // next entry that is made cleans up again.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        fs::rename(&unfinished, &path).map_err(Error::file("rename", &unfinished))?;
        Ok(path)
    }

    /// Makes sure that there is a directory `path`, and waits until nobody else has it locked.
    fn lock_directory(&self, path: &Path) -> Result<Lock, Error> {
        loop {
            fs::create_dir_all(path).map_err(Error::file("create", path))?;
            let Some(directory) = open(path)? else { continue };
            match directory.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    tool::progress(format_args!("waiting for another xtask that fills {}", path.display()));
                    directory.lock().map_err(Error::file("lock", path))?;
                }
                Err(TryLockError::Error(error)) => return Err(Error::file("lock", path)(error)),
            }
            // While this one waited it may have been renamed, or removed.
            if is_at(&directory, path)? {
                return Ok(Lock { _directory: directory });
            }
        }
    }

    /// Removes what makers have left that were killed.
    fn remove_left(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.root).map_err(Error::file("read", &self.root))? {
            let path = entry.map_err(Error::file("read", &self.root))?.path();
            if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
                continue;
            }
            // Its maker, if there is one, has it locked.
            if let Some(directory) = open(&path)?
                && directory.try_lock().is_ok()
                && is_at(&directory, &path)?
            {
                fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// That a directory of the cache is this process's alone, as long as this is not dropped.
#[derive(Debug)]
pub struct Lock {
    _directory: File,
}

/// Opens a directory; none if there is none any more.
fn open(path: &Path) -> Result<Option<File>, Error> {
    match File::open(path) {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("open", path)(error)),
    }
}

/// Whether `path` is still the name of this open directory.
fn is_at(directory: &File, path: &Path) -> Result<bool, Error> {
    let own = directory.metadata().map_err(Error::file("look at", path))?;
    match fs::metadata(path) {
        Ok(other) => Ok((own.dev(), own.ino()) == (other.dev(), other.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("look at", path)(error)),
    }
}

/// The directory of the entry `name` made by `recipe`.
fn full_name(name: &str, recipe: &[&[u8]]) -> String {
    format!("{name}-{:016x}", digest(recipe))
}

/// 64-bit FNV-1a of `parts`, each ended by its length. It tells recipes apart;
/// it protects nothing.
fn digest(parts: &[&[u8]]) -> u64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
    parts.iter().fold(OFFSET_BASIS, |hash, part| {
        let hash = part.iter().fold(hash, step);
        (part.len() as u64).to_le_bytes().iter().fold(hash, step)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_file(content: &'static str) -> impl FnOnce(&Path) -> Result<(), Error> {
        move |directory| {
            fs::write(directory.join("file"), content).unwrap();
            Ok(())
        }
    }

    #[test]
    fn an_entry_is_made_once_per_recipe() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let first = cache.entry("thing", &[b"a"], make_file("one")).unwrap();
        let again = cache.entry("thing", &[b"a"], make_file("two")).unwrap();
        let other = cache.entry("thing", &[b"b"], make_file("three")).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
        assert_eq!(fs::read_to_string(first.join("file")).unwrap(), "one");
        assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "three");
    }

    #[test]
    fn a_failed_or_killed_maker_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let fail = |directory: &Path| {
            fs::write(directory.join("half"), "x").unwrap();
            Err(Error::Unavailable { what: "thing".into(), reason: "test".into() })
        };
        assert!(cache.entry("thing", &[b"a"], fail).is_err());
        fs::create_dir_all(directory.path().join("unfinished-thing-0/deep")).unwrap();
        let entry = cache.entry("thing", &[b"a"], make_file("one")).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [entry.file_name().unwrap()]);
    }

    #[test]
    fn one_entry_does_not_wait_for_another_that_is_being_made() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let slow = |slow: &Path| {
            fs::write(slow.join("begun"), "x").unwrap();
            cache.entry("quick", &[], make_file("quick")).unwrap();
            let _state = cache.state("lists").unwrap();
            // What it has made so far was not taken for something that was left.
            assert_eq!(fs::read_to_string(slow.join("begun")).unwrap(), "x");
            Ok(())
        };
        cache.entry("slow", &[], slow).unwrap();
    }

    #[test]
    fn a_state_has_one_user_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let (users, at_once) = (std::sync::atomic::AtomicU32::new(0), std::sync::atomic::AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _state = cache.state("lists").unwrap();
                    let now = users.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                    at_once.fetch_max(now, std::sync::atomic::Ordering::SeqCst);
                    std::thread::yield_now();
                    users.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                });
            }
        });
        assert_eq!(at_once.into_inner(), 1);
    }

    #[test]
    fn two_makers_at_once_make_one_entry() {
        let directory = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = Cache::at(directory.path()).unwrap();
                    let count = |_: &Path| {
                        made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        Ok(())
                    };
                    cache.entry("thing", &[], count).unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn the_digest_sees_part_boundaries() {
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_ne!(digest(&[b"", b"a"]), digest(&[b"a", b""]));
        assert_ne!(digest(&[]), digest(&[b""]));
    }
}
