//! A directory of things that take long to get: fetched kernels, the emulator,
//! initial RAM disks.
//!
//! Each entry is a directory `NAME-KEY`, where KEY is a digest of its recipe,
//! so that a changed recipe makes a new entry and two checkouts of different
//! age can share the cache. An entry is made in a temporary directory and
//! renamed when it is complete: whoever sees it sees all of it. One lock file
//! keeps two processes from making entries at once; entries that exist are
//! read without it. The cache may be deleted at any time nobody uses it.

use std::fs::{self, File, TryLockError};
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

    /// A directory for state that is no entry, such as package lists. It is
    /// used by the makers of entries only, so the lock guards it.
    pub fn state(&self, name: &str) -> PathBuf {
        self.root.join("state").join(name)
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
        let path = self.root.join(format!("{name}-{:016x}", digest(recipe)));
        if path.is_dir() {
            return Ok(path);
        }
        let _lock = self.lock()?;
        if path.is_dir() {
            return Ok(path);
        }
        self.remove_unfinished()?;
        let unfinished = self.root.join(format!("{UNFINISHED}{name}"));
        fs::create_dir(&unfinished).map_err(Error::file("create", &unfinished))?;
        if let Err(error) = make(&unfinished) {
            // The error tells more than a failure to clean up would, and the
            // next entry that is made cleans up again.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        fs::rename(&unfinished, &path).map_err(Error::file("rename", &unfinished))?;
        Ok(path)
    }

    fn lock(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        let file =
            File::options().create(true).append(true).open(&path).map_err(Error::file("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                tool::progress(format_args!("waiting for another xtask that fills {}", self.root.display()));
                file.lock().map_err(Error::file("lock", &path))?;
            }
            Err(TryLockError::Error(error)) => return Err(Error::file("lock", &path)(error)),
        }
        Ok(file)
    }

    fn remove_unfinished(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.root).map_err(Error::file("read", &self.root))? {
            let path = entry.map_err(Error::file("read", &self.root))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
                fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
            }
        }
        Ok(())
    }
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
        fs::create_dir_all(directory.path().join("unfinished-thing/deep")).unwrap();
        let entry = cache.entry("thing", &[b"a"], make_file("one")).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["lock".as_ref(), entry.file_name().unwrap()]);
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
