//! Two hundred starts in a row leave nothing behind. A program of its own: its descriptors are those of one test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use cofferdam_tests::host::{process_with, unique_id};
use cofferdam_tests::{Run, place};
use tempfile::TempDir;

const STARTS: usize = 200;
/// What the rest of the machine may add meanwhile; all less than what one more for each start would be.
const FILES: u64 = STARTS as u64 / 2;
const SHARED_KIB: u64 = STARTS as u64 / 2 * 1024;
/// How long the machine may take to come back to it.
const SETTLE: Duration = Duration::from_secs(60);

/// What a leak would make grow.
#[derive(Debug)]
struct Held {
    /// Open files of the machine.
    files: u64,
    /// Shared memory of the machine, KiB, as that of guests is.
    shared: u64,
    /// This process's descriptors.
    descriptors: usize,
    /// Control groups.
    groups: u64,
    /// Locks on files.
    locks: usize,
}

impl Held {
    fn now() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let first = |text: &str| text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap();
        let memory = text("/proc/meminfo");
        let groups = text("/proc/cgroups");
        let group_counts =
            groups.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
        Self {
            files: first(&text("/proc/sys/fs/file-nr")),
            shared: first(memory.lines().find_map(|line| line.strip_prefix("Shmem:")).unwrap()),
            descriptors: names(Path::new("/proc/self/fd")).len(),
            groups: group_counts.sum(),
            locks: text("/proc/locks").lines().count(),
        }
    }

    fn has_grown(&self, before: &Self) -> bool {
        self.files > before.files + FILES
            || self.shared > before.shared + SHARED_KIB
            || self.descriptors > before.descriptors
            || self.groups > before.groups + FILES
            || self.locks > before.locks + STARTS / 2
    }
}

fn names(folder: &Path) -> BTreeSet<OsString> {
    fs::read_dir(folder).unwrap().flatten().map(|entry| entry.file_name()).collect()
}

/// A domain with every kind of thing that could be left: a drive with its lock, a socket, a console file.
fn start(folder: &TempDir, id: &str) {
    let path = |name: &str| folder.path().join(name).display().to_string();
    let done = Run::new(place::payload("hello"))
        .with("memory", "32M")
        .with("cpus", "2")
        .with("drive", format!("path={}", path("disk")))
        .with("vsock", path("v.sock"))
        .with("id", id)
        .wrapped(["env".to_owned(), format!("TMPDIR={}", path("tmp"))])
        .finish();
    assert_eq!(done.code(), 42, "{done}");
}

#[test]
fn two_hundred_starts_in_a_row() {
    let (folder, id) = (tempfile::tempdir().unwrap(), unique_id());
    fs::create_dir(folder.path().join("tmp")).unwrap();
    fs::File::create(folder.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
    let left_before = names(folder.path());
    start(&folder, &id);
    let before = Held::now();
    (0..STARTS).for_each(|_| start(&folder, &id));

    assert_eq!(names(folder.path()), left_before);
    assert!(names(&folder.path().join("tmp")).is_empty());
    assert_eq!(process_with(&id), None);
    let step = Duration::from_millis(100);
    let settled = (0..SETTLE.as_millis() / step.as_millis()).any(|_| {
        let settled = !Held::now().has_grown(&before);
        thread::sleep(if settled { Duration::ZERO } else { step });
        settled
    });
    assert!(settled, "before: {before:?}, after: {:?}", Held::now());
}
