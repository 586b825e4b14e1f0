//! What the tests share: a base for jails, a jailer that runs, and what may not be left of them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_tests::{host, place};
use rustix::process::Pid;
use tempfile::TempDir;

pub const UID: u32 = 61234;
pub const GID: u32 = 61235;
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Tests that count what is there on the whole machine take turns with all others.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    assert!(rustix::process::geteuid().is_root(), "the tests of the jailer have to be run as root");
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A base for jails, and files to bind.
pub struct Base {
    pub directory: TempDir,
}

impl Base {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("jails")).unwrap();
        Self { directory }
    }

    pub fn jails(&self) -> PathBuf {
        self.directory.path().join("jails")
    }

    pub fn root(&self, id: &str) -> PathBuf {
        self.jails().join("cofferdam-vmm").join(id).join("root")
    }

    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// A jailer without arguments for the monitor.
    pub fn jailer(&self, id: &str) -> Command {
        let mut command = Command::new(place::jailer());
        command.args(["--id", id, "--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--exec-file").arg(place::monitor()).arg("--chroot-base-dir").arg(self.jails());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same with `payload` as the kernel and `more` in the configuration, which is bound.
    pub fn domain(&self, id: &str, payload: &str, more: &str) -> Command {
        let config = format!(
            r#"{{"boot-source":{{"kernel_image_path":"/kernel"}},"machine-config":{{"vcpu_count":1,"mem_size_mib":32}},"stop_timeout_ms":200{more}}}"#
        );
        let config = self.file(&format!("{id}.json"), &config);
        let mut command = self.jailer(id);
        command.arg("--bind").arg(format!("{}:/kernel", place::payload(payload).display()));
        command.arg("--bind").arg(format!("{}:/config.json", config.display()));
        command
    }

    pub fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    /// What is in the directory of the jails, and in those.
    pub fn left(&self) -> Vec<PathBuf> {
        let mut found = vec![self.jails()];
        let mut at = 0;
        while let Some(directory) = found.get(at) {
            // Whatever is no directory, or has just gone, has nothing in it.
            let inside = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
            found.extend(inside.collect::<Vec<_>>());
            at += 1;
        }
        found.split_off(1)
    }
}

/// The same in a mount namespace of its own, in which the shell commands `before` were run.
pub fn after(before: &str, command: &Command) -> Command {
    let mut words = host::after(before).into_iter();
    let mut wrapped = Command::new(words.next().unwrap());
    wrapped.args(words).arg(command.get_program()).args(command.get_args());
    wrapped.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    wrapped
}

pub fn with_config(mut command: Command) -> Command {
    command.args(["--", "--config-file", "/config.json"]);
    command
}

/// A jailer that runs; killed when the test is over.
pub struct Running(pub Child);

impl Running {
    /// Starts it, and waits until the monitor listens on this socket in the jail.
    pub fn start(mut command: Command, socket: &Path) -> Self {
        let mut running = Self(command.spawn().unwrap());
        // The file is there a moment before anybody listens.
        let listens = || UnixStream::connect(socket).is_ok();
        let there = wait_until(|| listens() || running.0.try_wait().unwrap().is_some());
        assert!(there && listens(), "{}", running.finish().1);
        running
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    pub fn children(&self) -> Vec<Pid> {
        let path = format!("/proc/{0}/task/{0}/children", self.0.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect()
    }

    /// The child whose program is the monitor.
    pub fn monitor(&self) -> Pid {
        let is_monitor = |pid: &Pid| proc_text(*pid, "comm").trim() == "cofferdam-vmm" || is_executed(*pid);
        self.children().into_iter().find(is_monitor).expect("a monitor")
    }

    pub fn keeper(&self) -> Pid {
        let monitor = self.monitor();
        self.children().into_iter().find(|pid| *pid != monitor).expect("a keeper")
    }

    pub fn finish(&mut self) -> (ExitStatus, String) {
        assert!(wait_until(|| self.0.try_wait().unwrap().is_some()), "the jailer does not end");
        let mut text = String::new();
        if let Some(mut stdout) = self.0.stdout.take() {
            stdout.read_to_string(&mut text).unwrap();
        }
        if let Some(mut stderr) = self.0.stderr.take() {
            stderr.read_to_string(&mut text).unwrap();
        }
        (self.0.wait().unwrap(), text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program executed by descriptor may be named after that: its command line tells.
pub fn is_executed(pid: Pid) -> bool {
    proc_text(pid, "cmdline").starts_with("cofferdam-vmm\0")
}

pub fn proc_text(pid: Pid, name: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{name}", pid.as_raw_nonzero())).unwrap_or_default()
}

pub fn status_field(pid: Pid, name: &str) -> String {
    let text = proc_text(pid, "status");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

pub fn run(mut command: Command) -> (Option<i32>, String) {
    let mut running = Running(command.spawn().unwrap());
    let (status, text) = running.finish();
    (status.code(), text)
}

pub fn names_in(directory: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(directory).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

pub const VSOCK: &str = r#","vsock":{"guest_cid":3,"uds_path":"/v.sock"}"#;

/// The processes of jails of this base: jailer and keeper have it in their command lines, the monitor in its mounts.
pub fn jailed(base: &Base) -> Vec<Pid> {
    let name = base.directory.path().file_name().unwrap().to_str().unwrap();
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Pid::from_raw(entry.ok()?.file_name().to_str()?.parse().ok()?));
    pids.filter(|pid| ["cmdline", "mountinfo"].iter().any(|file| proc_text(*pid, file).contains(name)))
        .collect()
}

/// The cgroups of monitors that are called `id`.
pub fn cgroups(id: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let cgroup = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (mount, kind) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| Path::new(mount).join("cofferdam-vmm").join(id))
    };
    mounts.lines().filter_map(cgroup).filter(|path| path.exists()).collect()
}

/// A setting of a controller that this machine has.
pub fn some_cgroup() -> &'static str {
    let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if unified.split_whitespace().any(|name| name == "pids") || Path::new("/sys/fs/cgroup/pids").exists() {
        "pids.max=33"
    } else {
        panic!("this machine has no cgroup controller pids")
    }
}
