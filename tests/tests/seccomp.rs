//! The seccomp policies of the shipped monitor. Every other test of this tier runs under them; here is that they are
//! in force, and when, and what becomes of a monitor that does not keep to them: one whose policy lacks a system call
//! that it needs.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cofferdam_api::status::ExitReason;
use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::host::after;
use cofferdam_tests::{Run, place};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const KINDS: [&str; 3] = ["vmm", "vcpu", "api"];
const KVM_RUN: u64 = 0xae80;

/// The policies of `resources/seccomp` in one file, those rules for `kind` left out of which `left_out` is true.
fn policies(folder: &Path, kind: &str, left_out: impl Fn(&Value) -> bool) -> PathBuf {
    let mut all = serde_json::Map::new();
    for kind in KINDS {
        let text =
            fs::read(place::root().join("resources/seccomp").join(kind).with_extension("json")).unwrap();
        all.extend(serde_json::from_slice::<serde_json::Map<_, _>>(&text).unwrap());
    }
    let rules = all[kind]["filter"].as_array_mut().unwrap();
    let before = rules.len();
    rules.retain(|rule| !left_out(rule));
    assert!(rules.len() < before, "there was such a rule");
    let path = folder.join("policies.json");
    fs::write(&path, Value::from(all).to_string()).unwrap();
    path
}

fn is_call(rule: &Value, name: &str) -> bool {
    rule["syscall"] == name
}

/// The whole configuration of a domain of `payload`.
fn config(payload: &str) -> Value {
    json!({
        "boot-source": {"kernel_image_path": place::payload(payload)},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 32},
    })
}

/// A monitor of `config`, with more `arguments`; what it tells of the domain goes to `folder/status`.
fn monitor(folder: &Path, config: &Value, arguments: &[&str]) -> Command {
    fs::write(folder.join("config"), config.to_string()).unwrap();
    let mut monitor = Command::new(place::monitor());
    monitor.arg("--config-file").arg(folder.join("config")).arg("--status-file").arg(folder.join("status"));
    monitor.args(arguments).stdin(Stdio::null());
    monitor
}

fn with_policies(folder: &Path, config: &Value, policies: &Path) -> Output {
    monitor(folder, config, &["--seccomp-filter", policies.to_str().unwrap()]).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// By thread of `pid`: its mode of seccomp (2: filtered), and whether it can gain no privileges. Those that KVM has
/// in the process for itself are the kernel's.
fn threads(pid: u32) -> BTreeMap<String, (String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: PathBuf| {
        let text = fs::read_to_string(task.join("status")).unwrap();
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            value.trim_start_matches(':').trim().to_owned()
        };
        (field("Name"), (field("Seccomp"), field("NoNewPrivs")))
    };
    tasks.map(|task| of_task(task.unwrap().path())).filter(|(name, _)| !name.starts_with("kvm-")).collect()
}

fn api_monitor(arguments: &[&str]) -> (TempDir, ApiMonitor) {
    let folder = tempfile::tempdir().unwrap();
    let arguments: Vec<_> = arguments.iter().map(Into::into).collect();
    let monitor = ApiMonitor::with(folder.path(), &arguments);
    (folder, monitor)
}

/// Starts a domain. When this returns, every vCPU has come to its guest.
fn start(monitor: &ApiMonitor) {
    let mut config = config("spin");
    config["serial"] = json!({"mode": "None"});
    monitor.done("PUT /vm?start=true", &config.to_string());
    monitor.done("PATCH /vm", r#"{"state": "Paused"}"#);
}

#[test]
fn every_thread_of_a_running_monitor_is_filtered() {
    let (_folder, monitor) = api_monitor(&[]);
    let of = |seccomp: &str, privileges: &str| (seccomp.to_owned(), privileges.to_owned());
    // Before the start there is no guest, and the main thread has yet to open what the domain needs.
    assert_eq!(monitor.state(), "Not started");
    let before = threads(monitor.child().id());
    let expected = [("api", of("2", "1")), ("cofferdam-vmm", of("0", "0"))];
    assert_eq!(before, expected.map(|(name, state)| (name.to_owned(), state)).into());
    start(&monitor);
    let expected = ["api", "cofferdam-vmm", "vcpu0", "vcpu1"].map(|name| (name.to_owned(), of("2", "1")));
    assert_eq!(threads(monitor.child().id()), expected.into());
}

/// What is in the way is looked into, where a device may not be opened: here by a root that is denied what others are.
#[test]
fn a_running_monitor_surveys_a_host_that_denies_it_kvm() {
    let folder = tempfile::tempdir().unwrap();
    let node = folder.path().join("kvm");
    let device = format!(
        "mknod -m 600 {0} c $(stat -c '0x%t 0x%T' /dev/kvm) && mount --bind {0} /dev/kvm",
        node.display()
    );
    let mut wrapper = after(&device);
    wrapper.extend(["setpriv", "--bounding-set=-dac_override,-dac_read_search"].map(Into::into));
    let monitor = ApiMonitor::wrapped(&wrapper, folder.path(), &[]);
    start(&monitor);
    assert_eq!(monitor.ask("GET /host", "").1["platforms"]["plain"], true);
    chown(&node, None, Some(1)).unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o060)).unwrap();
    let (status, host) = monitor.ask("GET /host", "");
    assert_eq!((status, &host["platforms"]["plain"]), (200, &json!(false)));
    assert!(host.to_string().contains("join its group: `sudo usermod -aG daemon $USER`"), "{host}");
    assert_eq!(monitor.state(), "Paused");
}

#[test]
fn no_seccomp_means_none() {
    let (_folder, monitor) = api_monitor(&["--no-seccomp"]);
    start(&monitor);
    let threads = threads(monitor.child().id());
    assert_eq!(threads.len(), 4);
    assert!(threads.values().all(|(seccomp, _)| seccomp == "0"), "{threads:?}");
}

#[test]
fn a_vcpu_is_filtered_before_its_guest_runs() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "vcpu", |rule| rule["args"][0]["val"] == KVM_RUN);
    let output = with_policies(folder.path(), &config("hello"), &without);
    assert_eq!(output.status.code(), Some(148), "{output:?}");
    let message = stderr(&output);
    assert!(message.contains("cofferdam-vmm: thread vcpu"), "{message}");
    assert!(message.contains(" made a system call that its seccomp policy forbids: ioctl("), "{message}");
    assert!(message.contains(",0xae80,"), "{message}");
    assert_eq!(output.stdout, b"", "the guest has printed nothing");
}

/// The main thread tells that the domain runs before it lets the vCPUs go, and may not even do that; so its policy was
/// in force. Nor can it say so: it may not write. Then the kernel ends it.
#[test]
fn the_main_thread_is_filtered_before_the_guest_runs() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "vmm", |rule| is_call(rule, "write"));
    let output = with_policies(folder.path(), &config("hello"), &without);
    assert_eq!(output.status.signal(), Some(Signal::SYS.as_raw()), "{output:?}");
    assert_eq!(output.stdout, b"", "the guest has printed nothing");
    assert_eq!(fs::read(folder.path().join("status")).unwrap(), b"");
}

#[test]
fn a_call_that_the_main_thread_may_not_make_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, [0; 1 << 16]).unwrap();
    let mut config = config("block");
    config["drives"] =
        json!([{"drive_id": "a", "path_on_host": image, "is_root_device": false, "io_engine": "Sync"}]);
    let without = policies(folder.path(), "vmm", |rule| is_call(rule, "preadv"));
    let output = with_policies(folder.path(), &config, &without);
    assert_eq!(output.status.code(), Some(148), "{output:?}");
    let line = "cofferdam-vmm: thread vmm made a system call that its seccomp policy forbids: preadv(0x";
    assert!(stderr(&output).contains(line), "{}", stderr(&output));
    let status = fs::read_to_string(folder.path().join("status")).unwrap();
    assert!(status.starts_with(r#"{"event":"running""#) && status.lines().count() == 1, "{status}");
}

#[test]
fn a_call_that_the_api_thread_may_not_make_ends_the_monitor() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "api", |rule| is_call(rule, "recvfrom"));
    let socket = folder.path().join("s");
    let mut child = Command::new(place::monitor())
        .arg("--api-sock")
        .arg(&socket)
        .arg("--seccomp-filter")
        .arg(without)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::yield_now();
    }
    assert_eq!(child.wait().unwrap().code(), Some(148));
    let mut message = String::new();
    child.stderr.unwrap().read_to_string(&mut message).unwrap();
    let line = "cofferdam-vmm: thread api made a system call that its seccomp policy forbids: recvfrom(0x";
    assert!(message.contains(line), "{message}");
}

#[test]
fn a_violation_is_told_in_the_log_too() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "vcpu", |rule| rule["args"][0]["val"] == KVM_RUN);
    let forbidden = "made a system call that its seccomp policy forbids: ioctl(0x";
    for format in ["text", "json"] {
        let log = folder.path().join(format);
        let arguments = ["--seccomp-filter", without.to_str().unwrap(), "--log-path", log.to_str().unwrap()];
        let arguments = [&arguments[..], &["--log-format", format]].concat();
        let mut config = config("hello");
        config["machine-config"]["vcpu_count"] = json!(1);
        let output = monitor(folder.path(), &config, &arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(148), "{output:?}");
        assert!(stderr(&output).contains(forbidden), "{}", stderr(&output));
        let text = fs::read_to_string(&log).unwrap();
        let told: Vec<&str> = text.lines().filter(|line| line.contains(forbidden)).collect();
        assert_eq!(told.len(), 1, "{text}");
        if format == "json" {
            let line: Value = serde_json::from_str(told[0]).unwrap();
            assert_eq!(line["level"], "ERROR");
            assert!(
                line["message"].as_str().unwrap().starts_with("cofferdam-vmm: thread vcpu0 made"),
                "{line}"
            );
        } else {
            assert_eq!(format!("{}\n", told[0]), stderr(&output));
        }
    }
}

#[test]
fn nobody_who_reads_standard_error_is_no_reason_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "vcpu", |rule| rule["args"][0]["val"] == KVM_RUN);
    let (_reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut monitor =
        monitor(folder.path(), &config("hello"), &["--seccomp-filter", without.to_str().unwrap()]);
    assert_eq!(monitor.stderr(writer).status().unwrap().code(), Some(148));
}

#[test]
fn a_violation_is_a_monitor_error() {
    let folder = tempfile::tempdir().unwrap();
    let without = policies(folder.path(), "vcpu", |rule| rule["args"][0]["val"] == KVM_RUN);
    let script = folder.path().join("vmm");
    let text = format!(
        "#!/bin/sh\nexec {} --seccomp-filter {} \"$@\"\n",
        place::monitor().display(),
        without.display()
    );
    fs::write(folder.path().join("text"), text).unwrap();
    // A file that is open for writing, in a child of another test too, cannot be executed.
    let copied = Command::new("install").arg("-m755").arg(folder.path().join("text")).arg(&script).status();
    assert!(copied.unwrap().success());
    let done = Run::new(place::payload("hello")).with("vmm", script).finish();
    let outcome = done.outcome();
    assert_eq!((outcome.exit_reason, done.code()), (ExitReason::MonitorError, 124), "{done}");
    let message = "the monitor made a system call that its seccomp policy forbids; its messages name it";
    assert_eq!(outcome.message, message, "{done}");
    assert!(done.messages().contains("forbids: ioctl("), "{done}");
}

#[test]
fn a_signal_that_is_not_seccomps_is_told_from_a_violation() {
    let folder = tempfile::tempdir().unwrap();
    let mut monitor = monitor(folder.path(), &config("spin"), &[]);
    let child = monitor.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    while fs::read(folder.path().join("status")).unwrap_or_default().is_empty() {
        std::thread::yield_now();
    }
    kill_process(Pid::from_child(&child), Signal::SYS).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(148), "{output:?}");
    assert_eq!(stderr(&output), "cofferdam-vmm: ended by a SIGSYS that is not seccomp's\n");
}

#[test]
fn policies_that_are_none_are_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad");
    let good = policies(folder.path(), "vmm", |rule| is_call(rule, "preadv"));
    fs::write(&bad, r#"{"vmm": {"mismatch_action": "trap", "match_action": "allow", "filter": []}}"#)
        .unwrap();
    let (bad, good) = (bad.to_str().unwrap(), good.to_str().unwrap());
    for (arguments, words) in [
        (vec!["--seccomp-filter", bad], "has no policy \"vcpu\"; there have to be vmm, vcpu and api"),
        (vec!["--seccomp-filter", "/nonexistent"], "--seccomp-filter /nonexistent: No such file"),
        (vec!["--no-seccomp", "--seccomp-filter", good], "cannot be used with"),
    ] {
        let output = monitor(folder.path(), &config("hello"), &arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{arguments:?}: {output:?}");
        let told = fs::read_to_string(folder.path().join("status")).unwrap_or_default().replace("\\\"", "\"");
        let told = told + &stderr(&output);
        assert!(told.contains(words), "{arguments:?}: {told}");
        assert_eq!(output.stdout, b"");
    }
}
