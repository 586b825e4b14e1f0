//! Disks and vsock of protected guests: the same integrity tests as on plain.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_test_guest as stream;

use crate::domain::{Domain, finish, succeeded};

/// Bytes of the file, as in the guest's init.
const FILE: u64 = 64 << 20;

#[test]
fn a_synced_file_is_the_same_on_the_host() {
    let domain = Domain::new("test=disk argument=31");
    let (disk, copy) = (domain.guest.file("disk"), domain.guest.file("copy"));
    File::create(&disk).unwrap().set_len(128 << 20).unwrap();
    finish(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk));
    let mut drive = OsString::from("path=");
    drive.push(&disk);
    let done = domain.run(2, "512M").with("drive", drive).finish();
    succeeded(&done);
    finish(Command::new("debugfs").args(["-R", &format!("dump /file {}", copy.display())]).arg(&disk));
    stream::check(File::open(&copy).unwrap(), FILE, 31).unwrap();
    let sum = finish(Command::new("sha256sum").arg(&copy));
    let sum = sum.split_whitespace().next().unwrap();
    assert!(done.console().contains(&format!("guest: sum {sum}")), "{sum}: {done}");
}

#[test]
fn vsock_streams_pass_uncorrupted_in_both_directions() {
    streams(32 << 20);
}

#[test]
#[ignore = "long: make test-all"]
fn larger_vsock_streams_pass_uncorrupted_in_both_directions() {
    streams(256 << 20);
}

/// The guest's next connection; a guest that failed makes none.
pub fn accepted(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        match listener.accept() {
            Ok((stream, _)) => return stream,
            Err(error) => assert!(Instant::now() < end, "the guest does not connect: {error}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// `bytes` to the guest, and as many from it.
fn streams(bytes: u64) {
    let domain = Domain::new(&format!("test=streams argument={bytes}"));
    let listener = UnixListener::bind(domain.guest.file("v_5000")).unwrap();
    let running = domain.run(2, "512M").with("vsock", domain.guest.file("v")).start();

    let to_guest = accepted(&listener);
    stream::write(&to_guest, bytes, 11).unwrap();
    to_guest.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&to_guest).read(&mut [0]).unwrap(), 0, "the guest closes when it has checked all");
    let from_guest = accepted(&listener);
    stream::check(&from_guest, bytes, 12).unwrap();
    drop(from_guest);
    succeeded(&running.finish());
}
