//! Inherited descriptors in place of paths, and sockets that a service manager passes.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_tests::api::{ApiMonitor, Connection};
use cofferdam_tests::place;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(240);
const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// Lets children inherit `file`; how they name it. What else this process starts meanwhile inherits it too, and
/// does not know.
fn inherit(file: &impl AsFd) -> String {
    fcntl_setfd(file, FdFlags::empty()).unwrap();
    format!("fd:{}", file.as_fd().as_raw_fd())
}

fn number(name: &str) -> RawFd {
    name.strip_prefix("fd:").unwrap().parse().unwrap()
}

fn image(folder: &Path, name: &str, sectors: usize, byte: u8) -> File {
    let path = folder.join(name);
    fs::write(&path, vec![byte; 512 * sectors]).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// Reads until `text` has come; all that has.
fn read_until(from: &mut impl Read, text: &str) -> String {
    let mut read = Vec::new();
    let mut byte = [0];
    while !read.ends_with(text.as_bytes()) {
        let seen = || String::from_utf8_lossy(&read).into_owned();
        from.read_exact(&mut byte).unwrap_or_else(|error| panic!("no {text:?} in {:?}: {error}", seen()));
        read.push(byte[0]);
    }
    String::from_utf8(read).unwrap()
}

fn console() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    (ours, theirs)
}

fn ask(api: &Path, request: &str, body: &str) -> (u16, Value) {
    let mut connection = Connection::to(api).unwrap();
    connection.send(request, body);
    connection.answer()
}

/// Whether descriptor `fd` of process `pid` is what it is here.
fn has(pid: u32, fd: RawFd) -> bool {
    let file = |process: &str| fs::read_link(format!("/proc/{process}/fd/{fd}")).ok();
    file(&pid.to_string()).is_some_and(|there| Some(there) == file("self"))
}

/// A process; killed when the test is over.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Its exit status, and what it has said on standard error.
    fn finish(mut self) -> (Option<i32>, String) {
        let end = Instant::now() + PATIENCE;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "it does not end");
            thread::sleep(Duration::from_millis(2));
        }
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.0.wait().unwrap().code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_domain_of_descriptors_only_and_a_drive_of_another_one() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = File::open(place::payload("changing-disk")).unwrap();
    let (disk, other) = (image(folder.path(), "disk", 4, 1), image(folder.path(), "other", 9, 2));
    let (mut ours, theirs) = console();
    let names = [inherit(&kernel), inherit(&disk), inherit(&other), inherit(&theirs)];
    let monitor = ApiMonitor::start(folder.path());
    let [kernel_fd, disk_fd, other_fd, console_fd] = &names;
    monitor.done("PUT /boot-source", &json!({"kernel_image_path": kernel_fd}).to_string());
    monitor.done("PUT /drives/d", &json!({"drive_id": "d", "path_on_host": disk_fd}).to_string());
    monitor.done("PUT /serial", &json!({"serial_out_path": console_fd}).to_string());
    monitor.done("PUT /actions", START);
    // A socket has two directions: the console has an input.
    assert!(read_until(&mut ours, "\n").starts_with("start 0: 4 sectors, first byte 1"));
    ours.write_all(b".").unwrap();
    assert!(read_until(&mut ours, "\n").starts_with("look 0: "));
    // Taken over, they are gone under their old numbers; what nobody has named yet is still there.
    let pid = monitor.child().id();
    let there = names.each_ref().map(|name| has(pid, number(name)));
    assert_eq!(there, [false, false, true, false]);
    let patch = |name: &String| json!({"drive_id": "d", "path_on_host": name}).to_string();
    monitor.done("PATCH /drives/d", &patch(other_fd));
    assert!(read_until(&mut ours, "\n").starts_with("change 1: 9 sectors, first byte 2"));
    for name in [disk_fd, other_fd] {
        let message = monitor.refusal("PATCH /drives/d", &patch(name));
        assert!(message.starts_with(&format!("drives[0].path_on_host: {name}: ")), "{message}");
    }
    let message = monitor.refusal("PATCH /drives/d", &patch(kernel_fd));
    assert!(
        message.contains(&format!("{kernel_fd} is given twice; boot-source.kernel_image_path has it")),
        "{message}"
    );
    ours.write_all(b"q").unwrap();
    assert_eq!(monitor.finish().code(), Some(0));
}

#[test]
fn the_wrong_kind_is_refused_by_field_and_a_failed_launch_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = File::open(place::payload("hello")).unwrap();
    let (disk, odd) = (image(folder.path(), "disk", 4, 1), image(folder.path(), "odd", 1, 1));
    odd.set_len(700).unwrap();
    let reading = File::open(folder.path().join("disk")).unwrap();
    let (mut ours, theirs) = console();
    let listener = UnixListener::bind(folder.path().join("v.sock")).unwrap();
    let (directory, null) = (File::open("/").unwrap(), File::open("/dev/null").unwrap());
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (block, authentication) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    block.set_len(96).unwrap();
    authentication.set_len(4096).unwrap();
    let [kernel, block, authentication, disk, odd, reading, serial, vsock, directory, null, pipe] = [
        inherit(&kernel),
        inherit(&block),
        inherit(&authentication),
        inherit(&disk),
        inherit(&odd),
        inherit(&reading),
        inherit(&theirs),
        inherit(&listener),
        inherit(&directory),
        inherit(&null),
        inherit(&pipe),
    ];
    let monitor = ApiMonitor::start(folder.path());
    let boot = |path: &str| json!({"kernel_image_path": path}).to_string();
    let initrd = |path: &str| json!({"kernel_image_path": kernel, "initrd_path": path}).to_string();
    let drive = |path: &str| json!({"drive_id": "d", "path_on_host": path}).to_string();
    let socket = |path: &str| json!({"guest_cid": 3, "uds_path": path}).to_string();
    let output = |path: &str| json!({"serial_out_path": path}).to_string();
    let no_disk = "neither a regular file nor a block device";
    let before = monitor.ask("GET /vm/config", "").1;
    for (request, body, field, reason) in [
        ("PUT /boot-source", boot("fd:999"), "boot-source.kernel_image_path", "no such descriptor is open"),
        (
            "PUT /boot-source",
            boot("fd:1"),
            "boot-source.kernel_image_path",
            "\"1\" is not a descriptor from 3 on",
        ),
        (
            "PUT /boot-source",
            boot("fd:"),
            "boot-source.kernel_image_path",
            "\"\" is not a descriptor from 3 on",
        ),
        ("PUT /boot-source", boot(&directory), "boot-source.kernel_image_path", "not a regular file"),
        ("PUT /boot-source", boot(&vsock), "boot-source.kernel_image_path", "not a regular file"),
        ("PUT /boot-source", initrd(&pipe), "boot-source.initrd_path", "not a regular file"),
        (
            "PUT /boot-source",
            initrd(&kernel),
            "boot-source.initrd_path",
            "is given twice; boot-source.kernel_image_path",
        ),
        ("PUT /drives/d", drive("fd:999"), "drives[0].path_on_host", "no such descriptor is open"),
        ("PUT /drives/d", drive(&directory), "drives[0].path_on_host", no_disk),
        ("PUT /drives/d", drive(&null), "drives[0].path_on_host", no_disk),
        ("PUT /drives/d", drive(&serial), "drives[0].path_on_host", no_disk),
        ("PUT /drives/d", drive(&reading), "drives[0].path_on_host", "no permission to open it for writing"),
        ("PUT /drives/d", drive(&odd), "drives[0].path_on_host", "its 700 bytes are not a multiple"),
        ("PUT /vsock", socket("fd:999"), "vsock.uds_path", "no such descriptor is open"),
        ("PUT /vsock", socket(&serial), "vsock.uds_path", "it is no Unix stream socket that listens"),
        ("PUT /vsock", socket(&disk), "vsock.uds_path", "it is no Unix stream socket that listens"),
        ("PUT /serial", output("fd:999"), "serial.serial_out_path", "no such descriptor is open"),
        ("PUT /serial", output(&reading), "serial.serial_out_path", "it is not open for writing"),
        ("PUT /serial", output(&pipe), "serial.serial_out_path", "it is not open for writing"),
        ("PUT /serial", output(&vsock), "serial.serial_out_path", "a socket that listens, and no connection"),
    ] {
        let message = monitor.refusal(request, &body);
        assert!(
            message.starts_with(&format!("{field}: ")) && message.contains(reason),
            "{request} {body}: {message}"
        );
    }
    assert_eq!(monitor.ask("GET /vm/config", "").1, before);

    // Everything is opened, and the console, which is last, fails. (What is for SEV-SNP is read on any host.)
    let config = json!({
        "boot-source": {"kernel_image_path": kernel},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [{"drive_id": "d", "path_on_host": disk}],
        "vsock": {"guest_cid": 3, "uds_path": vsock},
        "serial": {"serial_out_path": folder.path().join("no/where")},
        "confidential": {"snp": {"id_block": block, "id_auth": authentication}},
    });
    monitor.done("PUT /vm", &config.to_string());
    for _ in 0..3 {
        let message = monitor.refusal("PUT /actions", START);
        assert!(message.starts_with("serial.serial_out_path: "), "{message}");
    }
    let unlocked = File::open(folder.path().join("disk")).unwrap();
    rustix::fs::flock(&unlocked, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let message = monitor.refusal("PUT /actions", START);
    assert!(message.starts_with("drives[0].path_on_host: fd:") && message.contains("locked"), "{message}");
    drop(unlocked);
    monitor.done("PUT /serial", &output(&serial));
    monitor.done("PUT /actions", START);
    drop(theirs);
    assert!(read_until(&mut ours, "payload").ends_with("hello from a payload"));
    assert_eq!(monitor.finish().code(), Some(42));
    assert!(folder.path().join("v.sock").exists(), "it is not the monitor's");
}

#[test]
fn programs_reach_the_guest_by_an_inherited_socket_and_the_guest_reaches_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let _program = UnixListener::bind(folder.path().join("v.sock_5000")).unwrap();
    let vsock = inherit(&listener);
    let domain = |mode: &str| {
        json!({
            "boot-source": {"kernel_image_path": place::payload("streams"), "boot_args": mode},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
            "vsock": {"guest_cid": 3, "uds_path": vsock},
        })
    };
    let mut monitor = ApiMonitor::start(folder.path());
    monitor.done("PUT /vm?start=true", &domain("mode=serve count=1").to_string());
    let (_, mut output) = monitor.console();
    read_until(&mut output, "ready");
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    assert!(read_until(&mut stream, "\n").starts_with("OK "));
    stream.write_all(b"eight by").unwrap();
    read_until(&mut stream, "eight by");
    drop(stream);
    read_until(&mut output, "1 answered, 0 refused");
    assert_eq!(monitor.finish().code(), Some(0));

    let mut monitor = ApiMonitor::start(folder.path());
    monitor.done("PUT /vm?start=true", &domain("mode=each count=1").to_string());
    let (_, mut output) = monitor.console();
    assert!(read_until(&mut output, "refused").contains("0 answered, 1 refused"));
    monitor.finish();
}

/// Starts the monitor as a service manager would: with `sockets` as descriptors 3, 4 … and these variables, of which
/// `$$` is its process id.
fn activated(sockets: &[&UnixListener], variables: &str, arguments: &[&str]) -> Running {
    let moves = sockets.iter().enumerate().map(|(index, socket)| {
        inherit(socket);
        // By way of high numbers, lest one is overwritten before it is moved.
        (
            format!("exec {}<&{}; ", 200 + index, socket.as_raw_fd()),
            format!("exec {}<&{}; ", 3 + index, 200 + index),
        )
    });
    let (up, down): (Vec<_>, Vec<_>) = moves.unzip();
    let script = format!("{}{}{variables} exec \"$0\" \"$@\"", up.concat(), down.concat());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).arg(place::monitor()).args(arguments);
    command.env_remove("LISTEN_PID").env_remove("LISTEN_FDS").env_remove("LISTEN_FDNAMES");
    Running::start(&mut command)
}

fn refusal(monitor: Running) -> String {
    let (code, message) = monitor.finish();
    assert_eq!(code, Some(125), "{message}");
    message
}

#[test]
fn a_socket_that_a_service_manager_passes_is_the_api_s() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    for names in ["", "LISTEN_FDNAMES=cofferdam.socket "] {
        let child = activated(&[&listener], &format!("LISTEN_PID=$$ LISTEN_FDS=1 {names}"), &["--id", "a"]);
        assert_eq!(ask(&path, "GET /", "").1["id"], json!("a"));
        assert_eq!(ask(&path, "DELETE /vm", "").0, 204);
        assert_eq!(child.finish().0, Some(143));
        assert!(path.exists(), "it is the service manager's");
    }
}

#[test]
fn of_several_sockets_the_one_called_api_is_the_api_s_and_the_others_are_there_for_the_domain() {
    let folder = tempfile::tempdir().unwrap();
    let (path, vsock) = (folder.path().join("api.sock"), folder.path().join("v.sock"));
    let sockets = [&UnixListener::bind(&vsock).unwrap(), &UnixListener::bind(&path).unwrap()];
    let child = activated(&sockets, "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=vsock:api", &[]);
    let config = json!({
        "boot-source": {"kernel_image_path": place::payload("spin")},
        "vsock": {"guest_cid": 3, "uds_path": "fd:3"},
        "serial": {"mode": "None"},
        "stop_timeout_ms": 100,
    });
    assert_eq!(ask(&path, "PUT /vm?start=true", &config.to_string()), (204, Value::Null));
    assert_eq!(ask(&path, "DELETE /vm", "").0, 204);
    assert_eq!(child.finish().0, Some(143));
    for names in ["", "LISTEN_FDNAMES=a:b", "LISTEN_FDNAMES=api:api"] {
        let message = refusal(activated(&sockets, &format!("LISTEN_PID=$$ LISTEN_FDS=2 {names}"), &[]));
        assert!(message.contains("one of 2 sockets has to be called \"api\""), "{message}");
    }
}

#[test]
fn sockets_for_another_process_or_of_another_kind_are_not_served() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("api.sock")).unwrap();
    for variables in
        ["LISTEN_PID=1 LISTEN_FDS=1", "LISTEN_FDS=1", "LISTEN_PID=$$", "LISTEN_PID=$$ LISTEN_FDS=0"]
    {
        let message = refusal(activated(&[&listener], variables, &[]));
        assert!(message.contains("there is nothing to start"), "{variables}: {message}");
    }
    for (variables, words) in [
        ("LISTEN_PID=$$ LISTEN_FDS=many", "LISTEN_FDS: \"many\" is no number"),
        ("LISTEN_PID=me LISTEN_FDS=1", "LISTEN_PID: \"me\" is no number"),
    ] {
        let message = refusal(activated(&[&listener], variables, &[]));
        assert!(message.contains(words), "{variables}: {message}");
    }
    let (connected, _other) = UnixStream::pair().unwrap();
    let connected = UnixListener::from(std::os::fd::OwnedFd::from(connected));
    let message = refusal(activated(&[&connected], "LISTEN_PID=$$ LISTEN_FDS=1", &[]));
    assert!(message.contains("LISTEN_FDS: fd:3: it is no Unix stream socket that listens"), "{message}");
}

#[test]
fn what_the_command_line_says_comes_before_what_is_passed() {
    let folder = tempfile::tempdir().unwrap();
    let (passed, named) = (folder.path().join("passed"), folder.path().join("named"));
    let listener = UnixListener::bind(&passed).unwrap();
    let variables = "LISTEN_PID=$$ LISTEN_FDS=1";
    let child = activated(&[&listener], variables, &["--api-sock", named.to_str().unwrap()]);
    let end = Instant::now() + PATIENCE;
    while UnixStream::connect(&named).is_err() {
        assert!(Instant::now() < end, "nobody listens");
        thread::sleep(Duration::from_millis(1));
    }
    let third = fs::read_link(format!("/proc/{}/fd/3", child.0.id())).unwrap();
    assert!(third.to_str().unwrap().starts_with("socket:"), "it is there to be named by the configuration");
    assert_eq!(ask(&named, "DELETE /vm", "").0, 204);
    assert_eq!(child.finish().0, Some(143));

    let config =
        json!({"boot-source": {"kernel_image_path": place::payload("hello")}, "serial": {"mode": "None"}});
    let file = folder.path().join("config");
    fs::write(&file, config.to_string()).unwrap();
    let child = activated(&[&listener], variables, &["--no-api", "--config-file", file.to_str().unwrap()]);
    assert_eq!(child.finish().0, Some(42));
    // The systemd of an older unit: its first descriptor by number.
    let child = activated(&[&listener], variables, &["--api-sock", "fd:3"]);
    assert_eq!(ask(&passed, "DELETE /vm", "").0, 204);
    assert_eq!(child.finish().0, Some(143));
}

#[test]
fn a_descriptor_given_twice_on_the_command_line_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let name = inherit(&listener);
    let twice = ["--api-sock", &name, "--config-file", &name];
    let output = Command::new(place::monitor()).args(twice).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{message}");
    assert!(message.contains(&format!("--config-file {name}: {name}: it was not inherited")), "{message}");
}

#[test]
fn a_jailed_monitor_needs_no_path() {
    assert!(rustix::process::geteuid().is_root(), "the tests of the jailer have to be run as root");
    let folder = tempfile::tempdir().unwrap();
    let jails = folder.path().join("jails");
    fs::create_dir(&jails).unwrap();
    let (api, vsock) = (folder.path().join("api.sock"), folder.path().join("v.sock"));
    let (api_listener, vsock_listener) =
        (UnixListener::bind(&api).unwrap(), UnixListener::bind(&vsock).unwrap());
    let kernel = File::open(place::payload("changing-disk")).unwrap();
    let disk = image(folder.path(), "disk", 4, 1);
    let status = File::create(folder.path().join("status")).unwrap();
    let (mut ours, theirs) = console();
    let [kernel_fd, disk_fd, vsock_fd, console_fd] =
        [inherit(&kernel), inherit(&disk), inherit(&vsock_listener), inherit(&theirs)];
    let listed =
        [&kernel_fd, &disk_fd, &vsock_fd, &console_fd].map(|name| number(name).to_string()).join(",");
    let mut jailer = Command::new(place::jailer());
    jailer
        .args(["--id", "no-path", "--uid", "61234", "--gid", "61235", "--fd", &listed, "--exec-file"])
        .arg(place::monitor())
        .arg("--chroot-base-dir")
        .arg(&jails)
        .args(["--", "--api-sock", &inherit(&api_listener), "--status-file", &inherit(&status)]);
    let child = Running::start(&mut jailer);
    let config = json!({
        "boot-source": {"kernel_image_path": kernel_fd},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [{"drive_id": "d", "path_on_host": disk_fd}],
        "vsock": {"guest_cid": 3, "uds_path": vsock_fd},
        "serial": {"serial_out_path": console_fd},
    });
    assert_eq!(ask(&api, "PUT /vm?start=true", &config.to_string()), (204, Value::Null));
    assert!(read_until(&mut ours, "\n").starts_with("start 0: 4 sectors, first byte 1"));
    let root = jails.join("cofferdam-vmm/no-path/root");
    let names: BTreeSet<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["cofferdam-vmm.pid", "dev", "run"].map(Into::into).into());
    ours.write_all(b"q").unwrap();
    assert_eq!(child.finish().0, Some(0));
    let told = fs::read_to_string(folder.path().join("status")).unwrap();
    assert!(told.contains("\"event\":\"stopped\""), "{told}");
}
