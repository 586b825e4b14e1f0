//! A container's domain as the host sees it: the step port, the drives, and requests to init, with a tiny guest in
//! init's place that serves them well and badly.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::ChildStdout;
use std::thread;
use std::time::Duration;

use cofferdam_confidential::image::compose::Options;
use cofferdam_container_protocol::step::Step;
use cofferdam_firmware::sha256::Method;
use cofferdam_tests::api::{ApiMonitor, Connection};
use cofferdam_tests::image::Image;
use cofferdam_tests::{Run, hex, place};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const MANIFEST: &[u8] = b"{\"a manifest\":1}";

/// The files of a container, whose init is the tiny guest with that command line.
struct Container {
    folder: TempDir,
    config: Value,
}

impl Container {
    fn new(command_line: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let options = Options { host_data: true, ..Options::default() };
        let kernel = fs::read(place::payload("container")).unwrap();
        Image { command_line, options, ..Image::of(kernel) }.write(&path("domain.igvm"));
        fs::write(path("manifest.json"), MANIFEST).unwrap();
        for (name, byte) in [("base", b'b'), ("top", b't'), ("data", b'd')] {
            fs::write(path(name), vec![byte; 8192]).unwrap();
        }
        let config = json!({
            "boot-source": {"image_path": path("domain.igvm")},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
            "container": {
                "manifest": path("manifest.json"),
                "layers": [path("base"), path("top")],
                "volumes": [path("data")],
                "scratch": {"size": 1 << 20},
                "env": {"NAME": "value"},
            },
        });
        Self { folder, config }
    }

    /// Starts it.
    fn start(&self) -> Domain {
        Domain::start(ApiMonitor::start(self.folder.path()), "PUT /vm?start=true", &self.config.to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A domain, its console, and where its end will be told.
struct Domain {
    monitor: ApiMonitor,
    console: BufReader<ChildStdout>,
    wait: Connection,
}

impl Domain {
    /// Starts it by this request. Its end is asked for before, since it may come at once.
    fn start(mut monitor: ApiMonitor, request: &str, body: &str) -> Self {
        let (_, console) = monitor.console();
        let mut wait = monitor.connect();
        wait.send("GET /vm/wait", "");
        monitor.done(request, body);
        Self { monitor, console: BufReader::new(console), wait }
    }

    /// Waits until the guest serves requests.
    fn ready(mut self) -> Self {
        let mut line = String::new();
        while line.trim_end() != "ready" {
            line.clear();
            assert_ne!(self.console.read_line(&mut line).unwrap(), 0, "the guest has ended");
        }
        self
    }

    fn ask(&self, request: &str, body: &Value) -> (u16, Value) {
        self.monitor.ask(request, &if body.is_null() { String::new() } else { body.to_string() })
    }

    /// How it ended, and what was on the console.
    fn end(mut self) -> (Value, String) {
        let (status, end) = self.wait.answer();
        assert_eq!(status, 200);
        self.monitor.finish();
        let mut console = String::new();
        self.console.read_to_string(&mut console).unwrap();
        (end, console)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.monitor.child()), signal).unwrap();
    }
}

fn digest() -> String {
    hex(&Method::detect().digest(MANIFEST))
}

/// The outcome of a domain without a container whose guest writes these reports: the port is there always.
fn reports(mode: &str, reports: &str) -> cofferdam_tests::Finished {
    let line = format!("mode={mode} reports={reports} code=5");
    Run::new(place::payload("container")).with("cmdline", line).with("memory", "32M").finish()
}

#[test]
fn the_last_step_and_the_first_failure_are_shown() {
    // Steps in and out of order, an unknown one at the end, and two failures that end nothing.
    let container = Container::new(
        "mode=report reports=7fff0001,7fff0004,7fff0002,00020b08,00030b08,7fff0009,7fff00c8 code=5",
    );
    let (end, _) = container.start().end();
    assert_eq!((&end["exit_reason"], &end["exit_code"]), (&json!("power_off"), &json!(5)), "{end}");
    let expected = json!({
        "manifest_digest": digest(),
        "asserted_by_host": true,
        "step": "step_200",
        "failure": {
            "step": "running",
            "reason": "verity_failure",
            "object": "layer 2",
            "message": "running: layer 2 verity failure",
        },
    });
    assert_eq!(end["container"], expected);
    for step in ["init_pseudo_file_systems", "init_layers", "init_running", "init_stopping"] {
        assert!(end["phases"][step].is_u64(), "{end}");
    }
}

#[test]
fn a_fatal_report_ends_the_domain_by_its_words() {
    for (mode, report, words) in [
        ("report", "80020b04", "layers: layer 2 verity failure"),
        ("mmio", "ffff0703", "manifest: wrong digest"),
        ("report", "e005c84d", "step 77: object 5 reason 200"),
        ("report", "ffffffff", "step 255: reason 255"),
        ("report", "80000000", "step 0: layer 0"),
    ] {
        let done = reports(mode, report);
        assert_eq!(done.code(), 120, "{done}");
        assert_eq!(done.outcome().message, format!("the guest's init stopped the domain: {words}"), "{done}");
        assert_eq!(done.outcome().container, None, "the domain has none");
    }
}

#[test]
fn every_step_is_told_in_its_order() {
    let reports: Vec<_> = Step::ALL.iter().map(|step| format!("7fff00{:02x}", step.number())).collect();
    let container = Container::new(&format!("mode=report reports={}", reports.join(",")));
    let status = container.path("status");
    let arguments = ["--status-file".into(), status.clone().into()];
    let monitor = ApiMonitor::with(container.folder.path(), &arguments);
    let (end, _) = Domain::start(monitor, "PUT /vm?start=true", &container.config.to_string()).end();
    for step in Step::ALL {
        assert!(end["phases"][format!("init_{step}")].is_u64(), "{step}: {end}");
    }
    // Those that follow each other at once may be told as one.
    let lines: Vec<Value> =
        fs::read_to_string(status).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> =
        lines.iter().filter(|line| line["event"] == "step").map(|line| &line["step"]).collect();
    let names = Step::ALL.iter().map(|step| json!(step.to_string())).collect::<Vec<_>>();
    assert_eq!(told.last(), Some(&&json!("stopping")));
    assert!(told.is_sorted_by_key(|step| names.iter().position(|name| name == *step).unwrap()), "{told:?}");
    assert_eq!(lines.last().unwrap()["event"], "stopped");
}

#[test]
fn accesses_of_other_widths_report_nothing() {
    let container = Container::new("mode=widths code=5");
    let (end, console) = container.start().end();
    assert_eq!(end["exit_code"], 5, "{console}");
    assert_eq!(end["container"]["step"], "running");
    assert_eq!(end["container"]["failure"], Value::Null);
}

#[test]
fn a_flood_of_reports_is_a_few_lines_of_the_log() {
    let container = Container::new("mode=flood count=20000 code=5");
    let log = container.path("log");
    let arguments = ["--log-path".into(), log.clone().into(), "--level".into(), "Info".into()];
    let monitor = ApiMonitor::with(container.folder.path(), &arguments);
    let (end, _) = Domain::start(monitor, "PUT /vm?start=true", &container.config.to_string()).end();
    assert_eq!(end["exit_code"], 5, "{end}");
    let lines = fs::read_to_string(log).unwrap().matches("the guest's init reports").count();
    assert!((2..=257).contains(&lines), "{lines} lines");
}

#[test]
fn the_drives_are_what_the_container_says() {
    let mut container = Container::new("mode=drives");
    let expected = [
        "manifest 8192 ro {\"a manifest\":1}",
        "layer0 8192 ro bbbbbbbbbbbbbbbb",
        "layer1 8192 ro tttttttttttttttt",
        "volume0 8192 ro dddddddddddddddd",
        "scratch 1048576 rw ",
    ];
    let (end, console) = container.start().end();
    assert_eq!(end["exit_code"], 0, "{console}");
    let lines: Vec<_> = console.lines().filter(|line| line.contains(" r")).collect();
    assert_eq!(lines, expected);
    // The least that there can be; and a file in place of memory.
    container.config["container"] = json!({
        "manifest": container.path("manifest.json"),
        "layers": [container.path("top")],
        "scratch": {"path": container.path("base")},
    });
    let (_, console) = container.start().end();
    let lines: Vec<_> = console.lines().filter(|line| line.contains(" r")).collect();
    assert_eq!(
        lines,
        [
            "manifest 4096 ro {\"a manifest\":1}",
            "layer0 8192 ro tttttttttttttttt",
            "scratch 8192 rw bbbbbbbbbbbbbbbb"
        ]
    );
}

#[test]
fn what_is_wrong_is_refused_by_field_and_leaves_nothing() {
    let container = Container::new("mode=report");
    let monitor = ApiMonitor::start(container.folder.path());
    fs::write(container.path("large"), vec![b' '; (1 << 20) + 1]).unwrap();
    fs::write(container.path("nul"), b"{\0}").unwrap();
    fs::write(container.path("odd"), [0; 700]).unwrap();
    fs::write(container.path("empty"), []).unwrap();
    let path = |name: &str| json!(container.path(name));
    for (field, value, words) in [
        ("manifest", path("nowhere"), "container.manifest: "),
        ("manifest", path("empty"), "container.manifest: "),
        ("manifest", path("large"), "1048577 bytes long; at most 1048576 are possible"),
        ("manifest", path("nul"), "the manifest has a NUL at byte 1"),
        ("manifest", json!("fd:99"), "container.manifest: fd:99: no such descriptor is open"),
        ("layers", json!([path("base"), path("nowhere")]), "container.layers[1]: "),
        ("layers", json!([path("odd")]), "container.layers[0]: "),
        ("layers", json!(["fd:99"]), "container.layers[0]: fd:99: no such descriptor is open"),
        ("volumes", json!([container.folder.path()]), "container.volumes[0]: "),
        ("scratch", json!({"path": path("empty")}), "container.scratch.path: "),
    ] {
        let mut config = container.config.clone();
        config["container"][field] = value;
        for request in ["PUT /vm", "PUT /vm?start=true"] {
            let refusal = monitor.refusal(request, &config.to_string());
            assert!(refusal.contains(words), "{request}: {refusal}");
        }
    }
    let mut config = container.config.clone();
    config["confidential"] = json!({"host_data": "11".repeat(32)});
    let expected = format!("confidential.host_data: is not the SHA-256 of container.manifest, {}", digest());
    for request in ["PUT /vm", "PUT /vm?start=true"] {
        assert_eq!(monitor.refusal(request, &config.to_string()), expected);
    }
    // The right one may be said, and drives may not be added.
    config["confidential"]["host_data"] = json!(digest());
    monitor.done("PUT /vm", &config.to_string());
    let drive = json!({"drive_id": "d", "path_on_host": path("base")}).to_string();
    let refusal = monitor.refusal("PUT /drives/d", &drive);
    assert_eq!(refusal, "drives: the domain of a container has its container's drives only");
    let (_, shown) = monitor.ask("GET /vm/config", "");
    assert_eq!(shown["container"], config["container"]);
    let refusal = monitor.refusal("GET /container/stats", "");
    assert_eq!(refusal, "The requested operation is not supported before starting the microVM.");
    let (end, _) = Domain::start(monitor, "PUT /actions", r#"{"action_type": "InstanceStart"}"#).end();
    assert_eq!(end["container"]["manifest_digest"], digest());
}

#[test]
fn requests_are_served_before_which_nothing_is() {
    let container = Container::new("mode=serve code=9");
    let domain = container.start();
    // The first stage runs first, for a while; a request that comes too late for that is served.
    if let (400, answer) = domain.ask("GET /container/stats", &Value::Null) {
        let message = answer["fault_message"].as_str().unwrap();
        assert!(message.starts_with("container: it does not run yet"), "{message}");
    }
    let domain = domain.ready();
    let stats = json!({"cpu_us": 1, "memory_bytes": 1, "memory_total_bytes": 1, "processes": 1, "refused": {"Signal": 1}});
    assert_eq!(domain.ask("GET /container/stats", &Value::Null), (200, stats));
    assert_eq!(domain.ask("POST /container/kill", &json!({"signal": "TERM"})), (204, Value::Null));
    assert_eq!(
        domain.ask("POST /container/resize", &json!({"columns": 80, "rows": 24, "id": "x"})),
        (204, Value::Null)
    );
    let executed = (200, json!({"id": "x", "exit_code": 7}));
    assert_eq!(domain.ask("POST /container/exec", &json!({"id": "x", "args": ["a"]})), executed);
    let named = domain.ask("POST /container/exec", &json!({"args": ["a"]}));
    assert_eq!(named, (200, json!({"id": "exec-0", "exit_code": 7})));
    assert_eq!(domain.ask("GET /container/exec/x", &Value::Null), executed);
    for (request, body, words) in [
        ("POST /container/exec", json!({"args": []}), "args: 0 is not between 1 and 4096"),
        ("POST /container/exec", json!({"args": ["a"], "id": "a b"}), "id: \"a b\" may only have letters"),
        ("POST /container/kill", json!({"signal": ""}), "signal: 0 is not between 1 and 16"),
        ("POST /container/kill", json!({}), "missing field `signal`"),
        ("POST /container/resize", json!({"columns": 70000, "rows": 1}), "columns"),
    ] {
        let (status, answer) = domain.ask(request, &body);
        assert_eq!(status, 400);
        assert!(answer["fault_message"].as_str().unwrap().contains(words), "{answer}");
    }
    domain.monitor.done("PATCH /vm", r#"{"state": "Paused"}"#);
    let refusal = domain.monitor.refusal("GET /container/stats", "");
    assert_eq!(refusal, "container: the domain is paused");
    domain.monitor.done("PATCH /vm", r#"{"state": "Resumed"}"#);
    domain.monitor.done("DELETE /vm", "");
    let (end, _) = domain.end();
    assert_eq!(end["message"], "stopped on request: the guest powered off", "{end}");
    assert_eq!((&end["exit_reason"], &end["exit_code"]), (&json!("stopped"), &json!(9)), "{end}");
}

#[test]
fn a_guest_that_answers_badly_or_never_costs_that_request_only() {
    let container = Container::new("mode=serve");
    let domain = container.start().ready();
    let descriptors = descriptors(&domain);
    let rows = [
        ("deny", "container: the guest refused: host.exec\u{fffd}."),
        ("garbage", "container: the guest answered with a frame of 1213486160 bytes, which is too long"),
        ("nonsense", "container: the guest answered with what is no answer to Exec"),
        ("foreign", "container: the guest answered with what is no answer to Exec"),
        ("close", "container: the guest has closed the connection"),
        ("half", "container: the guest did not answer within 10 s"),
        ("never", "container: the guest did not answer within 10 s"),
    ];
    thread::scope(|scope| {
        // Many at once: each hears of its own.
        for (process, message) in rows.iter().cycle().take(42) {
            let domain = &domain;
            scope.spawn(move || {
                let (status, answer) =
                    domain.ask("POST /container/exec", &json!({"id": process, "args": ["a"]}));
                assert_eq!((status, answer), (400, json!({"fault_message": message})), "{process}");
            });
        }
        // Meanwhile others are served.
        for _ in 0..10 {
            assert_eq!(domain.ask("GET /container/stats", &Value::Null).0, 200);
            assert_eq!(domain.ask("GET /vm", &Value::Null).0, 200);
        }
    });
    // One that runs on: its client gets tired, or goes.
    let hang = json!({"id": "hang", "args": ["a"]});
    let (status, answer) = domain.ask("POST /container/exec?timeout_ms=50", &hang);
    assert_eq!((status, answer), (200, json!({"id": "hang", "exit_code": null})));
    for _ in 0..200 {
        let mut connection = domain.monitor.connect();
        connection.send("POST /container/exec", &hang.to_string());
    }
    // As many as there can be at a time; then the next one is told so, and others are served.
    let mut waiting: Vec<_> = Vec::new();
    let busy = loop {
        let (status, answer) = domain.ask("GET /container/stats", &Value::Null);
        if status == 400 {
            break answer;
        }
        assert!(waiting.len() <= 64, "there is no limit");
        let mut connection = domain.monitor.connect();
        connection.send("POST /container/exec", &hang.to_string());
        waiting.push(connection);
    };
    assert_eq!(busy["fault_message"], "Too many requests wait for the monitor; try again.");
    assert_eq!(domain.ask("GET /vm", &Value::Null).0, 200);
    drop(waiting);
    while domain.ask("GET /container/stats", &Value::Null).0 != 200 {
        thread::sleep(Duration::from_millis(10));
    }
    // Nothing is left of them, once the device has seen that they are gone.
    while self::descriptors(&domain) > descriptors {
        thread::sleep(Duration::from_millis(100));
    }
    domain.monitor.done("DELETE /vm", "");
    assert_eq!(domain.end().0["exit_code"], 0);
}

/// How many descriptors the monitor has, but for clients' connections.
fn descriptors(domain: &Domain) -> usize {
    let folder = format!("/proc/{}/fd", domain.monitor.child().id());
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_stop_asks_init_and_ends_hard_where_that_fails() {
    for (more, stop, words) in [
        ("", "signal", "stopped on request: the guest powered off"),
        ("", "button", "the guest powered off"),
        ("stop=deny", "signal", "stopped hard on request: the container's init does not stop it in order"),
        ("deaf=1", "delete", "stopped hard on request: the container's init does not stop it in order"),
        ("stop=close", "delete", "stopped hard: the guest did not power off within 300 ms of the request"),
        ("stop=never", "delete", "stopped hard: the guest did not power off within 300 ms of the request"),
        ("stop=garbage", "delete", "stopped hard: the guest did not power off within 300 ms of the request"),
    ] {
        let container = Container::new(&format!("mode=serve {more}"));
        let domain = container.start().ready();
        match stop {
            "signal" => domain.signal(Signal::TERM),
            "button" => domain.monitor.done("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#),
            _ => domain.monitor.done("DELETE /vm?timeout_ms=300", ""),
        }
        let (end, _) = domain.end();
        assert_eq!(end["message"], words, "{more} {stop}");
    }
    // Before init serves requests nothing runs that could be stopped in order.
    let container = Container::new("mode=widths");
    let domain = container.start();
    domain.monitor.done("DELETE /vm", "");
    assert_eq!(domain.end().0["message"], "stopped hard on request: the container does not run");
}

#[test]
fn the_guest_s_own_connections_reach_the_configured_socket() {
    let mut container = Container::new("mode=serve");
    container.config["vsock"] = json!({"guest_cid": 3, "uds_path": container.path("vsock")});
    let domain = container.start().ready();
    assert!(container.path("vsock").exists());
    assert_eq!(domain.ask("GET /container/stats", &Value::Null).0, 200);
    domain.monitor.done("DELETE /vm", "");
    assert_eq!(domain.end().0["exit_code"], 0);
    assert!(!container.path("vsock").exists());
}

#[test]
fn descriptors_are_as_good_as_paths() {
    let mut container = Container::new("mode=drives");
    let files = ["manifest.json", "base", "top", "data", "scratch"];
    fs::write(container.path("scratch"), vec![b's'; 4096]).unwrap();
    container.config["container"] = json!({
        "manifest": "fd:10", "layers": ["fd:11", "fd:12"], "volumes": ["fd:13"], "scratch": {"path": "fd:14"},
    });
    let redirections: Vec<_> = files
        .iter()
        .zip(10..)
        .map(|(name, fd)| {
            format!("{fd}{}'{}'", if fd == 14 { "<>" } else { "<" }, container.path(name).display())
        })
        .collect();
    let script = format!("exec \"$0\" \"$@\" {}", redirections.join(" "));
    let wrapper = ["bash".into(), "-c".into(), script.into()];
    let monitor = ApiMonitor::wrapped(&wrapper, container.folder.path(), &[]);
    // A start that fails leaves them.
    let mut bad = container.config.clone();
    bad["container"]["layers"] = json!(["fd:11", "fd:15"]);
    assert!(
        monitor.refusal("PUT /vm?start=true", &bad.to_string()).starts_with("container.layers[1]: fd:15: ")
    );
    let (end, console) = Domain::start(monitor, "PUT /vm?start=true", &container.config.to_string()).end();
    assert_eq!(end["exit_code"], 0, "{console}");
    assert!(console.contains("scratch 4096 rw ssssssssssssssss"), "{console}");
}
