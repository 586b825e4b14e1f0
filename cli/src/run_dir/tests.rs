use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// A run directory in a folder of its own.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn open(&self) -> RunDir {
        RunDir::open_or_make(&self.path()).unwrap()
    }

    fn make(&self, id: &str) -> Result<OwnEntry, RunDirError> {
        self.open().make_entry(id)
    }

    fn live(&self) -> Vec<String> {
        self.open().live().unwrap().into_iter().map(|entry| entry.id).collect()
    }

    /// What is there, files of our own aside.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }

    /// An entry without its processes.
    fn leave(&self, id: &str) {
        let entry = self.make(id).unwrap();
        drop(entry.listen().unwrap());
        entry.begin(Facts::now(1)).unwrap();
        let kept = entry.lock.try_clone().unwrap();
        let path = self.path().join(id);
        let moved = self.folder.path().join("moved");
        fs::rename(&path, &moved).unwrap();
        drop(entry);
        fs::rename(&moved, &path).unwrap();
        drop(kept);
        for name in ["lock", "console.log", "console.log.1"] {
            fs::write(path.join(name), "").unwrap();
        }
    }
}

/// Waits for what holds as soon as no child of another test, which may hold a lock until it executes its program,
/// is in the way.
fn soon(mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(240);
    while !holds() {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn where_it_is() {
    let with = |option: Option<&str>, variables: &[(&str, &str)], user| {
        let value = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into());
        locate_with(option.map(Path::new), value, user).display().to_string()
    };
    let (own, xdg) = (("COFFERDAM_RUN_DIR", "/c"), ("XDG_RUNTIME_DIR", "/x"));
    assert_eq!(with(Some("/o"), &[own, xdg], 7), "/o");
    assert_eq!(with(None, &[own, xdg], 0), "/c");
    assert_eq!(with(None, &[xdg], 0), "/run/cofferdam");
    assert_eq!(with(None, &[xdg, ("COFFERDAM_RUN_DIR", "")], 7), "/x/cofferdam");
    assert_eq!(with(None, &[("XDG_RUNTIME_DIR", "relative")], 7), "/tmp/cofferdam-7");
    assert_eq!(with(None, &[], 7), "/tmp/cofferdam-7");
}

#[test]
fn a_directory_that_others_can_reach_is_refused() {
    let place = Place::new();
    assert!(RunDir::open(&place.path()).unwrap().is_none());
    place.open();
    assert_eq!(fs::metadata(place.path()).unwrap().permissions().mode() & 0o7777, 0o700);
    let refusal = || RunDir::open_or_make(&place.path()).err().unwrap().to_string();
    for mode in [0o710, 0o701, 0o755] {
        fs::set_permissions(place.path(), fs::Permissions::from_mode(mode)).unwrap();
        assert!(refusal().contains(&format!("its mode is {mode:o}; chmod 700")), "{}", refusal());
    }
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
    if geteuid().is_root() {
        chown(place.path(), Some(1), None).unwrap();
        assert!(refusal().contains("belongs to user 1, not to 0"), "{}", refusal());
    }
    fs::remove_dir(place.path()).unwrap();
    symlink("/tmp", place.path()).unwrap();
    assert!(refusal().contains("cannot open"), "{}", refusal());
    fs::remove_file(place.path()).unwrap();
    fs::write(place.path(), "").unwrap();
    assert!(refusal().contains("--run-dir DIR or COFFERDAM_RUN_DIR"), "{}", refusal());
}

#[test]
fn an_entry_lives_as_long_as_its_owner() {
    let place = Place::new();
    let entry = place.make("d").unwrap();
    let listener = entry.listen().unwrap();
    assert_eq!(entry.entry().facts(), None);
    entry.begin(Facts { pid: 5, start_us: 6 }).unwrap();
    let run_dir = place.open();
    let [found] = &run_dir.live().unwrap()[..] else { panic!("one is there") };
    assert_eq!((found.id.as_str(), found.facts()), ("d", Some(Facts { pid: 5, start_us: 6 })));
    std::os::unix::net::UnixStream::connect(found.socket()).unwrap();
    assert!(run_dir.is_live(found).unwrap());
    let refusal = place.make("d").err().unwrap();
    assert!(matches!(refusal, RunDirError::InUse { .. }), "{refusal}");
    assert!(refusal.to_string().starts_with("--id: a domain \"d\" is there already, in "), "{refusal}");
    drop(listener);
    drop(entry);
    assert!(!run_dir.is_live(found).unwrap());
    assert_eq!(place.names(), [""; 0]);
    place.make("d").unwrap();
}

#[test]
fn what_was_left_is_not_shown_and_removed() {
    let place = Place::new();
    let _live = place.make("live").unwrap();
    for id in ["left", "too"] {
        place.leave(id);
    }
    fs::create_dir(place.path().join("unfinished")).unwrap();
    soon(|| place.live() == ["live"]);
    assert_eq!(place.names(), ["live"]);

    place.leave("left");
    let mut again = None;
    soon(|| {
        again = place.make("left").ok();
        again.is_some()
    });
    assert_eq!(fs::read_dir(place.path().join("left")).unwrap().count(), 1, "only the lock");
    assert_eq!(place.live(), ["left", "live"]);
}

#[test]
fn what_is_no_entry_is_left_alone() {
    let place = Place::new();
    place.open();
    fs::write(place.path().join("file"), "").unwrap();
    fs::create_dir(place.path().join("not.an.id")).unwrap();
    symlink(place.folder.path(), place.path().join("link")).unwrap();
    assert_eq!(place.live(), [""; 0]);
    assert_eq!(place.names().len(), 3);
    for taken in ["file", "link"] {
        assert!(matches!(place.make(taken), Err(RunDirError::Host { .. })));
    }
}

#[test]
fn ids_are_checked_before_anything_is_looked_at() {
    let place = Place::new();
    place.open();
    for id in ["", ".", "..", "a/b", "../d", "a.b", "a\0b", &"x".repeat(65)] {
        let refusal = place.make(id).err().unwrap();
        assert!(
            matches!(&refusal, RunDirError::BadId(message) if message.starts_with("--id: ")),
            "{refusal}"
        );
        assert!(matches!(RunDir::find(&place.path(), id), Err(RunDirError::BadId(_))));
    }
    place.make(&"x".repeat(64)).unwrap().listen().unwrap();
}

#[test]
fn a_domain_that_is_not_there_is_told_with_those_that_are() {
    let place = Place::new();
    let refusal = || RunDir::find(&place.path(), "d").err().unwrap().to_string();
    assert!(refusal().ends_with("/run, and no other"), "{}", refusal());
    let _entries = ["b", "a"].map(|id| place.make(id).unwrap());
    assert!(refusal().starts_with("there is no domain \"d\" in "), "{}", refusal());
    assert!(refusal().ends_with("; there is a, b"), "{}", refusal());
    assert_eq!(RunDir::find(&place.path(), "a").unwrap().1.id, "a");
}

/// However starts of one id, ends and sweeps meet: there is one at a time, and nobody's entry is taken away.
#[test]
fn starts_with_one_id_and_sweeps_at_once() {
    const THREADS: usize = 6;
    let place = Place::new();
    let start = Barrier::new(THREADS);
    let made: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                let (place, start) = (&place, &start);
                scope.spawn(move || {
                    start.wait();
                    let mut made = 0;
                    for _ in 0..500 {
                        if index == 0 {
                            place.open().live().unwrap();
                            continue;
                        }
                        match place.make("d") {
                            Ok(entry) => {
                                made += 1;
                                let file = File::create_new(place.path().join("d/only-one")).unwrap();
                                thread::yield_now();
                                assert!(place.path().join("d/only-one").exists());
                                drop((file, entry));
                            }
                            Err(error) => assert!(matches!(error, RunDirError::InUse { .. }), "{error}"),
                        }
                    }
                    made
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(made > 0);
    assert_eq!(place.names(), [""; 0]);
}
