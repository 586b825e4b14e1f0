//! The payload tier: the shipped binaries and tiny guests on this machine's own `/dev/kvm`.

use std::fs;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_tests::run::send;
use cofferdam_tests::{Run, place};
use rustix::process::{Signal, kill_process, test_kill_process};

fn payload(name: &str) -> Run {
    Run::new(place::payload(name))
}

#[test]
fn a_guest_prints_marks_user_space_and_gives_its_code() {
    let done = payload("hello").finish();
    assert_eq!(done.code(), 42, "{done}");
    assert_eq!(done.console(), "hello from a payload\n");
    let outcome = done.outcome();
    assert_eq!((outcome.exit_reason, outcome.exit_code), (ExitReason::PowerOff, Some(42)));
    assert!(!outcome.protected);
    assert!(done.messages().contains("not protected"), "{done}");
    let phases = &outcome.phases;
    let at = |name: &str| *phases.get(name).unwrap_or_else(|| panic!("no phase {name} in {phases:?}"));
    assert!(at("monitor") < at("launched") && at("launched") < at("user_space"));
    assert!(at("user_space") <= at("stopped"));
}

#[test]
fn each_way_to_end_has_its_reason_and_code() {
    for (name, reason, code) in [
        ("reboot", ExitReason::Reboot, 121),
        ("i8042-reset", ExitReason::Reboot, 121),
        ("panic", ExitReason::Panic, 121),
        ("triple-fault", ExitReason::TripleFault, 122),
        ("vcpu-error", ExitReason::VcpuError, 122),
    ] {
        let done = payload(name).finish();
        assert_eq!(done.outcome().exit_reason, reason, "{name}: {done}");
        assert_eq!(done.outcome().exit_code, None, "{name}: {done}");
        assert_eq!(done.code(), code, "{name}: {done}");
    }
}

#[test]
fn both_entry_protocols_reach_the_guest() {
    for protocol in ["pvh", "linux64"] {
        let done = payload("hello").with("boot-protocol", protocol).finish();
        assert_eq!(done.code(), 42, "{protocol}: {done}");
    }
}

#[test]
fn input_reaches_the_guest_byte_by_byte() {
    let mut running = payload("echo").start();
    let stdin = running.stdin();
    let bytes: Vec<u8> = (0..=255).filter(|byte| *byte != b'q').collect();
    send(&stdin, &bytes);
    send(&stdin, b"q");
    let done = running.finish();
    assert_eq!(done.code(), 0, "{done}");
    let _ = stdin;
}

#[test]
fn a_stop_signal_ends_a_guest_that_does_not_listen_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("v.sock");
    let running = payload("spin").with("vsock", &socket).with("stop-timeout", "200ms").start();
    running.wait_for_message("not protected");
    let monitor = running.monitor_pid();
    assert!(socket.exists());
    running.signal(Signal::TERM);
    let done = running.finish();
    assert_eq!(done.code(), 143, "{done}");
    assert_eq!(done.outcome().exit_reason, ExitReason::Stopped);
    assert!(done.outcome().message.contains("did not power off within 200 ms"), "{done}");
    assert!(!socket.exists());
    assert!(test_kill_process(monitor).is_err());
}

#[test]
fn a_killed_monitor_is_noticed_and_cleaned_up_after() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("v.sock");
    let running = payload("spin").with("vsock", &socket).start();
    running.wait_for_message("not protected");
    kill_process(running.monitor_pid(), Signal::KILL).unwrap();
    let done = running.finish();
    assert_eq!(done.code(), 124, "{done}");
    assert_eq!(done.outcome().exit_reason, ExitReason::MonitorError);
    assert!(done.outcome().message.contains("signal 9"), "{done}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_killed_command_takes_its_domain_along() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("v.sock");
    let running = payload("spin").with("vsock", &socket).with("stop-timeout", "200ms").start();
    running.wait_for_message("not protected");
    let monitor = running.monitor_pid();
    running.signal(Signal::KILL);
    let end = Instant::now() + Duration::from_secs(240);
    while test_kill_process(monitor).is_ok() {
        assert!(Instant::now() < end, "the monitor is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!socket.exists());
}
