//! `cofferdam run` against monitors that are shell scripts: what it starts,
//! what it makes of every way in which a monitor can end, and what it passes on.
//!
//! A script finds its report as `$status`, its configuration as `$config` and
//! the test's folder as its working directory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::Value;
use tempfile::TempDir;

use self::support::{minding_signals, terminal};

mod support;

const RUNNING: &str = r#"echo '{"event":"running","platform":"plain","protected":false}' > $status"#;

/// A shell command that reports an end.
fn stopped(reason: &str, code: &str, message: &str) -> String {
    format!(
        r#"echo '{{"event":"stopped","platform":"plain","protected":false,"exit_reason":"{reason}","exit_code":{code},"message":"{message}","phases":{{"user_space":5}}}}' > $status"#
    )
}

/// A folder with a script for a monitor, and the command that runs it.
struct Case {
    folder: TempDir,
}

impl Case {
    fn new(lines: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\necho \"$@\" > args\nconfig=/proc/self/fd/${{2#fd:}}\nstatus=/proc/self/fd/${{4#fd:}}\n{}\n",
            lines.join("\n")
        );
        let path = folder.path().join("vmm");
        // Written under another name: a program that is open for writing cannot be executed, and
        // a child of another test may hold this descriptor for a moment.
        fs::write(folder.path().join("text"), script).unwrap();
        let copied = Command::new("cp").arg(folder.path().join("text")).arg(&path).status().unwrap();
        assert!(copied.success());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    fn command(&self, extra: &[&str]) -> Command {
        let mut command = minding_signals(env!("CARGO_BIN_EXE_cofferdam"));
        command.args(["run", "--kernel", "vmlinux", "--vmm", "./vmm", "--id", "d"]).args(extra);
        command.current_dir(self.folder.path()).env("COFFERDAM_RUN_DIR", "run").stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, extra: &[&str]) -> Output {
        self.command(extra).output().unwrap()
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The last line of standard output, and what stands before it.
fn json(output: &Output) -> (Value, Vec<u8>) {
    let text = output.stdout.strip_suffix(b"\n").expect("standard output ends with a line");
    let start = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    (serde_json::from_slice(&text[start..]).expect("the last line is JSON"), text[..start].to_vec())
}

/// Waits for a line of standard error that contains `part`.
fn wait_for_line(child: &mut Child, part: &str) -> BufReader<std::process::ChildStderr> {
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains(part) {
        line.clear();
        assert_ne!(reader.read_line(&mut line).unwrap(), 0, "no line with {part:?}");
    }
    reader
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn a_power_off_is_quiet() {
    let case = Case::new(&[RUNNING, "echo guest says hello", &stopped("power_off", "null", "off")]);
    let output = case.run(&[]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stdout, b"guest says hello\n");
    assert_eq!(stderr(&output), "cofferdam: domain d runs on platform plain: not protected\n");
}

#[test]
fn the_monitor_gets_its_configuration_by_descriptor() {
    let case = Case::new(&["cat $config > config", &stopped("power_off", "0", "off")]);
    case.run(&["--cpus", "2", "--memory", "1G", "--drive", "path=x,root", "--vsock", "v.sock"]);
    let config: Value = serde_json::from_str(&case.file("config")).unwrap();
    assert_eq!(config["machine-config"]["vcpu_count"], 2);
    assert_eq!(config["machine-config"]["mem_size_mib"], 1024);
    assert_eq!(config["drives"][0]["path_on_host"], "x");
    assert_eq!(config["vsock"]["uds_path"], "v.sock");
    let args = case.file("args");
    let words: Vec<&str> = args.split_whitespace().collect();
    let [_, config, _, status, _, entry, _, id, _, level, _, _, start, _, api] = words[..] else {
        panic!("{args}")
    };
    assert_eq!(
        [words[0], words[2], words[4], words[6], words[8], words[10], words[11], words[13]],
        [
            "--config-file",
            "--status-file",
            "--run-entry",
            "--id",
            "--level",
            "--show-level",
            "--start-time-us",
            "--api-sock"
        ]
    );
    assert_eq!(level, "Warning");
    assert!([config, status, entry, api].iter().all(|word| word.starts_with("fd:")) && id == "d", "{args}");
    assert!(start.parse::<u64>().unwrap() > 0);
}

#[test]
fn the_monitor_stands_in_a_process_group_of_its_own() {
    let case = Case::new(&[
        "cut -d ' ' -f 5 /proc/$$/stat > group",
        "echo $$ > pid",
        &stopped("power_off", "null", "off"),
    ]);
    case.run(&[]);
    assert_eq!(case.file("group"), case.file("pid"));
}

#[test]
fn the_guests_code_and_each_reason_become_the_exit_code() {
    for (reason, code, exit) in [
        ("power_off", "7", 7),
        ("power_off", "143", 143),
        ("reboot", "null", 121),
        ("panic", "null", 121),
        ("triple_fault", "null", 122),
        ("launch_refused", "null", 123),
        ("config", "null", 125),
        ("stopped", "3", 143),
    ] {
        let case = Case::new(&[RUNNING, &stopped(reason, code, "it ended"), "exit 9"]);
        let output = case.run(&["--json"]);
        assert_eq!(output.status.code(), Some(exit), "{reason}");
        assert!(stderr(&output).contains("cofferdam: domain d: it ended"), "{}", stderr(&output));
        let (object, before) = json(&output);
        assert_eq!(object["exit_reason"], reason);
        assert_eq!(object["exit_code"].to_string(), code);
        assert_eq!(object["phases"]["user_space"], 5);
        assert_eq!(object.as_object().unwrap().len(), 12);
        assert_eq!(before, b"");
    }
}

#[test]
fn json_stands_on_a_line_of_its_own() {
    for (console, expected) in [
        (r"printf 'no end'", &b"no end\n"[..]),
        (r"printf 'end\n'", b"end\n"),
        (r"printf '\r\000\377\n\n'", b"\r\0\xff\n\n"),
        ("true", b""),
    ] {
        let case = Case::new(&[RUNNING, console, &stopped("power_off", "null", "off")]);
        let (object, before) = json(&case.run(&["--json"]));
        assert_eq!(object["exit_reason"], "power_off");
        assert_eq!(before, expected, "{console}");
    }
}

#[test]
fn much_output_passes_byte_for_byte() {
    let case =
        Case::new(&["head -c 3000000 /dev/urandom > sent", "cat sent", &stopped("power_off", "null", "off")]);
    let (_, mut before) = json(&case.run(&["--json"]));
    let sent = fs::read(case.folder.path().join("sent")).unwrap();
    if sent.last() != Some(&b'\n') {
        assert_eq!(before.pop(), Some(b'\n'));
    }
    assert!(before == sent);
}

#[test]
fn standard_input_reaches_the_monitor() {
    let case = Case::new(&["cat", &stopped("power_off", "null", "off")]);
    for extra in [&[][..], &["--json"]] {
        let mut child = case.command(extra).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"\x01x\x00typed\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stdout.starts_with(b"\x01x\x00typed\n"));
    }
}

#[test]
fn a_console_elsewhere_leaves_the_streams_alone() {
    let case = Case::new(&["cat > input", "echo lost", &stopped("power_off", "null", "off")]);
    let mut child = case.command(&["--json", "--console", "none"]).stdin(Stdio::piped()).spawn().unwrap();
    let typed = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(typed);
    assert_eq!(json(&output).1, b"");
    assert_eq!(case.file("input"), "");
}

#[test]
fn a_killed_monitor_is_told_and_its_socket_removed() {
    let case = Case::new(&[RUNNING, "echo $$ > pid", "echo ready >&2", "exec sleep 60"]);
    let socket = case.folder.path().join("v.sock");
    let mut child = case.command(&["--json", "--vsock", "v.sock"]).spawn().unwrap();
    let _reader = wait_for_line(&mut child, "ready");
    drop(UnixListener::bind(&socket).unwrap());
    let pid: i32 = case.file("pid").trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(124));
    let (object, _) = json(&output);
    assert_eq!(object["exit_reason"], "monitor_error");
    let message = object["message"].as_str().unwrap();
    assert_eq!(message, "the monitor was killed by signal 9, as by the kernel when memory is short");
    assert_eq!(object["platform"], "plain");
    assert!(!socket.exists());
}

#[test]
fn a_monitor_that_says_nothing_is_an_error() {
    let output = Case::new(&["exit 3"]).run(&["--json"]);
    assert_eq!(output.status.code(), Some(124));
    let message = json(&output).0["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "the monitor exited with status 3 without saying how the domain ended");
    assert!(stderr(&output).contains(&message));

    let output = Case::new(&["echo nonsense > $status"]).run(&["--json"]);
    let message = json(&output).0["message"].as_str().unwrap().to_owned();
    assert!(message.contains("its report cannot be read"), "{message}");
}

#[test]
fn a_signal_becomes_a_request_to_stop() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let on_term = format!(
            "trap \"echo asked >&2; {}; exit\" TERM",
            stopped("stopped", "null", "asked").replace('"', "\\\"")
        );
        let case = Case::new(&[&on_term, RUNNING, "while :; do sleep 0.05; done"]);
        let mut child = case.command(&[]).spawn().unwrap();
        let _reader = wait_for_line(&mut child, "not protected");
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(143), "{signal:?}");
    }
}

#[test]
fn a_second_signal_is_repeated_until_the_monitor_ends() {
    let case = Case::new(&[
        "count=0",
        "trap 'count=$((count+1)); echo term $count >&2' TERM",
        RUNNING,
        "while [ $count -lt 4 ]; do sleep 0.02; done",
        &stopped("stopped", "null", "hard"),
    ]);
    let mut child = case.command(&[]).spawn().unwrap();
    let mut reader = wait_for_line(&mut child, "not protected");
    send(&child, Signal::TERM);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "term 1\n");
    send(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_monitor_learns_that_the_command_line_was_killed() {
    let case = Case::new(&[
        "trap '' PIPE",
        "exec 9> $status",
        RUNNING,
        "while echo >&9; do sleep 0.05; done 2>/dev/null",
        "echo yes > gone.new",
        "mv gone.new gone",
    ]);
    let mut child = case.command(&[]).spawn().unwrap();
    let _reader = wait_for_line(&mut child, "not protected");
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = case.folder.path().join("gone");
    let deadline = Instant::now() + Duration::from_secs(240);
    while !gone.exists() {
        assert!(Instant::now() < deadline, "the monitor still writes its report");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_background_has_no_terminal_and_keeps_what_is_said() {
    let case = Case::new(&[
        "cut -d ' ' -f 6 /proc/$PPID/stat > session",
        "echo $PPID > command",
        "cat > input",
        "echo from the monitor >&2",
        "echo from the guest",
        RUNNING,
        "while [ ! -e go ]; do sleep 0.05; done",
        &stopped("power_off", "5", "off"),
    ]);
    let output = case.run(&["--detach"]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"d\n"[..]), "{}", stderr(&output));
    assert_eq!(stderr(&output), "cofferdam: domain d runs on platform plain: not protected\n");
    assert_eq!(case.file("session"), case.file("command"), "a session of its own");
    assert_eq!(case.file("input"), "");
    let deadline = Instant::now() + Duration::from_secs(240);
    // In any order.
    let said = || {
        let logs = case.file("run/d/monitor.log") + &case.file("run/d/console.log");
        logs.lines().map(str::to_owned).collect::<BTreeSet<String>>()
    };
    let expected = ["from the guest", "from the monitor", "domain d runs on platform plain: not protected"]
        .map(str::to_owned);
    while said() != BTreeSet::from(expected.clone()) {
        assert!(Instant::now() < deadline, "{:?}", said());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(case.file("run/d/console.log"), "from the guest\n");
    fs::write(case.folder.path().join("go"), "").unwrap();
    while case.folder.path().join("run/d").exists() {
        assert!(Instant::now() < deadline, "the entry is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    let end: Value = serde_json::from_str(&case.file("run/.ended/d")).unwrap();
    assert_eq!(end["exit_code"], 5);
}

#[test]
fn a_background_that_nobody_waits_for_stops_its_domain() {
    let on_term = format!(
        "trap \"touch asked; {}; exit\" TERM",
        stopped("stopped", "null", "asked").replace('"', "\\\"")
    );
    let case = Case::new(&[
        &on_term,
        "touch started",
        "while [ ! -e go ]; do sleep 0.05; done",
        RUNNING,
        "while :; do sleep 0.05; done",
    ]);
    let path = |name: &str| case.folder.path().join(name);
    let deadline = Instant::now() + Duration::from_secs(240);
    let wait_for = |done: &dyn Fn() -> bool| {
        while !done() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut child = case.command(&["--detach"]).spawn().unwrap();
    wait_for(&|| path("started").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    fs::write(path("go"), "").unwrap();
    wait_for(&|| path("asked").exists() && !path("run/d").exists());
}

#[test]
fn a_background_that_is_killed_is_told() {
    let case = Case::new(&["kill -9 $PPID", "exec sleep 1"]);
    let output = case.run(&["--detach"]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(124), &b""[..]));
    assert!(stderr(&output).contains("the process in the background has ended"), "{}", stderr(&output));
}

#[test]
fn a_run_directory_that_cannot_be_had_starts_nothing() {
    let case = Case::new(&["true"]);
    for (place, part) in
        [("missing/run", "cannot make missing/run: No such file"), ("vmm", "cannot open vmm")]
    {
        let output = case.run(&["--json", "--run-dir", place]);
        assert_eq!(output.status.code(), Some(125));
        let (object, _) = json(&output);
        assert_eq!(object["exit_reason"], "config");
        assert!(object["message"].as_str().unwrap().contains(part), "{object}");
        assert!(!case.folder.path().join("args").exists(), "a monitor was started");
    }
}

#[test]
fn bad_configurations_start_nothing() {
    for (extra, part) in [
        (vec!["--cpus", "33"], "--cpus: 33 is not between 1 and 32"),
        (vec!["--cpus", "0"], "--cpus: 0 is not between 1 and 32"),
        (vec!["--drive", "path=a,id=x", "--drive", "path=b,id=x"], "--drive 2, id: \"x\" is used twice"),
        (vec!["--memory", "1"], "--memory"),
        (vec!["--bogus"], "--bogus"),
        (vec!["--guest-cid", "4"], "--vsock <SOCKET>"),
    ] {
        let case = Case::new(&["true"]);
        let output = case.run(&[&["--json"][..], &extra].concat());
        assert_eq!(output.status.code(), Some(125), "{extra:?}");
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
        let (object, _) = json(&output);
        assert_eq!(object["exit_reason"], "config");
        assert_eq!(object["platform"], Value::Null);
        assert!(object["message"].as_str().unwrap().contains(part), "{object}");
        assert!(!case.folder.path().join("args").exists(), "{extra:?}: a monitor was started");
    }
}

#[test]
fn a_missing_monitor_is_named() {
    let case = Case::new(&[]);
    fs::remove_file(case.folder.path().join("vmm")).unwrap();
    let output = case.run(&["--json"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("cannot start the monitor ./vmm: No such file"), "{}", stderr(&output));
    assert_eq!(json(&output).0["exit_reason"], "config");
}

#[test]
fn closed_streams_are_survived() {
    let case = Case::new(&[
        "trap '' PIPE",
        RUNNING,
        "for i in 1 2 3 4 5 6 7 8; do head -c 20000 /dev/zero; done 2>/dev/null",
        &stopped("power_off", "5", "off"),
    ]);
    for extra in [&[][..], &["--json"]] {
        let mut child = case.command(extra).spawn().unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(5));
    }
}

#[test]
fn help_teaches_and_is_not_an_error() {
    let help = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_cofferdam")).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.contains('\x1b'), "colours, and no terminal");
        text
    };
    let text = help(&["run", "--help"]);
    for part in
        ["Examples:", "--drive path=root.img,root", "Exit codes", "143", "Ctrl-A x", "[default: 128M]"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(help(&["--help"]).contains("cofferdam host check"));
    assert!(help(&["host", "check", "--help"]).contains("--json"));
}

#[test]
fn host_check_answers_for_this_host() {
    let check = |words: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_cofferdam")).args(["host", "check"]).args(words).output().unwrap()
    };
    let output = check(&["--json"]);
    let (object, before) = json(&output);
    assert_eq!(before, b"");
    let plain = object["platforms"]["plain"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if plain { 0 } else { 125 }));
    for name in ["kvm", "KVM_CAP_SPLIT_IRQCHIP", "snp", "tdx", "cca", "vhost_vsock", "huge_pages", "io_uring"]
    {
        let check = object["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap();
        assert!(check["ok"].is_boolean() && check["reason"].is_string(), "{check}");
        assert_eq!(check["ok"] == true, check["remedy"].is_null(), "{check}");
    }
    let text = check(&[]);
    assert_eq!(text.status.code(), output.status.code());
    assert!(!text.stdout.contains(&0x1b));
}

/// Reads from the terminal until `part` has been shown.
fn read_until(person: &mut File, part: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains(part) {
        let count = person.read(&mut bytes).unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    text
}

#[test]
fn a_terminal_is_raw_while_the_domain_runs_and_ctrl_a_x_stops_it() {
    let (mut person, program) = terminal();
    let is_cooked =
        |fd: &OwnedFd| tcgetattr(fd).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ISIG);
    assert!(is_cooked(&program));
    let on_term = format!("trap \"{}; exit\" TERM", stopped("stopped", "null", "asked").replace('"', "\\\""));
    let case = Case::new(&[
        &on_term,
        RUNNING,
        // Three bytes: the two of a pair of escapes, and a Ctrl-C that is no signal here.
        "head -c 3 | od -An -tx1",
        "while :; do sleep 0.05; done",
    ]);
    let mut child = case
        .command(&[])
        .stdin(program.try_clone().unwrap())
        .stdout(program.try_clone().unwrap())
        .stderr(program.try_clone().unwrap())
        .spawn()
        .unwrap();
    let shown = read_until(&mut person, "sends a Ctrl-A\r\n");
    assert!(shown.contains("not protected\x1b[0m\r\n"), "{shown:?}");
    assert!(!is_cooked(&program));
    person.write_all(b"\x01\x01a\x03").unwrap();
    assert!(read_until(&mut person, "\n").contains("01 61 03"));
    person.write_all(b"\x01x").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(is_cooked(&program));
    assert!(read_until(&mut person, "asked").contains("cofferdam: domain d: asked"));
}

#[test]
fn a_terminal_is_restored_when_the_monitor_or_a_signal_ends_it() {
    for ending in ["kill -9 $$", "kill -TERM $PPID; exec sleep 60"] {
        let (mut person, program) = terminal();
        let before = tcgetattr(&program).unwrap().local_modes;
        let case = Case::new(&[RUNNING, "read line", ending]);
        let mut child = case.command(&[]).stdin(program.try_clone().unwrap()).spawn().unwrap();
        let _reader = wait_for_line(&mut child, "not protected");
        assert_ne!(tcgetattr(&program).unwrap().local_modes, before);
        person.write_all(b"go\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(124));
        assert_eq!(tcgetattr(&program).unwrap().local_modes, before);
    }
}
