//! What a domain costs the host: its private and its shared pages together are no more than its memory.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use cofferdam_test_guest as stream;
use cofferdam_tests::host::unique_id;
use cofferdam_tests::image::Image;
use cofferdam_tests::place;

use crate::devices::accepted;
use crate::domain::{Domain, finish, run, succeeded};

const GUEST: u64 = 512 << 20;

/// A control group that counts memory, with what was charged to it at most.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        let path = root.join(unique_id());
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A wrapper that runs a command in it.
    fn wrapper(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }

    /// The most that was charged to it, bytes.
    fn peak(&self) -> u64 {
        fs::read_to_string(self.0.join("memory.peak")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The guest fills its memory, gives it back, and makes pages shared and private again many times. The group is charged
/// for all of it, the monitor and KVM's tables included; the image's pages are charged to this process, which wrote it.
#[test]
fn private_and_shared_pages_together_are_no_more_than_the_guests_memory() {
    let domain = Domain::new("test=convert argument=300");
    let group = Group::new();
    let done = domain.run(2, "512M").wrapped(group.wrapper()).finish();
    succeeded(&done);
    let peak = group.peak();
    assert!(peak > 300 << 20, "{peak} bytes: the guest used more than that");
    assert!(peak <= GUEST / 100 * 105, "{peak} bytes for a guest of {GUEST}");
}

/// While a disk is written and read by eight programs and vsock is busy in both directions, which all go through a small buffer that
/// is shared, a guest whose kernel has little memory for itself fills nearly all the rest. All is right in the end.
fn pressure(cpus: u32, memory: &str, bytes: u64) {
    let domain = Domain::new(&format!("test=pressure argument={bytes}"));
    let disk = domain.guest.file("disk");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    finish(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk));
    let mut drive = OsString::from("path=");
    drive.push(&disk);
    let listen = |port| UnixListener::bind(domain.guest.file(&format!("v_{port}"))).unwrap();
    let (to_guest, from_guest) = (listen(5000), listen(5001));
    let vsock = domain.guest.file("v");
    let running = domain.run(cpus, memory).with("drive", drive).with("vsock", vsock).start();
    let sender = thread::spawn(move || {
        let guest = accepted(&to_guest);
        stream::write(&guest, bytes, 11).unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&guest).read(&mut [0]).unwrap(), 0, "the guest closes when it has checked all");
    });
    stream::check(accepted(&from_guest), bytes, 12).unwrap();
    sender.join().unwrap();
    let done = running.finish();
    succeeded(&done);
    assert!(!done.console().contains("memory"), "the kernel killed somebody: {done}");
    println!("{memory}, {cpus} CPUs: {}", done.console());
}

#[test]
fn a_guest_under_pressure_of_memory_keeps_its_data_right() {
    pressure(2, "512M", 16 << 20);
}

#[test]
#[ignore = "long: make test-all"]
fn guests_of_other_sizes_under_pressure_of_memory_keep_their_data_right() {
    for (cpus, memory) in [(1, "128M"), (4, "256M"), (1, "1G"), (2, "2G")] {
        pressure(cpus, memory, 32 << 20);
    }
}

/// Most of the memory of a small guest goes to the other side and back, each page of it used on either: as much as can be held twice.
#[test]
fn conversions_leave_nothing_on_the_other_side() {
    const SMALL: u64 = 128 << 20;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("domain.igvm");
    let kernel = fs::read(place::payload("convert")).unwrap();
    Image { command_line: "rounds=3", ..Image::of(kernel) }.write(&image);
    let group = Group::new();
    let done = run(&image, 1).with("memory", "128M").wrapped(group.wrapper()).finish();
    succeeded(&done);
    assert!(done.console().contains("round 2"), "{done}");
    let peak = group.peak();
    assert!(peak > 104 << 20, "{peak} bytes: the guest used more than that");
    assert!(peak <= SMALL / 100 * 105, "{peak} bytes for a guest of {SMALL}");
}
