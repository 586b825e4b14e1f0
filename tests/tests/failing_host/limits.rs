//! Too few descriptors, too little memory, no io_uring.
#![allow(unsafe_code)] // a system call filter has no safe form

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use cofferdam_api::status::ExitReason;
use cofferdam_tests::host::{process_with, unique_id};
use cofferdam_tests::{Run, place};

use crate::vsock::{Echo, answers, talk};
use crate::{MESSAGES, lines_with, payload};

/// Whatever the limit, the domain runs or is refused with the reason; nothing hangs, nothing is left.
#[test]
fn any_limit_on_descriptors_gives_a_domain_or_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let (mut refused, mut ran) = (0, 0);
    for limit in 4..45 {
        let id = unique_id();
        let done = payload("hello")
            .with("drive", format!("path={}", disk.display()))
            .with("vsock", folder.path().join("v.sock"))
            .with("id", &id)
            .wrapped(["prlimit".to_owned(), format!("--nofile={limit}:{limit}")])
            .finish();
        match done.outcome().exit_reason {
            ExitReason::PowerOff => {
                assert_eq!(done.code(), 42, "{limit}: {done}");
                ran += 1;
            }
            _ => {
                assert!(done.outcome().message.contains("(os error 24)"), "{limit}: {done}");
                assert!([123, 124, 125].contains(&done.code()), "{limit}: {done}");
                refused += 1;
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{limit}: {done}");
        assert_eq!(process_with(&id), None, "{limit}: {done}");
    }
    assert!(refused >= 5 && ran >= 5, "{refused} refused, {ran} ran");
}

/// Connections of the guest for which there is no descriptor are reset, which is said once; those that there are work,
/// and new ones do when others have ended.
#[test]
fn without_descriptors_connections_of_the_guest_are_reset() {
    let echo = Echo::start();
    let done = payload("streams")
        .with("vsock", echo.socket())
        .with("cmdline", "mode=together count=100 then=10")
        .wrapped(["prlimit", "--nofile=64:64"])
        .finish();
    assert_eq!(done.code(), 0, "{done}");
    let [(answered, refused), (answered_then, 0)] = answers(&done)[..] else { panic!("{done}") };
    assert!(answered >= 20 && refused >= 40 && answered + refused == 100, "{done}");
    assert_eq!(answered_then, 10, "{done}");
    let lines = lines_with(&done, &["vsock: a connection of the guest is refused", "(os error 24)"]);
    assert_eq!(lines, MESSAGES, "{done}");
    let rest = format!("vsock: {} messages were not logged", refused as usize - MESSAGES);
    assert_eq!(lines_with(&done, &[&rest]), 1, "no {rest:?}: {done}");
}

/// Programs of the host have to wait while there is no descriptor, and are served when there is one.
#[test]
fn without_descriptors_programs_of_the_host_wait() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v.sock");
    let running = payload("streams")
        .with("vsock", &socket)
        .with("cmdline", "mode=serve count=100")
        .wrapped(["prlimit", "--nofile=64:64"])
        .start();
    running.wait_for("ready");
    let programs: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    programs.into_iter().for_each(|program| talk(program, 7000));
    let done = running.finish();
    assert_eq!(done.code(), 0, "{done}");
    let lines = lines_with(&done, &["vsock: connections of the host have to wait", "(os error 24)"]);
    assert!((1..=MESSAGES).contains(&lines), "{done}");
}

#[test]
fn memory_that_the_host_does_not_give_is_refused() {
    let limit = ["prlimit", "--as=300000000"];
    let done = Run::new(place::payload("hello")).with("memory", "1G").wrapped(limit).finish();
    assert_eq!((done.code(), done.outcome().exit_reason), (125, ExitReason::Config), "{done}");
    let message = done.outcome().message;
    assert!(message.starts_with("guest memory at 0x0, 1073741824 bytes: "), "{done}");
    assert!(message.ends_with("(os error 12)"), "{done}");

    // Its file may not become that large: an error too, and not the signal that goes with it.
    let done = payload("hello").wrapped(["prlimit", "--fsize=1048576"]).finish();
    assert_eq!((done.code(), done.outcome().exit_reason), (125, ExitReason::Config), "{done}");
    let words = "guest memory of 33554432 bytes: ftruncate: File too large";
    assert!(done.outcome().message.contains(words), "{done}");
}

/// A guest that uses more memory than a control group has: the kernel kills the monitor, and the command says so.
#[test]
#[ignore = "needs root and a memory controller: make test-all"]
fn a_monitor_that_the_kernel_kills_for_want_of_memory_is_named() {
    let group = Group::new(64 << 20);
    let folder = tempfile::tempdir().unwrap();
    let join = format!("echo 0 > {}/cgroup.procs && exec \"$@\"", group.0.display());
    let done = Run::new(place::payload("memory"))
        .with("memory", "256M")
        .with("cmdline", "mib=256")
        .with("vsock", folder.path().join("v.sock"))
        .wrapped(["sh", "-c", &join, "sh"])
        .finish();
    assert_eq!((done.code(), done.outcome().exit_reason), (124, ExitReason::MonitorError), "{done}");
    let words = "the monitor was killed by signal 9, as by the kernel when memory is short";
    assert_eq!(done.outcome().message, words, "{done}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A control group with little memory, of version 1 or 2.
struct Group(PathBuf);

impl Group {
    fn new(bytes: u64) -> Self {
        let mount = Path::new("/sys/fs/cgroup");
        let (parent, limit) = if mount.join("memory").is_dir() {
            (mount.join("memory"), "memory.limit_in_bytes")
        } else {
            (mount.to_owned(), "memory.max")
        };
        let group = Self(parent.join(unique_id()));
        fs::create_dir(&group.0).expect("root may make a control group");
        fs::write(group.0.join(limit), bytes.to_string()).expect("the group has a memory controller");
        group
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Every way in which a host refuses io_uring leaves the drives working.
#[test]
fn drives_work_without_io_uring() {
    const SETUP: u32 = 425;
    const ENTER: u32 = 426;
    const REGISTER: u32 = 427;
    for call in [SETUP, ENTER, REGISTER] {
        let done = thread::spawn(move || {
            refuse(call);
            let disk = tempfile::NamedTempFile::new().unwrap();
            fs::write(disk.path(), vec![5; 1 << 20]).unwrap();
            let drive = format!("path={}", disk.path().display());
            payload("disks").with("drive", drive).with("cmdline", "repeat=20 op=keep from=1").finish()
        });
        let done = done.join().unwrap();
        assert_eq!(done.code(), 1, "{call}: {done}");
        assert!(done.console().contains("disk 0: 20 done, 0 failed, first byte 5"), "{call}: {done}");
    }
}

/// Has the system call `number` fail in this thread and in what it starts.
fn refuse(number: u32) {
    let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut filter = [
        instruction(0x20, 0, 0), // load the number
        instruction(0x15, 1, number),
        instruction(0x06, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        instruction(0x06, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: these calls only read `program`, which outlives them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}
