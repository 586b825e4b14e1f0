//! Guests that want to break the monitor (the payloads `hostile-*`).
//!
//! Each attacks one device and says by its exit code that the device refused, that the others went on,
//! and that after a reset all was well again. From outside this file sees what the guest cannot: that the monitor
//! lived to the end, how much memory it took, and how much it logged.

// Helpers of tests fail their tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::ChildStdin;

use cofferdam_api::status::ExitReason;
use cofferdam_tests::run::send;
use cofferdam_tests::{Finished, Run, Running, place};
use tempfile::TempDir;

/// What the monitor may take in memory during an attack, KiB, with what the guest touches of its own meanwhile.
const MEMORY: u64 = 32 << 10;
/// Lines on stderr: what `cofferdam` says itself, and what a device may say of some hundred breakdowns.
const LINES: usize = 12;
/// Bytes of a drive.
const DRIVE: usize = 1 << 20;
/// What the drives are full of.
const FILLS: [u8; 2] = [0xA1, 0xB2];

/// A domain with a hostile guest.
struct Domain {
    running: Running,
    stdin: ChildStdin,
    _directory: TempDir,
}

/// What a monitor holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Most memory so far, KiB.
    memory: u64,
    descriptors: usize,
}

impl Domain {
    /// Starts `payload` with two drives and vsock.
    fn start(payload: &str, case: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut run = Run::new(place::payload(payload))
            .with("memory", "32M")
            .with("cmdline", format!("case={case}"))
            .with("vsock", directory.path().join("v.sock"));
        for (index, fill) in FILLS.into_iter().enumerate() {
            let path = directory.path().join(format!("drive{index}"));
            fs::write(&path, vec![fill; DRIVE]).unwrap();
            run = run.with("drive", format!("path={}", path.display()));
        }
        let mut running = run.start();
        let stdin = running.stdin();
        Self { running, stdin, _directory: directory }
    }

    /// Waits until the guest has come to `checkpoint`.
    fn at(&self, checkpoint: &str) -> Held {
        self.running.wait_for(&format!("{checkpoint}\n"));
        let process = Path::new("/proc").join(self.running.monitor_pid().to_string());
        let status = fs::read_to_string(process.join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let memory = line.trim().trim_end_matches(" kB").parse().unwrap();
        Held { memory, descriptors: fs::read_dir(process.join("fd")).unwrap().count() }
    }

    /// Lets the guest go on.
    fn go_on(&self) {
        send(&self.stdin, b"\n");
    }
}

/// Runs one case from "ready" to "done".
fn attack(payload: &str, case: &str) -> Finished {
    let domain = Domain::start(payload, case);
    let before = domain.at("ready");
    domain.go_on();
    let after = domain.at("done");
    domain.go_on();
    let done = domain.running.finish();
    check(case, &done, before, after);
    done
}

fn check(case: &str, done: &Finished, before: Held, after: Held) {
    assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{case}: {done}");
    assert_eq!(done.code(), 0, "{case}: {done}");
    assert!(after.memory <= before.memory + MEMORY, "{case}: {before:?}, {after:?}: {done}");
    assert_eq!(after.descriptors, before.descriptors, "{case}: {done}");
    assert!(done.messages().lines().count() <= LINES, "{case}: {done}");
}

/// Runs cases in which the device must refuse, and say so once.
fn refused(payload: &str, cases: &[&str]) {
    for case in cases {
        let done = attack(payload, case);
        assert!(done.console().contains("needs reset\n"), "{case}: {done}");
        assert_eq!(done.messages().matches("needs reset").count(), 1, "{case}: {done}");
    }
}

/// Runs cases in which the device may go on.
fn endured(payload: &str, cases: &[&str]) {
    for case in cases {
        attack(payload, case);
    }
}

#[test]
fn broken_chains_cost_the_device() {
    refused(
        "hostile-block",
        &[
            "loop",
            "loop-from-start",
            "next-outside-table",
            "head-outside-table",
            "available-index-jumps",
            "zero-length",
            "beyond-memory",
            "across-the-end",
            "device-registers",
            "address-wraps",
            "huge-descriptor",
            "huge-chain",
            "writable-first",
            "no-status",
            "short-header",
        ],
    );
}

#[test]
fn broken_indirect_tables_cost_the_device() {
    refused(
        "hostile-block",
        &[
            "indirect-in-indirect",
            "indirect-in-itself",
            "indirect-loop",
            "indirect-next-outside",
            "indirect-with-next",
            "indirect-empty",
            "indirect-odd-length",
            "indirect-too-long",
            "indirect-huge",
            "indirect-beyond-memory",
            "indirect-wraps",
            "indirect-not-negotiated",
        ],
    );
}

#[test]
fn queues_that_cannot_be_cost_the_device() {
    refused("hostile-block", &["queue-not-ready"]);
    endured("hostile-block", &["queue-layouts"]);
}

#[test]
fn what_changes_under_requests_in_flight_is_endured() {
    endured(
        "hostile-block",
        &["data-over-rings", "set-up-in-flight", "reset-in-flight", "descriptors-in-flight"],
    );
}

#[test]
fn requests_that_no_drive_can_do_are_errors() {
    endured("hostile-block", &["large-request", "request-extremes"]);
}

#[test]
fn notifications_and_interrupts_of_any_kind_are_endured() {
    endured(
        "hostile-block",
        &["notify-before-ready", "notification-flood", "event-index", "interrupt-to-nobody"],
    );
}

#[test]
fn the_log_does_not_grow_with_what_a_guest_does() {
    endured("hostile-block", &["break-flood"]);
}

#[test]
fn registers_withstand_every_width_offset_and_value() {
    endured("hostile-mmio", &["widths", "read-only", "status", "selectors"]);
}

#[test]
fn the_other_devices_withstand_every_width_offset_and_value() {
    endured("hostile-mmio", &["io-apic", "ports", "strings"]);
}
