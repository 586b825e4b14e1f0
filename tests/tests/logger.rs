//! The log of the shipped monitor: where it goes, what is in it, and that neither a guest nor its reader can use it
//! against the domain.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::place;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

/// Lines of one kind that a device may log in a minute.
const LINES: usize = 5;
/// Exit code of the payload `hello`.
const HELLO: i32 = 42;

fn config(payload: &str, arguments: &str) -> Value {
    json!({
        "boot-source": {"kernel_image_path": place::payload(payload), "boot_args": arguments},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "stop_timeout_ms": 100,
    })
}

/// Starts the domain of `config` and waits for its end.
fn run(monitor: &ApiMonitor, config: &Value) -> Value {
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    monitor.done("PUT /vm?start=true", &config.to_string());
    waiting.answer().1
}

fn file(folder: &Path, config: &Value) -> PathBuf {
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    path
}

#[test]
fn the_level_is_changed_while_the_monitor_runs() {
    let connections = |level: &str| {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let monitor = ApiMonitor::with(folder.path(), &["--level".into(), "Off".into()]);
        monitor.done("PUT /logger", &json!({"log_path": log, "show_level": true}).to_string());
        monitor.done("PUT /logger", &json!({"level": level}).to_string());
        let mut config = config("streams", "mode=each count=3");
        config["vsock"] = json!({"guest_cid": 3, "uds_path": folder.path().join("v.sock")});
        config["serial"] = json!({"mode": "None"});
        assert_eq!(run(&monitor, &config)["exit_reason"], "power_off");
        monitor.finish();
        fs::read_to_string(log).unwrap()
    };
    let log = connections("DEBUG");
    let refused = "Z [under-test:main:DEBUG] vsock: guest cannot connect to port ";
    assert_eq!(log.matches(refused).count(), 3, "{log}");
    let log = connections("info");
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.ends_with("Z [under-test:main:INFO] the guest powered off\n"), "{log}");
    assert_eq!(connections("Error"), "");
}

#[test]
fn the_log_is_configured_before_the_start_only() {
    let folder = tempfile::tempdir().unwrap();
    let monitor = ApiMonitor::start(folder.path());
    let nowhere = json!({"log_path": "/nowhere/log"}).to_string();
    assert!(monitor.refusal("PUT /logger", &nowhere).starts_with("log_path: /nowhere/log: "));
    assert!(monitor.refusal("PUT /logger", r#"{"level": "loud"}"#).contains("none of Off, Error, Warning"));
    assert!(monitor.refusal("PUT /logger", r#"{"loud": true}"#).contains("`log_format`"));
    monitor.done("PUT /logger", "{}");
    let mut config = config("spin", "");
    config["serial"] = json!({"mode": "None"});
    monitor.done("PUT /vm?start=true", &config.to_string());
    assert!(monitor.refusal("PUT /logger", "{}").contains("after starting the microVM"));
}

#[test]
fn lines_of_json_are_whole_objects() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut config = config("hello", "");
    config["logger"] =
        json!({"log_path": log, "log_format": "json", "show_log_origin": true, "level": "Trace"});
    let done = Command::new(place::monitor())
        .arg("--config-file")
        .arg(file(folder.path(), &config))
        .args(["--id", "j"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(done.status.code() == Some(HELLO) && done.stderr.is_empty(), "{done:?}");
    let text = fs::read_to_string(log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!((&last["id"], &last["level"]), (&json!("j"), &json!("INFO")));
    assert_eq!((&last["message"], &last["thread"]), (&json!("the guest powered off"), &json!("main")));
    assert_eq!((&last["module"], &last["file"]), (&json!("cofferdam_vmm"), &json!("vmm/src/main.rs")));
    assert!(last["line"].as_u64() > Some(0) && last["timestamp"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn a_descriptor_is_logged_to() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let script = r#"exec "$0" --config-file "$1" --log-path fd:9 --show-level 9>"$2""#;
    let done = Command::new("sh")
        .args(["-c", script])
        .arg(place::monitor())
        .arg(file(folder.path(), &config("hello", "")))
        .arg(&log)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(done.status.code() == Some(HELLO) && done.stderr.is_empty(), "{done:?}");
    let log = fs::read_to_string(log).unwrap();
    assert!(log.ends_with(":INFO] the guest powered off\n"), "{log}");
}

/// The attack makes each of three virtio devices ignore hundreds of writes.
#[test]
fn a_guest_that_floods_the_log_is_counted_instead() {
    let folder = tempfile::tempdir().unwrap();
    let (log, metrics) = (folder.path().join("log"), folder.path().join("metrics"));
    let drive = |name: &str, fill: u8| {
        let path = folder.path().join(name);
        fs::write(&path, vec![fill; 1 << 20]).unwrap();
        json!({"drive_id": name, "path_on_host": path})
    };
    let mut monitor = ApiMonitor::start(folder.path());
    let mut config = config("hostile-mmio", "case=read-only");
    config["drives"] = json!([drive("a", 0xA1), drive("b", 0xB2)]);
    config["vsock"] = json!({"guest_cid": 3, "uds_path": folder.path().join("v.sock")});
    config["logger"] = json!({"log_path": log});
    config["metrics"] = json!({"metrics_path": metrics});
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    monitor.done("PUT /vm?start=true", &config.to_string());
    let (mut stdin, mut stdout) = monitor.console();
    for checkpoint in ["ready\n", "done\n"] {
        let mut said = vec![0; checkpoint.len()];
        stdout.read_exact(&mut said).unwrap();
        assert_eq!(said, checkpoint.as_bytes());
        stdin.write_all(b"\n").unwrap();
    }
    assert_eq!(waiting.answer().1["exit_code"], 0);
    monitor.finish();

    let log = fs::read_to_string(log).unwrap();
    let text = fs::read_to_string(metrics).unwrap();
    let total = |group: &str, field: &str| -> u64 {
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line[group][field].as_u64().unwrap()).sum()
    };
    let (ignored, dropped) =
        (total("virtio", "ignored_writes_count"), total("virtio", "rate_limited_log_count"));
    let logged = log.matches(": ignored 0x").count();
    assert_eq!(logged, 3 * LINES, "{log}");
    assert!(dropped > 1000, "{dropped}");
    assert_eq!(logged as u64 + dropped, ignored, "each is logged or counted");
    assert_eq!(total("logger", "rate_limited_log_count"), dropped);
    let told: u64 = log
        .lines()
        .filter_map(|line| line.strip_suffix(" messages were not logged, as there were too many"))
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(told, dropped, "{log}");
}

#[test]
fn a_full_disk_loses_lines_and_counts_them() {
    let folder = tempfile::tempdir().unwrap();
    let metrics = folder.path().join("metrics");
    let mut config = config("hello", "");
    config["logger"] = json!({"log_path": "/dev/full"});
    config["metrics"] = json!({"metrics_path": metrics});
    let path = file(folder.path(), &config);
    let done = Command::new(place::monitor()).arg("--config-file").arg(path).output().unwrap();
    assert_eq!(done.status.code(), Some(HELLO), "{done:?}");
    let text = fs::read_to_string(metrics).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["logger"]["missed_log_count"], 1);
}

/// Standard error is a full pipe that nobody reads.
#[test]
fn a_log_that_nobody_reads_holds_up_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    let mut filler = File::from(writer.try_clone().unwrap());
    while filler.write(&[b'.'; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    let path = file(folder.path(), &config("hello", ""));
    let status = Command::new(place::monitor())
        .arg("--config-file")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(writer)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(HELLO));
    drop(reader);
}
