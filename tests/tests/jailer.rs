//! The jailer: what a jailed monitor sees, what it is refused, and that nothing of it stays. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use cofferdam_tests::place;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const UID: u32 = 61234;
const GID: u32 = 61235;
const PATIENCE: Duration = Duration::from_secs(60);

/// Tests that count what is there on the whole machine take turns with all others.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    assert!(rustix::process::geteuid().is_root(), "the tests of the jailer have to be run as root");
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A base for jails, and files to bind.
struct Base {
    directory: TempDir,
}

impl Base {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("jails")).unwrap();
        Self { directory }
    }

    fn jails(&self) -> PathBuf {
        self.directory.path().join("jails")
    }

    fn root(&self, id: &str) -> PathBuf {
        self.jails().join("cofferdam-vmm").join(id).join("root")
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// A jailer without arguments for the monitor.
    fn jailer(&self, id: &str) -> Command {
        let mut command = Command::new(place::jailer());
        command.args(["--id", id, "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--exec-file").arg(place::monitor()).arg("--chroot-base-dir").arg(self.jails());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same with `payload` as the kernel and `more` in the configuration, which is bound.
    fn domain(&self, id: &str, payload: &str, more: &str) -> Command {
        let config = format!(
            r#"{{"boot-source":{{"kernel_image_path":"/kernel"}},"machine-config":{{"vcpu_count":1,"mem_size_mib":32}},"stop_timeout_ms":200{more}}}"#
        );
        let config = self.file(&format!("{id}.json"), &config);
        let mut command = self.jailer(id);
        command.arg("--bind").arg(format!("{}:/kernel", place::payload(payload).display()));
        command.arg("--bind").arg(format!("{}:/config.json", config.display()));
        command
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(self.jails()).unwrap().next().is_none()
    }
}

fn with_config(mut command: Command) -> Command {
    command.args(["--", "--config-file", "/config.json"]);
    command
}

/// A jailer that runs; killed when the test is over.
struct Running(Child);

impl Running {
    /// Starts it, and waits until the guest runs, which the vsock socket in the jail shows.
    fn start(mut command: Command, socket: &Path) -> Self {
        let mut running = Self(command.spawn().unwrap());
        let there = wait_until(|| socket.exists() || running.0.try_wait().unwrap().is_some());
        assert!(there && socket.exists(), "{}", running.finish().1);
        running
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    fn children(&self) -> Vec<Pid> {
        let path = format!("/proc/{0}/task/{0}/children", self.0.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect()
    }

    /// The child whose program is the monitor.
    fn monitor(&self) -> Pid {
        let is_monitor = |pid: &Pid| proc_text(*pid, "comm").trim() == "cofferdam-vmm" || is_executed(*pid);
        self.children().into_iter().find(is_monitor).expect("a monitor")
    }

    fn keeper(&self) -> Pid {
        let monitor = self.monitor();
        self.children().into_iter().find(|pid| *pid != monitor).expect("a keeper")
    }

    fn finish(&mut self) -> (ExitStatus, String) {
        assert!(wait_until(|| self.0.try_wait().unwrap().is_some()), "the jailer does not end");
        let mut text = String::new();
        for pipe in
            [self.0.stdout.take().map(Pipe::Out), self.0.stderr.take().map(Pipe::Err)].into_iter().flatten()
        {
            match pipe {
                Pipe::Out(mut out) => out.read_to_string(&mut text).unwrap(),
                Pipe::Err(mut err) => err.read_to_string(&mut text).unwrap(),
            };
        }
        (self.0.wait().unwrap(), text)
    }
}

enum Pipe {
    Out(std::process::ChildStdout),
    Err(std::process::ChildStderr),
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program executed by descriptor may be named after that: its command line tells.
fn is_executed(pid: Pid) -> bool {
    proc_text(pid, "cmdline").starts_with("cofferdam-vmm\0")
}

fn proc_text(pid: Pid, name: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{name}", pid.as_raw_nonzero())).unwrap_or_default()
}

fn status_field(pid: Pid, name: &str) -> String {
    let text = proc_text(pid, "status");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

fn run(mut command: Command) -> (Option<i32>, String) {
    let mut running = Running(command.spawn().unwrap());
    let (status, text) = running.finish();
    (status.code(), text)
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(directory).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

const VSOCK: &str = r#","vsock":{"guest_cid":3,"uds_path":"/v.sock"}"#;

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
    let expected = ["cofferdam-vmm.pid", "config.json", "dev", "kernel", "v.sock"];
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
    let socket = base.root("a").join("api.sock");
    let mut command = base.domain("a", "hello", "");
    command.args(["--", "--api-sock", "/api.sock"]);
    let mut running = Running::start(command, &socket);
    // The file is there a moment before the socket listens.
    assert!(wait_until(|| UnixStream::connect(&socket).is_ok()));
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = r#"{"boot-source":{"kernel_image_path":"/kernel"}}"#;
    let head = "PUT /vm?start=true HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 20"), "{}", String::from_utf8_lossy(&answer));
    let (status, text) = running.finish();
    assert_eq!(status.code(), Some(42), "{text}");
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

#[test]
fn arguments_that_would_reach_out_of_the_jail_are_refused() {
    let _alone = alone();
    let base = Base::new();
    let long = "x".repeat(65);
    for id in ["", "a/b", "..", ".", "../../etc", long.as_str()] {
        let (code, text) = run(base.jailer(id));
        assert_eq!(code, Some(125), "{id:?}: {text}");
        assert!(text.contains("--id"), "{id:?}: {text}");
    }
    for (option, value) in [
        ("--bind", "/etc/passwd:/../x"),
        ("--bind", "/etc/passwd:/a/../../x"),
        ("--bind", "/etc/../etc/passwd"),
        ("--bind", "/etc:/"),
        ("--parent-cgroup", "../x"),
        ("--parent-cgroup", "/x"),
        ("--cgroup", "../memory.max=1"),
        ("--cgroup", "cgroup.procs=1"),
        ("--device", "mem"),
        ("--resource-limit", "nproc=1"),
        ("--fd", "2"),
    ] {
        let mut command = base.jailer("a");
        command.args([option, value]);
        let (code, text) = run(command);
        assert_eq!(code, Some(125), "{option} {value}: {text}");
        assert!(text.contains(option), "{option} {value}: {text}");
    }
    assert!(base.is_empty());
}

#[test]
fn errors_say_step_call_and_path_and_leave_nothing() {
    let _alone = alone();
    let base = Base::new();
    let script = base.file("script", "#!/bin/sh\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for (arguments, words) in [
        (["--bind", "/no/such:/file"], &["chroot", "open /no/such", "No such file"][..]),
        (["--bind", "/etc/passwd:/dev/kvm/x"], &["chroot", "--bind", "kvm"]),
        (["--netns", "/no/such"], &["namespaces", "open /no/such"]),
        (["--netns", "/etc/passwd"], &["namespaces", "setns /etc/passwd"]),
        (["--cgroup", "nosuch.max=1"], &["cgroup", "nosuch"]),
        (["--exec-file", "/no/such"], &["--exec-file /no/such", "No such file"]),
        (["--exec-file", "/etc"], &["--exec-file /etc"]),
        (["--exec-file", script.to_str().unwrap()], &["exec", "script", "static"]),
        (["--fd", "913"], &["descriptor 913"]),
        (["--resource-limit", "no-file=99999999999"], &["limits", "no-file", "setrlimit"]),
    ] {
        let mut command = base.jailer("a");
        if arguments[0] == "--exec-file" {
            command = Command::new(place::jailer());
            command.args(["--id", "a", "--uid", "1", "--gid", "1", "--chroot-base-dir"]).arg(base.jails());
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        command.args(arguments);
        let (code, text) = run(command);
        assert_eq!(code, Some(125), "{arguments:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
        assert!(base.is_empty(), "{arguments:?}");
    }
}

#[test]
fn links_of_a_previous_occupant_lead_nowhere() {
    let _alone = alone();
    let base = Base::new();
    let outside = tempfile::tempdir().unwrap();
    for link in ["kernel", "dev", "config.json", "deep"] {
        fs::create_dir_all(base.root("a")).unwrap();
        symlink(outside.path(), base.root("a").join(link)).unwrap();
        let mut command = base.domain("a", "hello", "");
        command.args(["--bind", "/etc/passwd:/deep/down/file"]);
        let (code, text) = run(with_config(command));
        assert_eq!(code, Some(125), "{link}: {text}");
        assert!(text.contains("symbolic link") && text.contains(link), "{link}: {text}");
        assert!(names_in(outside.path()).is_empty(), "{link}");
        // What was prepared stays, and only that.
        assert_eq!(names_in(&base.root("a")), BTreeSet::from([link.to_owned()]));
        fs::remove_dir_all(base.jails().join("cofferdam-vmm")).unwrap();
    }
}

#[test]
fn a_prepared_root_keeps_what_was_in_it() {
    let _alone = alone();
    let base = Base::new();
    fs::create_dir_all(base.root("a")).unwrap();
    fs::hard_link(base.file("there", "x"), base.root("a").join("there")).unwrap();
    let (code, text) = run(with_config(base.domain("a", "hello", VSOCK)));
    assert_eq!(code, Some(42), "{text}");
    assert_eq!(names_in(&base.root("a")), BTreeSet::from(["there".to_owned()]));
    assert_eq!(names_in(base.root("a").parent().unwrap()), BTreeSet::from(["root".to_owned()]));
}

#[test]
fn an_id_in_use_is_refused() {
    let _alone = alone();
    let base = Base::new();
    let socket = base.root("a").join("v.sock");
    let mut first = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("in use"), "{text}");
    kill_process(first.pid(), Signal::TERM).unwrap();
    assert_eq!(first.finish().0.code(), Some(143));
    assert!(base.is_empty());
}

#[test]
fn whichever_process_is_killed_all_goes() {
    let _alone = alone();
    let base = Base::new();
    let socket = base.root("a").join("v.sock");
    let who: [fn(&Running) -> Pid; 2] = [Running::pid, Running::monitor];
    for pid_of in who {
        let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
        let monitor = running.monitor();
        kill_process(pid_of(&running), Signal::KILL).unwrap();
        running.finish();
        assert!(wait_until(|| base.is_empty() && !is_executed(monitor)));
    }
    // Without its keeper the jail goes on, and ends as cleanly.
    let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    kill_process(running.keeper(), Signal::KILL).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(UnixStream::connect(&socket).is_ok());
    kill_process(running.pid(), Signal::TERM).unwrap();
    assert_eq!(running.finish().0.code(), Some(143));
    assert!(base.is_empty());
    // When both are killed at once, the next jail of this id removes what is left.
    let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    let monitor = running.monitor();
    kill_process(running.keeper(), Signal::KILL).unwrap();
    kill_process(running.pid(), Signal::KILL).unwrap();
    running.finish();
    assert!(wait_until(|| !is_executed(monitor)));
    assert!(!base.is_empty());
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(42), "{text}");
    assert!(base.is_empty());
}

#[test]
fn a_daemon_runs_on_without_its_starter() {
    let _alone = alone();
    let base = Base::new();
    let mut command = base.domain("a", "spin", VSOCK);
    command.arg("--daemonize");
    // Ends when the pipes do, so nobody may have kept them.
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(0), "{text}");
    assert!(wait_until(|| base.root("a").join("v.sock").exists()));
    let pid_file = fs::read_to_string(base.root("a").join("cofferdam-vmm.pid")).unwrap();
    let monitor = Pid::from_raw(pid_file.parse().unwrap()).unwrap();
    assert_eq!(
        fs::read_link(format!("/proc/{}/fd/1", monitor.as_raw_nonzero())).unwrap(),
        Path::new("/dev/null")
    );
    kill_process(monitor, Signal::KILL).unwrap();
    assert!(wait_until(|| base.is_empty() && jailed(&base).is_empty()));
    let mut command = base.jailer("a");
    command.args(["--daemonize", "--bind", "/no/such"]);
    let (code, text) = run(command);
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("/no/such"), "{text}");
}

/// The jailer's processes of this base: their command lines name it, and their children are theirs.
fn jailed(base: &Base) -> Vec<Pid> {
    let name = base.jails().display().to_string();
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| {
        let root = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).unwrap_or_default();
        proc_text(*pid, "cmdline").contains(&name)
            || (is_executed(*pid)
                && status_field(*pid, "Uid").starts_with(&UID.to_string())
                && root.is_absolute())
    })
    .collect()
}

/// Directories of cgroups that belong to monitors.
fn cgroups() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let cgroup = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (mount, kind) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| Path::new(mount).join("cofferdam-vmm"))
    };
    mounts.lines().filter_map(cgroup).filter(|path| path.exists()).collect()
}

/// A setting of a controller that this machine has.
fn some_cgroup() -> &'static str {
    let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if unified.split_whitespace().any(|name| name == "pids") || Path::new("/sys/fs/cgroup/pids").exists() {
        "pids.max=33"
    } else {
        panic!("this machine has no cgroup controller pids")
    }
}

#[test]
fn a_cgroup_holds_its_limit_while_the_domain_lives() {
    let _alone = alone();
    let base = Base::new();
    let mut command = base.domain("a", "spin", VSOCK);
    command.args(["--cgroup", some_cgroup()]);
    let mut running = Running::start(with_config(command), &base.root("a").join("v.sock"));
    let [parent] = &cgroups()[..] else { panic!("{:?}", cgroups()) };
    let directory = parent.join("a");
    assert_eq!(fs::read_to_string(directory.join("pids.max")).unwrap().trim(), "33");
    let inside = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), running.monitor().as_raw_nonzero().to_string());
    kill_process(running.pid(), Signal::KILL).unwrap();
    running.finish();
    assert!(wait_until(|| base.is_empty() && cgroups().is_empty()));
    let mut command = base.domain("a", "hello", "");
    command.args(["--cgroup", "pids.max=nonsense"]);
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("cgroup: write") && text.contains("pids.max"), "{text}");
    assert!(base.is_empty() && cgroups().is_empty());
}

#[test]
fn somebody_who_is_not_root_has_jails_too() {
    let _alone = alone();
    let base = Base::new();
    let nobody = 65534;
    fs::set_permissions(base.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(base.jails(), Some(nobody), Some(nobody)).unwrap();
    let jailer = base.directory.path().join("jailer");
    let monitor = base.directory.path().join("cofferdam-vmm");
    fs::copy(place::jailer(), &jailer).unwrap();
    fs::copy(place::monitor(), &monitor).unwrap();
    let jail = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&jailer);
        command.args(["--id", "a", "--uid", "7", "--gid", "8", "--chroot-base-dir"]).arg(base.jails());
        command.arg("--exec-file").arg(&monitor).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        run(command)
    };
    let (code, text) = jail(&["--", "--version"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("offerdam"), "{text}");
    // The domain itself needs /dev/kvm, which nobody may open: it gets as far as its configuration.
    let (code, text) = jail(&["--bind", "/etc/passwd:/c", "--", "--config-file", "/c"]);
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("/c"), "{text}");
    assert!(base.is_empty());
}

#[test]
fn fifty_jails_a_third_of_them_killed_leave_nothing() {
    let _alone = alone();
    let base = Base::new();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let mut seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    for batch in 0..10 {
        // The first two of each batch would run for ever.
        let mut jails: Vec<Running> = (0..5)
            .map(|at| {
                let payload = if at < 2 { "spin" } else { "hello" };
                let mut command = base.domain(&format!("d{}", batch * 5 + at), payload, VSOCK);
                command.args(["--cgroup", some_cgroup()]);
                Running(with_config(command).spawn().unwrap())
            })
            .collect();
        for victim in jails.iter().take(2) {
            thread::sleep(Duration::from_millis(u64::from(random(30))));
            let family: Vec<Pid> = [victim.pid()].into_iter().chain(victim.children()).collect();
            let target = family[random(u32::try_from(family.len()).unwrap()) as usize];
            kill_process(target, Signal::KILL).unwrap_or_default();
            // If that was the keeper, the domain goes on; else this reaches nobody.
            kill_process(victim.pid(), Signal::TERM).unwrap_or_default();
        }
        for (at, jail) in jails.iter_mut().enumerate() {
            let (status, text) = jail.finish();
            assert!(at < 2 || status.code() == Some(42), "{status}: {text}");
            assert!(at >= 2 || status.code() != Some(0), "{status}: {text}");
        }
    }
    let clean = wait_until(|| base.is_empty() && cgroups().is_empty() && jailed(&base).is_empty());
    let left = Command::new("find").arg(base.jails()).output().map(|found| found.stdout);
    assert!(
        clean,
        "{}{:?}{:?}",
        String::from_utf8_lossy(&left.unwrap_or_default()),
        cgroups(),
        jailed(&base)
    );
    assert_eq!(mounts(), before);
}
