//! Disks: what the guest writes and syncs is what the host reads.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use cofferdam_api::status::ExitReason;
use cofferdam_test_guest as stream;
use cofferdam_tests::Guest;

/// Bytes of the file, as in the guest's init.
const FILE: u64 = 64 << 20;

fn tool(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn drive(path: &Path, rest: &str) -> OsString {
    let mut spec = OsString::from("path=");
    spec.push(path);
    spec.push(rest);
    spec
}

fn image(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Boots a guest that writes a file to an ext4 file system, and compares the sums of both sides.
fn write_and_compare(cpus: &str, engine: &str, seed: u64) {
    let guest = Guest::new();
    let (disk, copy) = (guest.file("disk"), guest.file("copy"));
    image(&disk, 128 << 20);
    tool("mkfs.ext4", &["-q", "-F"], &disk);
    let done = guest.run_with("disk", seed).with("cpus", cpus).with("drive", drive(&disk, engine)).finish();
    assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{done}");
    assert_eq!(done.code(), 0, "{done}");
    tool("debugfs", &["-R", &format!("dump /file {}", copy.display())], &disk);
    stream::check(File::open(&copy).unwrap(), FILE, seed).unwrap();
    let sum = tool("sha256sum", &[], &copy);
    let sum = sum.split_whitespace().next().unwrap();
    assert!(done.console().contains(&format!("guest: sum {sum}")), "{sum}: {done}");
}

#[test]
fn a_synced_file_is_the_same_on_the_host_with_1_cpu() {
    write_and_compare("1", ",engine=sync", 21);
}

#[test]
fn a_synced_file_is_the_same_on_the_host_with_2_cpus() {
    write_and_compare("2", ",engine=async", 22);
}

#[test]
fn drives_are_what_they_were_configured_to_be() {
    let guest = Guest::new();
    let (first, second) = (guest.file("first"), guest.file("second"));
    fs::write(&first, vec![0xAA; 1 << 20]).unwrap();
    fs::write(&second, vec![0xBB; 1 << 20]).unwrap();
    let done = guest
        .run("drives")
        .with("drive", drive(&first, ",id=root-disk"))
        .with("drive", drive(&second, ",ro,iops=100,bandwidth=1M"))
        .finish();
    assert_eq!(done.code(), 0, "{done}");
    let console = done.console();
    assert!(console.contains("guest: vda root-disk ro=0 size=2048 block=512 cache=write back"), "{done}");
    assert!(console.contains("guest: vdb drive1 ro=1 size=2048 block=512"), "{done}");
    assert!(!console.contains("wrote to a read-only drive"), "{done}");
    let bytes = fs::read(&first).unwrap();
    let holes = [4096..12288, 16384..24576];
    for (at, byte) in bytes.iter().enumerate() {
        let zero = holes.iter().any(|hole| hole.contains(&at));
        assert_eq!(*byte, if zero { 0 } else { 0xAA }, "byte {at}");
    }
    assert!(fs::read(&second).unwrap().iter().all(|&byte| byte == 0xBB));
}
