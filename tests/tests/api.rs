//! The REST API of the shipped monitor, with tiny guests on this machine's own `/dev/kvm`.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::host::raise_descriptor_limit;
use cofferdam_tests::place;
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const PAUSE: &str = r#"{"state": "Paused"}"#;
const RESUME: &str = r#"{"state": "Resumed"}"#;

fn monitor() -> (TempDir, ApiMonitor) {
    let folder = tempfile::tempdir().unwrap();
    let monitor = ApiMonitor::start(folder.path());
    (folder, monitor)
}

/// The whole configuration of a domain of `payload`.
fn config(payload: &str) -> Value {
    json!({
        "boot-source": {"kernel_image_path": place::payload(payload)},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "stop_timeout_ms": 100,
    })
}

fn quiet(payload: &str) -> String {
    let mut config = config(payload);
    config["serial"] = json!({"mode": "None"});
    config.to_string()
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().count() == 0
}

#[test]
fn a_domain_is_configured_call_by_call() {
    let (folder, monitor) = monitor();
    let (status, info) = monitor.ask("GET /", "");
    assert_eq!(status, 200);
    assert_eq!((&info["id"], &info["state"]), (&json!("under-test"), &json!("Not started")));
    let kernel = json!({"kernel_image_path": place::payload("hello"), "boot_args": "quiet"}).to_string();
    monitor.done("PUT /boot-source", &kernel);
    monitor.done("PUT /machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "smt": false}"#);
    monitor.done("PATCH /machine-config", r#"{"vcpu_count": 2}"#);
    let log = folder.path().join("console");
    monitor.done("PUT /serial", &json!({"serial_out_path": log}).to_string());
    let image = folder.path().join("image");
    fs::write(&image, [0; 4096]).unwrap();
    let drive =
        json!({"drive_id": "root", "path_on_host": image, "is_root_device": false, "is_read_only": true});
    monitor.done("PUT /drives/root", &drive.to_string());
    let socket = folder.path().join("v.sock");
    monitor.done("PUT /vsock", &json!({"guest_cid": 3, "uds_path": socket}).to_string());
    let (_, machine) = monitor.ask("GET /machine-config", "");
    let expected = json!({
        "vcpu_count": 2, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
    });
    assert_eq!(machine, expected);
    let (_, whole) = monitor.ask("GET /vm/config", "");
    assert_eq!(whole["drives"][0]["path_on_host"], json!(image));
    assert_eq!(whole["boot-source"]["boot_args"], json!("quiet"));

    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    monitor.done("PUT /actions", START);
    let (status, end) = waiting.answer();
    assert_eq!(status, 200);
    assert_eq!((&end["state"], &end["exit_reason"]), (&json!("Stopped"), &json!("power_off")));
    assert_eq!((&end["exit_code"], &end["protected"]), (&json!(42), &json!(false)));
    assert!(end["phases"]["user_space"].as_u64() > end["phases"]["launched"].as_u64(), "{end}");
    assert_eq!(monitor.finish().code(), Some(42));
    assert_eq!(fs::read_to_string(log).unwrap(), "hello from a payload\n");
    assert!(!socket.exists() && !folder.path().join("api.sock").exists());
}

#[test]
fn a_domain_is_configured_and_started_in_one_body() {
    let (folder, monitor) = monitor();
    monitor.done("PUT /vm?start=true", &quiet("spin"));
    let (_, status) = monitor.ask("GET /vm", "");
    assert_eq!((&status["state"], &status["platform"]), (&json!("Running"), &json!("plain")));
    assert_eq!((&status["protected"], &status["exit_reason"]), (&json!(false), &Value::Null));
    assert!(status["phases"]["running"].as_u64() > Some(0), "{status}");
    let (status, waited) = monitor.ask("GET /vm/wait?timeout_ms=20", "");
    assert_eq!((status, &waited["state"]), (200, &json!("Running")));
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait?timeout_ms=60000", "");
    // The guest does not listen to its power button: it is stopped hard at the deadline.
    monitor.done("DELETE /vm", "");
    let (_, end) = waiting.answer();
    assert_eq!(end["exit_reason"], json!("stopped"));
    assert!(end["message"].as_str().unwrap().contains("did not power off"), "{end}");
    assert_eq!(monitor.finish().code(), Some(143));
    assert!(is_empty(folder.path()));
}

#[test]
fn a_stop_may_be_asked_for_again_and_again() {
    let (_folder, monitor) = monitor();
    let config = quiet("spin").replace("\"stop_timeout_ms\":100", "\"stop_timeout_ms\":3600000");
    monitor.done("PUT /vm", &config);
    monitor.done("PUT /actions", START);
    monitor.done("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#);
    for _ in 0..3 {
        monitor.done("DELETE /vm", "");
    }
    assert_eq!(monitor.state(), "Running");
    // A signal after that is a second one, which is hard.
    kill_process(Pid::from_child(monitor.child()), Signal::TERM).unwrap();
    assert_eq!(monitor.finish().code(), Some(143));
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let (_folder, mut monitor) = monitor();
    monitor.done("PUT /vm?start=true", &config("echo").to_string());
    let (mut input, mut output) = monitor.console();
    let (sender, echoed) = mpsc::channel();
    thread::spawn(move || {
        let mut byte = [0];
        while output.read_exact(&mut byte).is_ok() && sender.send(byte[0]).is_ok() {}
    });
    input.write_all(b"A").unwrap();
    while echoed.recv_timeout(Duration::from_secs(240)).unwrap() != b'A' {}
    monitor.done("PATCH /vm", PAUSE);
    monitor.done("PATCH /vm", PAUSE);
    assert_eq!(monitor.state(), "Paused");
    input.write_all(b"B").unwrap();
    assert!(echoed.recv_timeout(Duration::from_millis(200)).is_err(), "a paused guest answers");
    monitor.done("PATCH /vm", RESUME);
    assert_eq!(monitor.state(), "Running");
    assert_eq!(echoed.recv_timeout(Duration::from_secs(240)), Ok(b'B'));
    input.write_all(b"q").unwrap();
    assert_eq!(monitor.finish().code(), Some(0));
}

#[test]
fn a_paused_domain_is_stopped_hard() {
    let (_folder, monitor) = monitor();
    monitor.done("PUT /vm?start=true", &quiet("spin"));
    monitor.done("PATCH /vm", PAUSE);
    monitor.done("DELETE /vm", "");
    assert_eq!(monitor.finish().code(), Some(143));
}

#[test]
fn a_start_that_fails_changes_nothing() {
    let (folder, monitor) = monitor();
    assert!(monitor.refusal("PUT /actions", START).contains("boot-source: is missing"));
    let nowhere = json!({"boot-source": {"kernel_image_path": folder.path().join("nowhere")}}).to_string();
    let message = monitor.refusal("PUT /vm?start=true", &nowhere);
    assert!(message.contains("nowhere"), "{message}");
    assert_eq!(monitor.ask("GET /vm/config", "").1["boot-source"], Value::Null);
    // The vsock device's socket is made before the console fails, and goes with the launch.
    let mut config = config("hello");
    config["vsock"] = json!({"guest_cid": 3, "uds_path": folder.path().join("v.sock")});
    config["serial"] = json!({"serial_out_path": folder.path().join("no/where")});
    monitor.done("PUT /vm", &config.to_string());
    let message = monitor.refusal("PUT /actions", START);
    assert!(message.starts_with("serial.serial_out_path: "), "{message}");
    assert_eq!(monitor.state(), "Not started");
    assert!(!folder.path().join("v.sock").exists());
    monitor.done("PUT /serial", r#"{"mode": "None"}"#);
    monitor.done("PUT /actions", START);
    assert_eq!(monitor.finish().code(), Some(42));
    assert!(is_empty(folder.path()));
}

#[test]
fn bad_requests_name_what_is_wrong_and_the_next_one_is_served() {
    let (_folder, monitor) = monitor();
    let message = monitor.refusal("PUT /boot-source", r#"{"kernel_image_path": "k", "initrd": "i"}"#);
    assert!(message.contains("`initrd`") && message.contains("`initrd_path`"), "{message}");
    for body in ["{", "nonsense", "[]", r#"{"vcpu_count": "2", "mem_size_mib": 64}"#] {
        let message = monitor.refusal("PUT /machine-config", body);
        assert!(message.contains("deserializing the json body"), "{body}: {message}");
    }
    let message = monitor.refusal("PUT /machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 64}"#);
    assert_eq!(message, "machine-config.vcpu_count: 33 is not between 1 and 32");
    let message = monitor.refusal("PUT /vm", &format!("\"{}\"", "x".repeat(51_200)));
    assert!(message.contains("larger than the limit of 51200"), "{message}");
    let message = monitor.refusal("PUT /network-interfaces/eth0", "{}");
    assert!(message.contains("use the vsock device"), "{message}");
    assert!(monitor.refusal("PATCH /vm", PAUSE).contains("before starting the microVM"));
    assert_eq!(monitor.state(), "Not started");
    monitor.done("PUT /vm?start=true", &quiet("spin"));
    assert!(monitor.refusal("PUT /actions", START).contains("after starting the microVM"));
    assert!(monitor.refusal("PUT /vm", &quiet("hello")).contains("after starting the microVM"));
    let drive = r#"{"drive_id": "d", "path_on_host": "p"}"#;
    assert!(monitor.refusal("PATCH /drives/d", drive).contains("there is no drive \"d\""));
    assert_eq!(monitor.state(), "Running");
}

#[test]
fn ids_that_are_no_plain_names_are_refused() {
    let (folder, monitor) = monitor();
    let image = folder.path().join("image");
    fs::write(&image, [0; 512]).unwrap();
    let drive = |id: &str| json!({"drive_id": id, "path_on_host": image}).to_string();
    let long = "x".repeat(65);
    let before = monitor.ask("GET /vm/config", "").1;
    for (path, id, words) in [
        ("..", "..", "\"..\" may only have letters"),
        ("a.b", "a.b", "\"a.b\" may only have letters"),
        (long.as_str(), long.as_str(), "65 bytes long; at most 64 are possible"),
        ("a/b", "a/b", "Invalid request method and/or path"),
        ("a%2Fb", "a/b", "does not match the id from the body [a/b]"),
        ("a%00", "a\0", "does not match the id from the body"),
        ("", "", "Invalid request method and/or path"),
        ("a", "b", "The id from the path [a] does not match the id from the body [b]!"),
    ] {
        for method in ["PUT", "PATCH"] {
            let message = monitor.refusal(&format!("{method} /drives/{path}"), &drive(id));
            let too_early = method == "PATCH" && message.contains("before starting the microVM");
            assert!(too_early || message.contains(words), "{method} {path:?} {id:?}: {message}");
        }
    }
    // In a whole configuration there is no path that could differ.
    for id in ["a/b", "..", "a\0", "", &long] {
        let mut config = config("hello");
        config["drives"] = json!([{"drive_id": id, "path_on_host": image}]);
        let message = monitor.refusal("PUT /vm", &config.to_string());
        assert!(message.starts_with("drives[0].drive_id: "), "{id:?}: {message}");
    }
    assert_eq!(monitor.ask("GET /vm/config", "").1, before);
    monitor.done(&format!("PUT /drives/{}", "x".repeat(64)), &drive(&"x".repeat(64)));
}

#[test]
fn a_path_may_vanish_between_check_and_use() {
    let (folder, monitor) = monitor();
    let (kernel, image) = (folder.path().join("kernel"), folder.path().join("image"));
    let make = || {
        fs::copy(place::payload("hello"), &kernel).unwrap();
        fs::write(&image, [0; 512]).unwrap();
    };
    make();
    monitor.done("PUT /boot-source", &json!({"kernel_image_path": kernel}).to_string());
    monitor.done("PUT /drives/d", &json!({"drive_id": "d", "path_on_host": image}).to_string());
    monitor.done("PUT /serial", r#"{"mode": "None"}"#);
    for (path, field) in [(&image, "drives[0].path_on_host: "), (&kernel, "boot-source.kernel_image_path: ")]
    {
        fs::remove_file(path).unwrap();
        let message = monitor.refusal("PUT /actions", START);
        assert!(message.starts_with(field), "{message}");
        // Something else in its place is looked at as well.
        fs::create_dir(path).unwrap();
        let message = monitor.refusal("PUT /actions", START);
        assert!(message.starts_with(field), "{message}");
        fs::remove_dir(path).unwrap();
        assert_eq!(monitor.state(), "Not started");
        make();
    }
    monitor.done("PUT /actions", START);
    assert_eq!(monitor.finish().code(), Some(42));
}

#[test]
fn the_version_is_told_as_firecracker_tells_its() {
    let output = Command::new(place::monitor()).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<_> = text.lines().next().unwrap().split(' ').collect();
    assert_eq!(words, ["Cofferdam", &format!("v{}", env!("CARGO_PKG_VERSION"))]);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn idle_half_and_pipelined_requests_hold_up_nobody() {
    let (_folder, monitor) = monitor();
    raise_descriptor_limit();
    let _idle: Vec<_> = (0..1000).map(|_| monitor.connect()).collect();
    let mut half = monitor.connect();
    half.write(b"PUT /machine-config HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{");
    let mut pipelined = monitor.connect();
    let get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    let wait = "GET /vm/wait?timeout_ms=50 HTTP/1.1\r\nHost: x\r\n\r\n";
    pipelined.write(format!("{get}{wait}{get}").as_bytes());
    assert_eq!(monitor.state(), "Not started");
    monitor.done("PUT /vm?start=true", &quiet("spin"));
    for _ in 0..3 {
        assert_eq!(pipelined.answer().0, 200);
    }
    assert_eq!(monitor.state(), "Running");
    monitor.done("DELETE /vm", "");
    assert_eq!(monitor.finish().code(), Some(143));
}

#[test]
fn a_monitor_without_a_domain_ends_by_the_api_and_by_a_signal() {
    let (folder, monitor) = monitor();
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    // The request is in the monitor before the next one.
    assert_eq!(monitor.ask("GET /vm/wait?timeout_ms=100", "").1["state"], json!("Not started"));
    monitor.done("DELETE /vm", "");
    assert_eq!(waiting.answer().1["message"], json!("stopped by the API before it ran"));
    assert_eq!(monitor.finish().code(), Some(143));
    assert!(is_empty(folder.path()));

    let monitor = ApiMonitor::start(folder.path());
    // What answers waits for signals; what only listens may not do so yet.
    assert_eq!(monitor.state(), "Not started");
    kill_process(Pid::from_child(monitor.child()), Signal::TERM).unwrap();
    assert_eq!(monitor.finish().code(), Some(143));
    assert!(is_empty(folder.path()));
}

/// Whoever waits for the socket and then sends a signal finds a monitor that minds it, at the very first moment. The
/// configuration is read before that, while a signal still just ends the process.
#[test]
fn a_signal_as_soon_as_the_socket_is_there_stops_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.sock");
    let start = |arguments: &[&std::ffi::OsStr]| {
        let mut command = Command::new(place::monitor());
        command.arg("--api-sock").arg(&socket).args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    for round in 0..200 {
        let mut child = start(&[]);
        while !socket.exists() {
            assert_eq!(child.try_wait().unwrap(), None);
        }
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(143), "round {round}: {status}");
        assert!(!socket.exists());
    }
    let slow = folder.path().join("config");
    mkfifoat(CWD, &slow, Mode::RUSR | Mode::WUSR).unwrap();
    let mut child = start(&["--config-file".as_ref(), slow.as_os_str()]);
    // It can be opened for writing when the monitor reads.
    let _writer = fs::File::options().write(true).open(&slow).unwrap();
    assert!(!socket.exists());
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
    assert!(!socket.exists());
}

#[test]
fn a_configuration_file_starts_its_domain_and_the_api_serves() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    fs::write(&file, quiet("spin")).unwrap();
    let monitor =
        ApiMonitor::with(folder.path(), &["--config-file".into(), file.into(), "--boot-timer".into()]);
    let (_, config) = monitor.ask("GET /vm/config", "");
    assert_eq!(config["machine-config"]["vcpu_count"], json!(2));
    assert_eq!(monitor.state(), "Running");
    monitor.done("DELETE /vm", "");
    assert_eq!(monitor.finish().code(), Some(143));
}

#[test]
fn host_version_and_document_are_told_in_any_state() {
    let (_folder, monitor) = monitor();
    for _ in 0..2 {
        assert_eq!(monitor.ask("GET /version", "").1["firecracker_version"], json!("1.16.0"));
        assert_eq!(monitor.ask("GET /openapi.json", "").1["openapi"], json!("3.1.0"));
        assert_eq!(monitor.ask("GET /host", "").1["platforms"]["plain"], json!(true));
        monitor.ask("PUT /vm?start=true", &quiet("spin"));
    }
}

#[test]
fn a_path_where_somebody_listens_is_refused_and_one_left_behind_taken() {
    let (folder, first) = monitor();
    let second = Command::new(place::monitor()).arg("--api-sock").arg(first.socket()).output().unwrap();
    assert_eq!(second.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&second.stderr).contains("EADDRINUSE"), "{second:?}");
    assert_eq!(first.state(), "Not started");
    kill_process(Pid::from_child(first.child()), Signal::KILL).unwrap();
    first.finish();
    assert!(!is_empty(folder.path()));
    assert_eq!(ApiMonitor::start(folder.path()).state(), "Not started");
}

#[test]
fn an_inherited_socket_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.sock");
    let listener = UnixListener::bind(&path).unwrap();
    fcntl_setfd(&listener, FdFlags::empty()).unwrap();
    let mut child = Command::new(place::monitor())
        .arg("--api-sock")
        .arg(format!("fd:{}", listener.as_raw_fd()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    // The test's own listener is open too: a monitor that dies closes nothing.
    stream.set_read_timeout(Some(Duration::from_secs(240))).unwrap();
    stream.write_all(b"DELETE /vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(path.exists(), "it is not the monitor's");
}

#[test]
fn curl_drives_a_domain() {
    let (_folder, monitor) = monitor();
    let curl = |arguments: &[&str]| {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"])
            .arg(monitor.socket())
            .args(["--write-out", "%{http_code}"])
            .args(arguments)
            .output()
            .expect("curl is there: `make deps`");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(curl(&["http://localhost/"]).ends_with("\"vmm_version\":\"0.1.0\"}200"));
    let config = quiet("hello");
    assert_eq!(curl(&["-X", "PUT", "http://localhost/vm", "-d", &config]), "204");
    assert_eq!(curl(&["-X", "PUT", "http://localhost/actions", "-d", START]), "204");
    assert_eq!(monitor.finish().code(), Some(42));
}
