//! The metrics of the shipped monitor: what a tiny guest does is what is counted, and nothing that becomes of the
//! file that they go to harms the domain.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use cofferdam_metrics::exposition::{self, Family};
use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::place;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};

const FLUSH: &str = r#"{"action_type": "FlushMetrics"}"#;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// A domain of `payload` with one drive.
fn config(folder: &Path, payload: &str, arguments: &str) -> Value {
    let image = folder.join("image");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    json!({
        "boot-source": {"kernel_image_path": place::payload(payload), "boot_args": arguments},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [{"drive_id": "root", "path_on_host": image, "cache_type": "Writeback"}],
        "stop_timeout_ms": 100,
    })
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'), "the last line is whole");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a counter has come to over all lines.
fn total(lines: &[Value], group: &str, field: &str) -> u64 {
    lines.iter().map(|line| line[group][field].as_u64().unwrap_or(0)).sum()
}

/// How many times a histogram has over all lines.
fn times(lines: &[Value], group: &str, field: &str) -> u64 {
    let buckets = lines.iter().filter_map(|line| line[group][field]["buckets"].as_array());
    buckets.flatten().map(|count| count.as_u64().unwrap()).sum()
}

fn prometheus(monitor: &ApiMonitor) -> Vec<Family> {
    let mut connection = monitor.connect();
    connection.send("GET /metrics", "");
    let (status, kind, text) = connection.raw_answer();
    assert_eq!((status, kind.as_str()), (200, "text/plain; version=0.0.4; charset=utf-8"));
    exposition::parse(std::str::from_utf8(&text).unwrap()).unwrap()
}

fn value(families: &[Family], name: &str, labels: &[(&str, &str)]) -> f64 {
    let found = families.iter().find_map(|family| family.value(name, labels));
    found.unwrap_or_else(|| panic!("no {name} {labels:?}"))
}

#[test]
fn what_a_guest_does_is_what_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (path, console) = (folder.path().join("metrics"), folder.path().join("console"));
    let monitor = ApiMonitor::start(folder.path());
    monitor.done("PUT /metrics", &json!({"metrics_path": path}).to_string());
    let mut config = config(folder.path(), "block", "");
    config["serial"] = json!({"serial_out_path": console});
    monitor.done("PUT /vm", &config.to_string());
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    monitor.done("PUT /actions", START);
    assert_eq!(waiting.answer().1["exit_reason"], "power_off");
    monitor.finish();

    let lines = lines(&path);
    assert!(lines.len() >= 2, "one at the start and one at the end");
    assert!(lines.iter().all(|line| line["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000)));
    // Sector 0, sector 8 written and read back, a flush, and the id, which is none of these.
    for group in ["block_root", "block"] {
        let count = |field| total(&lines, group, field);
        assert_eq!((count("read_count"), count("read_bytes")), (2, 1024), "{group}");
        assert_eq!((count("write_count"), count("write_bytes")), (1, 512), "{group}");
        assert_eq!((count("flush_count"), count("execute_fails"), count("invalid_reqs_count")), (1, 0, 0));
        let time = |field| times(&lines, group, field);
        assert_eq!((time("read_agg"), time("write_agg"), time("flush_agg")), (2, 1, 1), "{group}");
    }
    let printed = fs::metadata(&console).unwrap().len();
    assert_eq!(total(&lines, "uart", "write_count"), printed);
    assert!(total(&lines, "vcpu", "exit_io_out") >= printed, "each byte is an exit");
    for exit in ["exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write"] {
        let count = total(&lines, "vcpu", exit);
        assert!(count > 0, "{exit}");
        assert_eq!(times(&lines, "vcpu", &format!("{exit}_agg")), count, "{exit}");
    }
    let last = lines.last().unwrap();
    let phase = |name: &str| last["phases_us"][name].as_u64().unwrap();
    assert!(phase("memory") <= phase("launched") && phase("launched") <= phase("running"));
    for time in ["process_startup_time_us", "process_startup_time_cpu_us"] {
        assert!(last["api_server"][time].as_u64() > Some(0), "{time}");
    }
    for request in ["vm_count", "metrics_count", "actions_count"] {
        assert_eq!(total(&lines, "put_api_requests", request), 1, "{request}");
    }
    assert_eq!(total(&lines, "get_api_requests", "vm_wait_count"), 1);
    assert_eq!(total(&lines, "logger", "missed_metrics_count"), 0);
}

#[test]
fn what_a_guest_prints_beyond_the_limit_is_dropped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (path, console) = (folder.path().join("metrics"), folder.path().join("console"));
    let monitor = ApiMonitor::with(folder.path(), &["--metrics-path".into(), path.clone().into()]);
    let kernel = json!({"kernel_image_path": place::payload("chatter"), "boot_args": "lines=500"});
    monitor.done("PUT /boot-source", &kernel.to_string());
    let limit = json!({"size": 60, "one_time_burst": 40, "refill_time": 3_600_000});
    let serial = json!({"serial_out_path": console, "rate_limiter": limit});
    monitor.done("PUT /serial", &serial.to_string());
    assert_eq!(monitor.ask("GET /vm/config", "").1["serial"]["rate_limiter"], limit);
    monitor.done("PUT /actions", START);
    monitor.finish();
    let all: String = (1..=500).map(|line| format!("line {line}\n")).collect();
    let printed = fs::read_to_string(&console).unwrap();
    // One token comes in a minute.
    assert!(all.starts_with(&printed) && (100..110).contains(&printed.len()), "{printed}");
    let lines = lines(&path);
    assert_eq!(total(&lines, "uart", "write_count"), all.len() as u64);
    let dropped = all.len() - printed.len();
    assert_eq!(total(&lines, "uart", "rate_limiter_dropped_bytes"), dropped as u64);
    assert_eq!(total(&lines, "uart", "lost_bytes"), 0);
}

#[test]
fn a_running_domain_tells_prometheus_and_writes_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics");
    let mut monitor = ApiMonitor::with(folder.path(), &["--metrics-path".into(), path.clone().into()]);
    assert_eq!(value(&prometheus(&monitor), "cofferdam_vcpu_exit_io_out_total", &[]), 0.0);
    assert!(monitor.refusal("PUT /actions", FLUSH).contains("before starting the microVM"));
    let again = json!({"metrics_path": path}).to_string();
    assert_eq!(monitor.refusal("PUT /metrics", &again), "Reinitialization of metrics not allowed.");
    let config = config(folder.path(), "disks", "op=read repeat=5 wait=1").to_string();
    monitor.done("PUT /vm?start=true", &config);
    let (mut stdin, mut stdout) = monitor.console();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");

    let families = prometheus(&monitor);
    assert_eq!(value(&families, "cofferdam_uart_write_total", &[]), 6.0);
    assert_eq!(value(&families, "cofferdam_block_read_total", &[("drive", "root")]), 0.0);
    assert!(value(&families, "cofferdam_vcpu_exit_io_out_seconds_count", &[]) >= 6.0);
    assert_eq!(value(&families, "cofferdam_put_api_requests_metrics_fails_total", &[]), 1.0);
    monitor.done("PATCH /vm", r#"{"state": "Paused"}"#);
    monitor.done("PATCH /vm", r#"{"state": "Resumed"}"#);
    let families = prometheus(&monitor);
    assert_eq!(value(&families, "cofferdam_vmm_pause_total", &[]), 1.0);
    assert!(value(&families, "cofferdam_latencies_pause_vm_seconds", &[]) > 0.0);
    assert!(monitor.refusal("PUT /metrics", &again).contains("after starting the microVM"));

    let before = lines(&path).len();
    monitor.done("PUT /actions", FLUSH);
    assert_eq!(lines(&path).len(), before + 1);
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    stdin.write_all(b"x").unwrap();
    assert_eq!(waiting.answer().1["exit_reason"], "power_off");
    monitor.finish();
    let lines = lines(&path);
    // Five pages, and the first sector for its first byte.
    assert_eq!(total(&lines, "block_root", "read_count"), 6);
    assert_eq!(total(&lines, "vmm", "pause_count"), 1);
}

#[test]
fn packets_and_connections_of_the_guest_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (path, socket) = (folder.path().join("metrics"), folder.path().join("v.sock"));
    // What `streams` expects of port 5000: each word comes back.
    let listener = UnixListener::bind(folder.path().join("v.sock_5000")).unwrap();
    thread::spawn(move || {
        for program in listener.incoming() {
            let mut program = program.unwrap();
            let mut word = [0; 8];
            program.read_exact(&mut word).unwrap();
            program.write_all(&word).unwrap();
            let _ = program.read(&mut word);
        }
    });
    let monitor = ApiMonitor::start(folder.path());
    let mut config = config(folder.path(), "streams", "mode=each count=10");
    config["vsock"] = json!({"guest_cid": 3, "uds_path": socket});
    config["metrics"] = json!({"metrics_path": path});
    config["serial"] = json!({"mode": "None"});
    let mut waiting = monitor.connect();
    waiting.send("GET /vm/wait", "");
    monitor.done("PUT /vm?start=true", &config.to_string());
    assert_eq!(waiting.answer().1["exit_code"], 0);
    monitor.finish();
    let lines = lines(&path);
    let count = |field| total(&lines, "vsock", field);
    assert_eq!((count("conns_added"), count("conns_removed")), (10, 10));
    assert_eq!((count("tx_bytes_count"), count("rx_bytes_count")), (80, 80));
    assert!(count("tx_packets_count") >= 20 && count("rx_packets_count") >= 20);
    assert_eq!(
        (count("connect_fails"), count("tx_queue_event_fails"), count("rx_queue_event_fails")),
        (0, 0, 0)
    );
}

#[test]
fn a_pipe_without_a_reader_keeps_what_it_has_room_for_and_the_domain_runs_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
    let monitor = ApiMonitor::with(folder.path(), &["--metrics-path".into(), path.clone().into()]);
    let config = config(folder.path(), "disks", "wait=1").to_string();
    monitor.done("PUT /vm?start=true", &config);
    let mut written = 1;
    let refusal = loop {
        match monitor.ask("PUT /actions", FLUSH) {
            (204, _) => written += 1,
            (status, answer) => break (status, answer),
        }
        assert!(written < 1000, "a pipe has an end");
    };
    assert_eq!(refusal.0, 400);
    let message = refusal.1["fault_message"].as_str().unwrap();
    assert!(message.starts_with(&format!("metrics cannot be written to {}", path.display())), "{message}");
    assert_eq!(monitor.state(), "Running");

    let mut reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let mut text = Vec::new();
    let mut drain = |text: &mut Vec<u8>| {
        let error = reader.read_to_end(text).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    };
    drain(&mut text);
    monitor.done("PUT /actions", FLUSH);
    drain(&mut text);
    let lines: Vec<Value> = String::from_utf8(text)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert_eq!(lines.len(), written + 1);
    assert_eq!(total(&lines, "logger", "missed_metrics_count"), 1);
    // Each asked once, but for the last one, which is under way.
    assert_eq!(total(&lines, "put_api_requests", "actions_count"), written as u64 + 1);
    assert_eq!(total(&lines, "put_api_requests", "actions_fails"), 1);
}

#[test]
fn a_full_disk_harms_nothing_and_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let arguments = ["--metrics-path", "/dev/full", "--log-path", log.to_str().unwrap()];
    let monitor = ApiMonitor::with(folder.path(), &arguments.map(Into::into));
    let config = config(folder.path(), "disks", "wait=1").to_string();
    monitor.done("PUT /vm?start=true", &config);
    for _ in 0..10 {
        assert!(monitor.refusal("PUT /actions", FLUSH).contains("No space left on device"));
    }
    let families = prometheus(&monitor);
    assert_eq!(value(&families, "cofferdam_logger_missed_metrics_total", &[]), 11.0);
    monitor.done("DELETE /vm", "");
    monitor.finish();
    let log = fs::read_to_string(log).unwrap();
    assert_eq!(log.matches("metrics cannot be written to /dev/full").count(), 1, "{log}");
}

#[test]
fn without_a_file_a_flush_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let monitor = ApiMonitor::start(folder.path());
    let nowhere = json!({"metrics_path": "/nowhere/metrics"}).to_string();
    assert!(monitor.refusal("PUT /metrics", &nowhere).starts_with("metrics_path: /nowhere/metrics: "));
    monitor.done("PUT /vm?start=true", &config(folder.path(), "disks", "wait=1").to_string());
    monitor.done("PUT /actions", FLUSH);
}
