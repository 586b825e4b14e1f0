//! What a jailed monitor sees and may do.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cofferdam_tests::api::Connection;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};

use crate::jail::*;

#[test]
fn a_jailed_guest_runs_and_its_code_is_that_of_the_jailer() {
    let _alone = alone();
    let base = Base::new();
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(42), "{text}");
    assert!(text.contains("hello from a payload"), "{text}");
    assert!(base.is_empty());
}

#[test]
fn the_jailed_see_only_what_was_named() {
    let _alone = alone();
    let base = Base::new();
    let status_file = File::create(base.directory.path().join("status")).unwrap();
    fcntl_setfd(&status_file, FdFlags::empty()).unwrap();
    let stray = File::open("/proc/self/status").unwrap();
    fcntl_setfd(&stray, FdFlags::empty()).unwrap();
    let mut command = base.domain("a", "spin", VSOCK);
    command.env("SECRET", "s").args([
        "--resource-limit",
        "no-file=77",
        "--resource-limit",
        "fsize=134217728",
    ]);
    command.args(["--", "--config-file", "/config.json"]);
    command.args(["--status-file", &format!("fd:{}", status_file.as_raw_fd())]);
    let mut running = Running::start(command, &base.root("a").join("v.sock"));
    let monitor = running.monitor();
    let own = rustix::process::getpid();
    let proc = |pid: Pid, name: &str| PathBuf::from(format!("/proc/{}/{name}", pid.as_raw_nonzero()));

    for namespace in ["mnt", "pid", "ipc", "uts", "net", "cgroup", "user"] {
        let link = |pid| fs::read_link(proc(pid, &format!("ns/{namespace}"))).unwrap();
        assert_ne!(link(monitor), link(own), "{namespace}");
    }
    assert_eq!(status_field(monitor, "Uid"), [UID; 4].map(|id| id.to_string()).join("\t"));
    assert_eq!(status_field(monitor, "Gid"), [GID; 4].map(|id| id.to_string()).join("\t"));
    assert_eq!(status_field(monitor, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status_field(monitor, set), "0000000000000000", "{set}");
    }
    assert_eq!(status_field(monitor, "NoNewPrivs"), "1");
    assert_eq!(proc_text(monitor, "environ"), "");
    // What cannot be dumped belongs to root.
    assert_eq!(fs::metadata(proc(monitor, "maps")).unwrap().uid(), 0);

    let root = proc(monitor, "root/");
    let expected = ["cofferdam-vmm.pid", "config.json", "dev", "kernel", "run", "v.sock"];
    assert_eq!(names_in(&root), BTreeSet::from(expected.map(String::from)));
    let pid_file = fs::read_to_string(base.root("a").join("cofferdam-vmm.pid")).unwrap();
    assert_eq!(pid_file, monitor.as_raw_nonzero().to_string());
    assert_eq!(names_in(&root.join("dev")), BTreeSet::from(["kvm".to_owned()]));
    assert_eq!(proc_text(monitor, "mountinfo").lines().count(), 4, "{}", proc_text(monitor, "mountinfo"));

    let mut files = BTreeSet::new();
    for entry in fs::read_dir(proc(monitor, "fd")).unwrap() {
        files.insert(fs::read_link(entry.unwrap().path()).unwrap());
    }
    assert!(files.iter().any(|file| file.ends_with("status")), "{files:?}");
    assert!(!files.iter().any(|file| file.starts_with("/proc")), "{files:?}");

    let limits = proc_text(monitor, "limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max open files"), ["77", "77"]);
    assert_eq!(limit("Max file size"), ["134217728", "134217728"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);

    kill_process(running.pid(), Signal::TERM).unwrap();
    let (status, text) = running.finish();
    assert_eq!(status.code(), Some(143), "{text}");
    assert!(base.is_empty());
}

#[test]
fn the_vsock_socket_can_be_reached_from_outside() {
    let _alone = alone();
    let base = Base::new();
    let socket = base.root("a").join("v.sock");
    let running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    assert_eq!(fs::metadata(&socket).unwrap().uid(), UID);
    UnixStream::connect(&socket).unwrap();
    drop(running);
    assert!(wait_until(|| base.is_empty()));
}

#[test]
fn a_jailed_monitor_can_be_driven_by_its_api() {
    let _alone = alone();
    let base = Base::new();
    // The second is where clients of Firecracker look.
    for path in ["/api.sock", "/run/firecracker.socket"] {
        let socket = base.root("a").join(&path[1..]);
        let mut command = base.domain("a", "hello", "");
        command.args(["--", "--api-sock", path]);
        let mut running = Running(command.spawn().unwrap());
        let connection = || Connection::to(&socket).ok();
        assert!(wait_until(|| connection().is_some()), "{path}");
        let mut connection = connection().unwrap();
        connection.send("PUT /vm?start=true", r#"{"boot-source":{"kernel_image_path":"/kernel"}}"#);
        assert_eq!(connection.answer().0, 204, "{path}");
        let (status, text) = running.finish();
        assert_eq!(status.code(), Some(42), "{path}: {text}");
        assert!(base.is_empty());
    }
}

#[test]
fn the_devices_are_those_that_were_named() {
    let _alone = alone();
    let base = Base::new();
    // A /dev with a secure processor, which is /dev/zero's.
    let dev = base.directory.path().join("dev").display().to_string();
    let devices = format!(
        "mkdir -p {dev} && mount -t tmpfs none {dev} && cp -a /dev/kvm {dev} && mknod {dev}/sev c 1 5 \
         && mount --bind {dev} /dev"
    );
    for (named, expected) in [("kvm", &["kvm"][..]), ("kvm,sev", &["kvm", "sev"]), ("sev", &["sev"])] {
        let mut command = base.jailer("a");
        command.args(["--device", named, "--", "--api-sock", "/api.sock"]);
        let running = Running::start(after(&devices, &command), &base.root("a").join("api.sock"));
        let monitor = running.monitor().as_raw_nonzero();
        let directory = PathBuf::from(format!("/proc/{monitor}/root/dev"));
        assert_eq!(names_in(&directory), expected.iter().map(|name| (*name).to_owned()).collect(), "{named}");
        for name in expected {
            let node = fs::metadata(directory.join(name)).unwrap();
            assert!(node.file_type().is_char_device(), "{name}");
            assert_eq!((node.uid(), node.gid(), node.mode() & 0o7777), (UID, GID, 0o600), "{name}");
            let zero = fs::metadata("/dev/zero").unwrap().rdev();
            assert_eq!(node.rdev() == zero, *name == "sev", "{name}");
        }
        drop(running);
        assert!(wait_until(|| base.is_empty()));
    }
    let mut command = base.jailer("a");
    command.args(["--device", "kvm,sev", "--", "--version"]);
    let without = devices.replace("/sev c 1 5", "/other c 1 5");
    let (code, text) = run(after(&without, &command));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("devices: stat /dev/sev: No such file"), "{text}");
    let (code, text) = run(after(&without.replace("/other c 1 5", "/sev p"), &command));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("devices: /dev/sev is not a character device"), "{text}");
    assert!(base.is_empty());
}

#[test]
fn a_network_namespace_that_there_is_can_be_joined() {
    let _alone = alone();
    let base = Base::new();
    let mut command = base.domain("a", "spin", VSOCK);
    command.args(["--netns", &format!("/proc/{}/ns/net", std::process::id())]);
    let running = Running::start(with_config(command), &base.root("a").join("v.sock"));
    let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(link(&running.monitor().as_raw_nonzero().to_string()), link("self"));
    drop(running);
    assert!(wait_until(|| base.is_empty()));
}

/// To the kernel it is a file. (The monitor is the first process of its namespace, so the signal is nothing to it.)
#[test]
fn memory_beyond_the_limit_on_files_is_refused() {
    let _alone = alone();
    let base = Base::new();
    let mut command = base.domain("a", "hello", "");
    command.args(["--resource-limit", "fsize=1048576"]);
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("ftruncate: File too large"), "{text}");
    assert!(base.is_empty());
}

#[test]
fn a_bound_drive_is_read_only_unless_said_otherwise() {
    let _alone = alone();
    let base = Base::new();
    let disk = base.file("disk", "");
    File::options().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
    chown(&disk, Some(UID), Some(GID)).unwrap();
    let drive = r#","drives":[{"drive_id":"d","path_on_host":"/disk","is_read_only":false}]"#;
    for (how, expected) in [("", Some(125)), (",ro", Some(125)), (",rw", Some(42))] {
        let mut command = base.domain("a", "hello", drive);
        command.arg("--bind").arg(format!("{}:/disk{how}", disk.display()));
        let (code, text) = run(with_config(command));
        assert_eq!(code, expected, "{how}: {text}");
        assert!(base.is_empty());
    }
    let drive = drive.replace("false", "true");
    let mut command = base.domain("a", "hello", &drive);
    command.arg("--bind").arg(format!("{}:/disk", disk.display()));
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(42), "{text}");
}
