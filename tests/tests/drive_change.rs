//! `PATCH /drives/{drive_id}` of a running domain: what the guest sees, and what is refused.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::place;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(240);

/// A domain whose guest watches its drive, which has one sector of ones.
struct Domain {
    folder: TempDir,
    monitor: ApiMonitor,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Domain {
    fn new(drive: Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut monitor = ApiMonitor::start(folder.path());
        let mut whole = json!({"drive_id": "d", "path_on_host": image(folder.path(), "first", 1, 1)});
        whole.as_object_mut().unwrap().extend(drive.as_object().unwrap().clone());
        let config = json!({
            "boot-source": {"kernel_image_path": place::payload("changing-disk")},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
            "drives": [whole],
            "stop_timeout_ms": 100,
        });
        monitor.done("PUT /vm?start=true", &config.to_string());
        let (input, output) = monitor.console();
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let domain = Self { folder, monitor, input, lines };
        domain.shows("start 0: 1 sectors, first byte 1");
        domain
    }

    fn image(&self, name: &str, sectors: usize, byte: u8) -> PathBuf {
        image(self.folder.path(), name, sectors, byte)
    }

    fn shows(&self, line: &str) {
        assert_eq!(self.lines.recv_timeout(PATIENCE).unwrap().trim_end(), line);
    }

    /// Asks the guest to look.
    fn look(&mut self) {
        self.input.write_all(b".").unwrap();
    }

    fn patch(&self, fields: Value) {
        self.monitor.done("PATCH /drives/d", &body(fields));
    }

    fn refusal(&self, fields: Value) -> String {
        self.monitor.refusal("PATCH /drives/d", &body(fields))
    }

    /// What `GET /metrics` says of the drive.
    fn metric(&self, name: &str) -> Option<String> {
        let mut connection = self.monitor.connect();
        connection.send("GET /metrics", "");
        let text = String::from_utf8(connection.raw_answer().2).unwrap();
        let line = format!("{name}{{drive=\"d\"}} ");
        text.lines().find_map(|found| found.strip_prefix(&line)).map(str::to_owned)
    }

    fn config(&self) -> Value {
        self.monitor.ask("GET /vm/config", "").1
    }

    fn end(mut self) {
        self.input.write_all(b"q").unwrap();
        assert_eq!(self.monitor.finish().code(), Some(0));
    }
}

fn body(mut fields: Value) -> String {
    fields["drive_id"] = json!("d");
    fields.to_string()
}

fn image(folder: &Path, name: &str, sectors: usize, byte: u8) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, vec![byte; 512 * sectors]).unwrap();
    path
}

#[test]
fn the_guest_sees_another_file_and_the_same_one_grown() {
    let mut domain = Domain::new(json!({}));
    let other = domain.image("other", 7, 2);
    domain.patch(json!({"path_on_host": other}));
    domain.shows("change 1: 7 sectors, first byte 2");
    assert_eq!(domain.config()["drives"][0]["path_on_host"], json!(other));
    let first = domain.folder.path().join("first");
    let is_locked =
        |path: &Path| flock(File::open(path).unwrap(), FlockOperation::NonBlockingLockExclusive).is_err();
    assert!(is_locked(&other) && !is_locked(&first));
    File::options().write(true).open(&other).unwrap().set_len(512 * 20).unwrap();
    domain.look();
    domain.shows("look 1: 7 sectors, first byte 2");
    domain.patch(json!({"path_on_host": other}));
    domain.shows("change 2: 20 sectors, first byte 2");
    assert!(is_locked(&other));
    // Held, a guest hears of it when it goes on.
    domain.monitor.done("PATCH /vm", r#"{"state": "Paused"}"#);
    domain.patch(json!({"path_on_host": first}));
    domain.monitor.done("PATCH /vm", r#"{"state": "Resumed"}"#);
    domain.shows("change 3: 1 sectors, first byte 1");
    domain.end();
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut domain = Domain::new(json!({}));
    let before = domain.config();
    let held = domain.image("held", 3, 3);
    let holder = File::open(&held).unwrap();
    flock(&holder, FlockOperation::NonBlockingLockShared).unwrap();
    let (empty, odd) = (domain.image("empty", 0, 0), domain.folder.path().join("odd"));
    fs::write(&odd, [0; 700]).unwrap();
    let folder = domain.folder.path();
    for (path, reason) in [
        (folder.join("missing"), "no such file"),
        (folder.to_owned(), "neither a regular file nor a block device"),
        ("/dev/null".into(), "neither a regular file nor a block device"),
        (empty, "is empty"),
        (odd, "its 700 bytes are not a multiple of the block size, 512"),
        (held.clone(), "locked: another domain, drive or program uses it"),
    ] {
        let limits = json!({"ops": {"size": 1, "refill_time": 1}});
        let message = domain.refusal(json!({"path_on_host": path, "rate_limiter": limits}));
        assert_eq!(message, format!("drives[0].path_on_host: {}: {reason}", path.display()));
    }
    for (fields, reason) in [
        (json!({"path_on_host": ""}), "drives[0].path_on_host: is empty"),
        (json!({"path_on_host": "a\0b"}), "drives[0].path_on_host: has a NUL byte at position 1"),
        (json!({"path_on_host": "fd:999"}), "drives[0].path_on_host: fd:999: no such descriptor is open"),
        (
            json!({"is_read_only": true}),
            "unknown field `is_read_only`, expected one of `drive_id`, `path_on_host`",
        ),
        (json!({"path_on_host": 5}), "path_on_host: invalid type: integer `5`"),
        (json!({"rate_limiter": {"ops": {"size": 1}}}), "missing field `refill_time`"),
        (json!({"rate_limiter": {"iops": {}}}), "unknown field `iops`, expected `bandwidth` or `ops`"),
    ] {
        let message = domain.refusal(fields.clone());
        assert!(message.contains(reason), "{fields}: {message}");
    }
    let other = r#"{"drive_id": "e", "path_on_host": "x"}"#;
    assert!(domain.monitor.refusal("PATCH /drives/e", other).contains("there is no drive \"e\""));
    assert!(domain.monitor.refusal("PATCH /drives/d", other).contains("does not match"));
    assert_eq!(domain.config(), before);
    domain.look();
    domain.shows("look 0: 1 sectors, first byte 1");
    drop(holder);
    domain.patch(json!({"path_on_host": held}));
    domain.shows("change 1: 3 sectors, first byte 3");
    assert_eq!(domain.metric("cofferdam_block_update_total").as_deref(), Some("1"));
    // The six files, and the descriptor that is not open.
    assert_eq!(domain.metric("cofferdam_block_update_fails_total").as_deref(), Some("7"));
    domain.end();
}

#[test]
fn a_read_only_drive_stays_read_only_and_shares_its_files() {
    let domain = Domain::new(json!({"is_read_only": true}));
    let other = domain.image("other", 2, 2);
    let reader = File::open(&other).unwrap();
    flock(&reader, FlockOperation::NonBlockingLockShared).unwrap();
    domain.patch(json!({"path_on_host": other}));
    domain.shows("change 1: 2 sectors, first byte 2");
    drop(reader);
    assert!(flock(File::open(&other).unwrap(), FlockOperation::NonBlockingLockExclusive).is_err());
    domain.end();
}

#[test]
fn limits_are_replaced_one_by_one_and_taken_away_by_zeroes() {
    let hour = json!({"size": 1, "refill_time": 3_600_000});
    let mut domain = Domain::new(json!({"rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}));
    let limiter = |domain: &Domain| domain.config()["drives"][0]["rate_limiter"].clone();
    domain.patch(json!({"rate_limiter": {"ops": hour}}));
    // One more is in the new bucket; the next one would take an hour.
    domain.look();
    domain.shows("look 0: 1 sectors, first byte 1");
    domain.look();
    assert!(domain.lines.recv_timeout(Duration::from_millis(200)).is_err(), "nothing limits the guest");
    domain.patch(json!({"rate_limiter": {"bandwidth": {"size": 1 << 20, "refill_time": 1}}}));
    assert_eq!(limiter(&domain)["ops"], hour, "what is left out stays");
    assert!(domain.lines.recv_timeout(Duration::from_millis(200)).is_err(), "nothing limits the guest");
    domain.patch(json!({"rate_limiter": {"ops": {"size": 0, "refill_time": 0}}}));
    domain.shows("look 0: 1 sectors, first byte 1");
    assert_eq!(limiter(&domain), json!({"bandwidth": {"size": 1 << 20, "refill_time": 1}}));
    domain.patch(json!({"rate_limiter": null}));
    assert_eq!(limiter(&domain)["bandwidth"]["size"], json!(1 << 20));
    domain.end();
}

#[test]
fn a_descriptor_that_is_the_monitor_s_own_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let disk = image(folder.path(), "disk", 1, 1);
    let config = json!({
        "boot-source": {"kernel_image_path": place::payload("spin")},
        "drives": [{"drive_id": "d", "path_on_host": disk}],
        "vsock": {"guest_cid": 3, "uds_path": folder.path().join("v.sock")},
        "serial": {"serial_out_path": folder.path().join("log")},
        "stop_timeout_ms": 100,
    });
    let monitor =
        ApiMonitor::with(folder.path(), &["--status-file".into(), folder.path().join("status").into()]);
    monitor.done("PUT /vm?start=true", &config.to_string());
    let _connection = UnixStream::connect(folder.path().join("v.sock")).unwrap();
    let pid = monitor.child().id();
    let mut own = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap() {
        let fd: RawFd = entry.unwrap().file_name().into_string().unwrap().parse().unwrap();
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let closes_on_exec = i32::from_str_radix(flags, 8).unwrap() & libc::O_CLOEXEC != 0;
        let inherited = fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let same = inherited.is_some() && inherited == fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok();
        // The standard streams, and what this process was started with.
        assert!(closes_on_exec || fd < 3 || same, "{fd}: {inherited:?}: {info}");
        if !closes_on_exec {
            continue;
        }
        own += 1;
        let patch = json!({"drive_id": "d", "path_on_host": format!("fd:{fd}")}).to_string();
        let message = monitor.refusal("PATCH /drives/d", &patch);
        // (A descriptor that was the connection of a request is gone by the next one.)
        assert!(message.contains(&format!("drives[0].path_on_host: fd:{fd}: ")), "{message}");
        assert!(message.contains("not inherited") || message.contains("no such descriptor"), "{message}");
    }
    assert!(own > 15, "{own}");
    monitor.done("DELETE /vm", "");
    assert_eq!(monitor.finish().code(), Some(143));
}
