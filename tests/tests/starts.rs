//! Two hundred starts in a row leave nothing behind. A program of its own: its descriptors are those of one test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use cofferdam_tests::held::Held;
use cofferdam_tests::host::{process_with, unique_id};
use cofferdam_tests::{Run, place};
use tempfile::TempDir;

const STARTS: usize = 200;

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
    before.check(STARTS);
}
