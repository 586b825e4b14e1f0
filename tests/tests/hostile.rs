//! Guests that want to break the monitor (the payloads `hostile-*`).
//!
//! Each attacks one device and says by its exit code that the device refused, that the others went on,
//! and that after a reset all was well again. From outside this file sees what the guest cannot: that the monitor
//! lived to the end, how much memory it took, and how much it logged.

// Helpers of tests fail their tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ChildStdin;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_tests::run::send;
use cofferdam_tests::{Finished, Run, Running, place};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tempfile::TempDir;

/// What the monitor may take in memory during an attack, KiB, with what the guest touches of its own meanwhile.
const MEMORY: u64 = 32 << 10;
/// Lines on stderr: what `cofferdam` says itself, and five of a kind and a count of the rest, of which a case may have
/// one for each of the three virtio devices and one more.
const LINES: usize = 1 + 4 * 6;
/// Bytes of a drive.
const DRIVE: usize = 1 << 20;
/// What the drives are full of.
const FILLS: [u8; 2] = [0xA1, 0xB2];

/// A domain with a hostile guest.
struct Domain {
    running: Running,
    stdin: ChildStdin,
    directory: TempDir,
    /// Programs that vsock connects to. They accept nothing: a connection waits in their backlog.
    _programs: Vec<UnixListener>,
}

/// Ports on which programs of the host listen.
const SILENT: u32 = 7;
const CROWDED: u32 = 9;
const EAGER: u32 = 10;
const AS_CROWDED: u32 = 11;

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
        let listen = |port| UnixListener::bind(directory.path().join(format!("v.sock_{port}"))).unwrap();
        let programs = [SILENT, CROWDED, AS_CROWDED].map(listen).into();
        let mut running = run.start();
        let stdin = running.stdin();
        Self { running, stdin, directory, _programs: programs }
    }

    /// Waits until the guest has come to `checkpoint`.
    fn at(&self, checkpoint: &str) -> Held {
        self.running.wait_for(&format!("{checkpoint}\n"));
        held(self.running.monitor_pid()).unwrap()
    }

    /// Lets the guest go on.
    fn go_on(&self) {
        send(&self.stdin, b"\n");
    }
}

/// What `monitor` holds, unless it has ended.
fn held(monitor: Pid) -> Option<Held> {
    let process = Path::new("/proc").join(monitor.to_string());
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let memory = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(Held { memory, descriptors: fs::read_dir(process.join("fd")).ok()?.count() })
}

/// Processor time of the first vCPU of `monitor`, clock ticks in user mode and in the kernel, unless it has ended.
fn vcpu_time(monitor: Pid) -> Option<String> {
    let tasks = fs::read_dir(format!("/proc/{monitor}/task")).ok()?;
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats.into_iter().find_map(|stat| {
        let (name, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        name.ends_with("(vcpu0").then(|| fields[11..13].join(" "))
    })
}

/// Runs one case from "ready" to "done".
fn attack(payload: &str, case: &str) -> Finished {
    attack_with(payload, case, |_| ())
}

/// Runs one case; `at_ready` acts on the host's side before the guest begins.
fn attack_with<T>(payload: &str, case: &str, at_ready: impl FnOnce(&Domain) -> T) -> Finished {
    let domain = Domain::start(payload, case);
    let before = domain.at("ready");
    let _held = at_ready(&domain);
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
            "readable-after-writable",
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

#[test]
fn packets_that_cannot_be_cost_the_connection() {
    endured("hostile-vsock", &["lengths", "addresses", "operations", "credit-overrun", "resets"]);
}

#[test]
fn chains_without_a_packet_cost_the_device() {
    let done = attack("hostile-vsock", "chains");
    assert_eq!(done.console().matches("needs reset\n").count(), 9, "{done}");
}

/// A program that sends as much as is taken is held to the credit that the guest gives.
#[test]
fn the_guests_credit_is_kept_at_its_extremes() {
    let mut sender = None;
    attack_with("hostile-vsock", "credit-extremes", |domain| {
        let listener = UnixListener::bind(domain.directory.path().join(format!("v.sock_{EAGER}"))).unwrap();
        sender = Some(thread::spawn(move || {
            for _ in 0..6 {
                let mut stream = listener.accept().unwrap().0;
                stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                // It ends when nobody takes more, or when the guest resets the connection.
                let _ = stream.write_all(&[7; 1 << 20]);
            }
        }));
    });
    sender.unwrap().join().unwrap();
}

#[test]
fn floods_of_packets_are_bounded() {
    endured("hostile-vsock", &["packet-flood", "notification-flood", "connections-in-turn"]);
}

/// When there are as many connections as there can be, the next ones are refused, and a reset frees them all.
#[test]
fn a_flood_of_connections_is_refused() {
    let domain = Domain::start("hostile-vsock", "connection-flood");
    let before = domain.at("ready");
    domain.go_on();
    let crowded = domain.at("crowded");
    assert!(crowded.descriptors > before.descriptors + 100, "{before:?} {crowded:?}");
    assert!(crowded.memory <= before.memory + MEMORY, "{before:?} {crowded:?}");
    domain.go_on();
    let after = domain.at("done");
    domain.go_on();
    check("connection-flood", &domain.running.finish(), before, after);
}

/// A guest that prints without end, to a reader that does not read, waits; nothing is lost.
#[test]
fn a_flood_on_the_console_waits_for_its_reader() {
    const FLOOD: usize = 160 << 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let pipe = fs::File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
    let running = Run::new(place::payload("hostile-console"))
        .with("memory", "32M")
        .with("cmdline", "case=flood")
        .with("console", format!("file={}", path.display()))
        .start();
    let end = Instant::now() + Duration::from_secs(240);
    while running.monitor().is_none() {
        assert!(Instant::now() < end, "no monitor");
        thread::sleep(Duration::from_millis(1));
    }
    // Full when no more comes, and the guest rests.
    let (mut last, mut since) = ((0, None), Instant::now());
    while last.0 == 0 || since.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < end, "{last:?}");
        thread::sleep(Duration::from_millis(5));
        let now = (rustix::io::ioctl_fionread(&pipe).unwrap(), vcpu_time(running.monitor_pid()));
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    assert!(last.1.is_some(), "the guest has ended, so more was taken than there is room for");
    let held = held(running.monitor_pid()).unwrap();
    assert!(held.memory <= MEMORY, "{held:?}");

    let mut flood = Vec::new();
    while flood.len() < FLOOD {
        assert!(Instant::now() < end, "{} bytes came", flood.len());
        match (&pipe).take((FLOOD - flood.len()) as u64).read_to_end(&mut flood) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    assert!(
        flood.iter().zip(0_usize..).all(|(byte, at)| *byte == at as u8),
        "bytes are lost or out of order"
    );
    let done = running.finish();
    assert_eq!(done.code(), 0, "{done}");
    assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{done}");
}

/// A guest that is typed at without end, and does not read.
#[test]
fn a_flood_of_input_waits_for_the_guest() {
    let domain = Domain::start("hostile-console", "input");
    let before = domain.at("ready");
    let Domain { running, mut stdin, .. } = domain;
    let typist = thread::spawn(move || {
        // It ends when the domain has ended.
        while stdin.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let monitor = running.monitor_pid();
    let mut last = before;
    while let Some(held) = held(monitor) {
        // A monitor that ends closes its descriptors one by one.
        last.memory = held.memory;
        thread::sleep(Duration::from_millis(5));
    }
    let done = running.finish();
    typist.join().unwrap();
    check("input", &done, before, last);
}
