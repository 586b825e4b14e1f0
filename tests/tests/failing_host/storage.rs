//! Disks that fail. The guest's requests fail, its other requests do not; few messages say so, and one how many more
//! there would have been when the domain has ended.

use std::fs::{self, File};
use std::path::Path;

use cofferdam_tests::host::after;
use cofferdam_tests::run::send;
use cofferdam_tests::{Finished, Run};

use crate::{MESSAGES, lines_with, payload};

/// A domain with one drive whose guest makes the requests of `command_line`.
fn disks(drive: &Path, more: &str, command_line: &str) -> Run {
    payload("disks").with("drive", format!("path={}{more}", drive.display())).with("cmdline", command_line)
}

/// How many requests the guest saw done and failed, and the first byte that it could read, or -1.
fn seen(done: &Finished) -> (u32, u32, i32) {
    let console = done.console();
    let line = console.lines().find(|line| line.starts_with("disk 0: ")).unwrap_or_else(|| panic!("{done}"));
    let numbers: Vec<i32> = line[8..].split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    (numbers[0] as u32, numbers[1] as u32, numbers[2])
}

/// Checks that the guest ended by itself, and that the first of its `failed` requests are told of with `reason`.
fn check(done: &Finished, failed: u32, reason: &str) {
    assert_eq!(done.code(), 1, "{done}");
    assert_eq!(lines_with(done, &["drive drive0: ", reason]), MESSAGES, "{done}");
    let rest = format!("block_drive0: {} messages were not logged", failed as usize - MESSAGES);
    assert_eq!(lines_with(done, &[&rest]), 1, "no {rest:?}: {done}");
}

#[test]
fn a_full_file_system_is_an_error_of_the_write() {
    let folder = tempfile::tempdir().unwrap();
    let drive = folder.path().join("disk");
    let host = format!(
        "mount -t tmpfs -o size=256K none {} && truncate -s 1M {}",
        folder.path().display(),
        drive.display()
    );
    let done = disks(&drive, "", "op=write repeat=200").wrapped(after(&host)).finish();
    let (written, failed, first) = seen(&done);
    assert_eq!((written, failed, first), (64, 136, 0), "{done}");
    check(&done, failed, "No space left on device");
}

/// Both engines, under the seccomp policies: `fallocate` is a call of its own with the one and goes through the ring with
/// the other.
#[test]
fn pages_are_given_back_and_made_zero() {
    use std::os::unix::fs::MetadataExt;
    for engine in ["sync", "async"] {
        for operation in ["discard", "zero"] {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), vec![7; 1 << 20]).unwrap();
            let before = file.path().metadata().unwrap().blocks();
            let line = format!("op={operation} repeat=128");
            let done = disks(file.path(), &format!(",engine={engine}"), &line).finish();
            assert_eq!(seen(&done), (128, 0, 0), "{engine}, {operation}: {done}");
            let bytes = fs::read(file.path()).unwrap();
            let (first, second) = bytes.split_at(512 << 10);
            assert!(first.iter().all(|byte| *byte == 0) && second.iter().all(|byte| *byte == 7));
            let after = file.path().metadata().unwrap().blocks();
            assert!(operation == "zero" || after <= before / 2, "{engine}: {before} blocks, then {after}");
        }
    }
}

#[test]
fn a_file_that_may_not_grow_is_an_error_of_the_write() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(65 << 20).unwrap();
    // 64 MiB, in bytes: the last of the disk's MiB lies beyond.
    let limit = ["prlimit", "--fsize=67108864"];
    let done = disks(file.path(), "", "op=write from=16374 repeat=20").wrapped(limit).finish();
    assert_eq!(seen(&done), (10, 10, 0), "{done}");
    check(&done, 10, "File too large");
}

#[test]
fn a_file_that_shrinks_under_the_drive_is_an_error_where_nothing_is_left() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![7; 1 << 20]).unwrap();
    let mut running = disks(file.path(), ",ro", "wait=1 repeat=256").start();
    running.wait_for("ready");
    File::options().write(true).open(file.path()).unwrap().set_len(10 << 12).unwrap();
    send(running.stdin(), b"x");
    let done = running.finish();
    assert_eq!(seen(&done), (10, 246, 7), "{done}");
    check(&done, 246, "(os error 5)");
}

/// What stands for a broken disk is a file of sysfs: it has a size of a page, and every read of it fails, as a network
/// without wire has no speed.
#[test]
fn a_disk_that_cannot_be_read_is_an_error_of_the_read() {
    let done = disks(Path::new("/sys/class/net/lo/speed"), ",ro", "repeat=100").finish();
    assert_eq!(seen(&done), (0, 100, -1), "{done}");
    check(&done, 101, "Invalid argument");
}

/// The others of several drives work on.
#[test]
fn a_broken_drive_does_not_harm_another_one() {
    let good = tempfile::NamedTempFile::new().unwrap();
    fs::write(good.path(), vec![9; 1 << 20]).unwrap();
    let done = disks(Path::new("/sys/class/net/lo/speed"), ",ro", "repeat=10")
        .with("drive", format!("path={},ro", good.path().display()))
        .finish();
    assert_eq!(done.code(), 2, "{done}");
    assert!(done.console().contains("disk 1: 10 done, 0 failed, first byte 9"), "{done}");
}

/// A block device that takes writes and cannot keep them: a loop device whose file lies on a full file system. Only the
/// flush tells. Needs root and loop devices.
#[test]
#[ignore = "needs root and a loop device: make test-all"]
fn what_a_block_device_cannot_keep_is_an_error_of_the_flush() {
    let folder = tempfile::tempdir().unwrap();
    let drive = folder.path().join("loop");
    let script = format!(
        r#"mount -t tmpfs -o size=64K none {0} && cd {0} && truncate -s 1M file && loop=$(losetup -f --show file) || exit 1
        ln -s "$loop" loop; "$@"; code=$?; losetup -d "$loop"; exit $code"#,
        folder.path().display()
    );
    let wrapper = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let done = disks(&drive, "", "op=keep repeat=200").wrapped(wrapper).finish();
    let (_, failed, _) = seen(&done);
    assert!(failed >= 100, "{done}");
    check(&done, failed, "(os error 5)");
}
