//! The monitor as a process: what it inherits, and signals at any moment.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::status::{Event, ExitReason, Outcome};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];

/// A kernel of a few instructions, entered by the 64-bit protocol.
fn kernel(folder: &Path, code: &[u8]) -> PathBuf {
    let mut elf = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(0x10, &[2, 0, 62, 0, 1, 0, 0, 0]); // an executable for x86-64
    put(0x18, &0x10_0000_u64.to_le_bytes()); // entry
    put(0x20, &64_u64.to_le_bytes()); // program headers
    put(0x34, &[64, 0, 56, 0, 1, 0, 64, 0]); // sizes of headers, one program header
    put(0x40, &[1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD
    put(0x48, &0x800_u64.to_le_bytes()); // offset
    put(0x50, &0x10_0000_u64.to_le_bytes()); // virtual and physical address
    put(0x58, &0x10_0000_u64.to_le_bytes());
    put(0x60, &16_u64.to_le_bytes()); // size in file and memory
    put(0x68, &16_u64.to_le_bytes());
    put(0x70, &0x1000_u64.to_le_bytes()); // alignment
    put(0x800, code);
    let path = folder.join("kernel");
    fs::write(&path, elf).unwrap();
    path
}

/// A configuration of a kernel that does nothing, with more fields.
fn config(folder: &Path, more: &str) -> PathBuf {
    let kernel = kernel(folder, SPIN);
    let path = folder.join("config.json");
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": {kernel:?}}}, "serial": {{"mode": "None"}}, "stop_timeout_ms": 50{more}}}"#
    );
    fs::write(&path, text).unwrap();
    path
}

fn monitor(config: impl std::fmt::Display) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam-vmm"));
    command.arg("--config-file").arg(config.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn wait(child: &mut Child) -> ExitStatus {
    let end = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status,
            None if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the monitor does not end");
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A monitor that reports on a pipe.
fn reporting(config: &Path) -> (Child, BufReader<File>) {
    let (reader, writer) = status_pipe();
    let mut command = monitor(config.display());
    command.arg("--status-file").arg(format!("fd:{}", writer.as_raw_fd()));
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    (child, BufReader::new(File::from(reader)))
}

fn status_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setfd(&writer, FdFlags::empty()).unwrap();
    (reader, writer)
}

fn event(reader: &mut impl BufRead) -> Event {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

fn outcome(reader: &mut impl BufRead) -> Outcome {
    match event(reader) {
        Event::Stopped(outcome) => outcome,
        Event::Running { .. } | Event::Step { .. } => outcome(reader),
    }
}

/// What the threads of a process have run.
fn cpu_time(child: &Child) -> String {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
    tasks.map(|task| fs::read_to_string(task.path().join("schedstat")).unwrap_or_default()).collect()
}

#[test]
fn a_signal_at_any_moment_stops_the_domain_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v.sock");
    let config = config(folder.path(), &format!(r#", "vsock": {{"guest_cid": 3, "uds_path": {socket:?}}}"#));
    for delay in (0..40).map(|step| Duration::from_micros(step * 250)) {
        let (mut child, mut status) = reporting(&config);
        thread::sleep(delay);
        send(&child, Signal::TERM);
        let end = wait(&mut child);
        // Until the monitor minds signals itself, there is nothing to clean up.
        if end.signal() != Some(Signal::TERM.as_raw()) {
            assert_eq!(end.code(), Some(143), "{delay:?}: {end}");
            assert_eq!(outcome(&mut status).exit_reason, ExitReason::Stopped);
        }
        assert!(!socket.exists(), "{delay:?}");
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_configuration() {
    let mut child = monitor("/dev/stdin").stdin(Stdio::piped()).spawn().unwrap();
    let _typed = child.stdin.take();
    thread::sleep(Duration::from_millis(50));
    send(&child, Signal::TERM);
    assert_eq!(wait(&mut child).signal(), Some(Signal::TERM.as_raw()));
}

#[test]
fn a_reader_that_does_not_read_the_console_does_not_keep_the_domain() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(config(folder.path(), "")).unwrap();
    // mov dx, 0x3f8; out dx, al; jmp to the out
    kernel(folder.path(), &[0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd]);
    let path = folder.path().join("stdio.json");
    fs::write(&path, text.replace(r#"{"mode": "None"}"#, r#"{"mode": "Stdio"}"#)).unwrap();
    let (reader, writer) = status_pipe();
    let status_file = format!("fd:{}", writer.as_raw_fd());
    let mut command = monitor(path.display());
    let mut child = command.args(["--status-file", &status_file]).stdout(Stdio::piped()).spawn().unwrap();
    drop(writer);
    let mut status = BufReader::new(File::from(reader));
    assert!(matches!(event(&mut status), Event::Running { .. }));
    let mut stdout = child.stdout.take().unwrap();
    let end = Instant::now() + PATIENCE;
    let (mut last, mut still) = (String::new(), 0);
    // When the pipe is full and no thread runs any more, the vCPU waits for room.
    while rustix::io::ioctl_fionread(&stdout).unwrap() < 32 << 10 || still < 5 {
        assert!(Instant::now() < end, "the guest does not fill the pipe");
        thread::sleep(Duration::from_millis(50));
        let now = cpu_time(&child);
        still = if now == last { still + 1 } else { 0 };
        last = now;
    }
    send(&child, Signal::TERM);
    // The domain has stopped, and what it printed is offered once more.
    thread::sleep(Duration::from_millis(300));
    let printed = thread::spawn(move || {
        let mut printed = Vec::new();
        stdout.read_to_end(&mut printed).map(|_| printed.len())
    });
    assert_eq!(wait(&mut child).code(), Some(143));
    assert!(printed.join().unwrap().unwrap() >= 32 << 10);
    assert_eq!(outcome(&mut status).exit_reason, ExitReason::Stopped);
}

#[test]
fn a_client_that_is_gone_before_the_domain_runs_stops_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, status) = reporting(&config(folder.path(), ""));
    drop(status);
    assert_eq!(wait(&mut child).code(), Some(143));
}

#[test]
fn a_client_that_goes_takes_its_domain_along_also_when_nobody_reads_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let (mut child, mut status) = reporting(&config(folder.path(), ""));
    assert!(matches!(event(&mut status), Event::Running { .. }));
    drop(child.stderr.take());
    drop(status);
    // Not a signal: a log that cannot be written is no reason to abort.
    assert_eq!(wait(&mut child).code(), Some(143));
}

#[test]
fn the_limit_on_descriptors_is_raised() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = status_pipe();
    let script = r#"ulimit -S -n 64; exec "$@""#;
    let mut child = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_cofferdam-vmm"), "--config-file"])
        .arg(config(folder.path(), ""))
        .args(["--status-file", &format!("fd:{}", writer.as_raw_fd())])
        .spawn()
        .unwrap();
    drop(writer);
    let mut status = BufReader::new(File::from(reader));
    assert!(matches!(event(&mut status), Event::Running { .. }));
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<_> = line.split_whitespace().filter(|word| word.parse::<u64>().is_ok()).collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
    send(&child, Signal::TERM);
    assert_eq!(wait(&mut child).code(), Some(143));
}

/// Whoever starts the monitor may have left the signal's default, which is to end.
#[test]
fn a_limit_on_files_is_an_error_and_not_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "");
    let output = Command::new("prlimit")
        .args(["--fsize=1048576", env!("CARGO_BIN_EXE_cofferdam-vmm"), "--config-file"])
        .arg(config)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{}: {text}", output.status);
    assert!(text.contains("guest memory") && text.contains("File too large"), "{text}");
}

#[test]
fn a_descriptor_that_was_not_inherited_is_refused() {
    for number in 3..6 {
        // Tests beside this one may have left descriptors to be inherited.
        let script = format!(r#"exec "$0" --config-file fd:{number} 3<&- 4<&- 5<&-"#);
        let output = Command::new("sh")
            .arg("-c")
            .arg(script)
            .arg(env!("CARGO_BIN_EXE_cofferdam-vmm"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{number}: {text}");
        // Unless the monitor has that number for something of its own by then.
        let reasons = ["no such descriptor is open", "it was not inherited"];
        let refused = reasons.iter().any(|reason| text.contains(&format!("fd:{number}: {reason}")));
        assert!(refused, "{number}: {text}");
    }
}

#[test]
fn bad_arguments_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |command: &mut Command, message: &str| {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert!(text.contains(message), "{text}");
    };
    let good = config(folder.path(), "");
    refused(monitor(good.display()).args(["--id", "a b"]), "--id: \"a b\"");
    refused(&mut monitor("fd:1"), "is not a descriptor from 3 on");
    let large = folder.path().join("large");
    File::create(&large).unwrap().write_all(&vec![b' '; (1 << 20) + 1]).unwrap();
    refused(&mut monitor(large.display()), "1048577 bytes long; at most 1048576 are read");
}

#[test]
fn a_console_pipe_without_a_reader_is_refused_and_does_not_hold_up_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let text = fs::read_to_string(config(folder.path(), "")).unwrap();
    let file = format!(r#"{{"mode": "File", "serial_out_path": {pipe:?}}}"#);
    let path = folder.path().join("piped.json");
    fs::write(&path, text.replace(r#"{"mode": "None"}"#, &file)).unwrap();
    let mut child = monitor(path.display()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(wait(&mut child).code(), Some(125));
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("serial.serial_out_path"), "{text}");
}
