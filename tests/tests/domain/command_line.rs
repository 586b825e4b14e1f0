//! Containers from the command line: `cofferdam run --container` and what talks to one that runs.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cofferdam_container_manifest::{Layer, Salt, decode, encode};
use cofferdam_tests::container::{image, layers, tool};
use cofferdam_tests::place;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a container of busybox, and its own run directory.
struct Case {
    folder: TempDir,
}

impl Case {
    fn new() -> Self {
        let case = Self { folder: tempfile::tempdir().unwrap() };
        let root = layers()[0].to_str().unwrap().to_owned();
        tool(&mut case.cofferdam(&["container", "build", &root, "-o", "c", "--", "/bin/sh"]));
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cofferdam(&self, words: &[&str]) -> Command {
        let mut command = Command::new(place::cofferdam());
        command.args(words).current_dir(self.folder.path()).env("COFFERDAM_RUN_DIR", "run");
        command.env("XDG_DATA_HOME", self.path("data"));
        command
    }

    /// A run of `script`, quietly.
    fn run(&self, options: &[&str], script: &str) -> Command {
        self.run_words("c", options, &["sh", "-c", script])
    }

    fn run_words(&self, container: &str, options: &[&str], words: &[&str]) -> Command {
        let mut command =
            self.cofferdam(&["run", "-q", "--container", container, "--memory", "192M", "--image"]);
        command.arg(image()).args(options).arg("--").args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What the run directory has, but for what is kept of ends.
    fn left(&self) -> Vec<OsString> {
        let names = fs::read_dir(self.path("run")).unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| !name.to_string_lossy().starts_with('.')).collect()
    }
}

fn shown(output: &Output) -> String {
    format!(
        "{:?}\n{}\n{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn what_the_command_line_says_is_so_in_the_container() {
    let case = Case::new();
    let options = ["-e", "A=1 2", "-u", "33:34", "--read-only", "--scratch", "16M", "-i", "--json"];
    let mut child = case
        .run(&options, "wc -c; echo $A $HOME; id -u; id -g; touch /x; echo error >&2; exit 7")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&[b'x'; 300_000]).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", shown(&output));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], ["300000", "1 2 /", "33", "34"], "{text}");
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(errors, "touch: /x: Read-only file system\nerror\n");
    let outcome: Value = serde_json::from_str(lines[4]).unwrap();
    assert_eq!(outcome["container"]["step"], "stopping");
    assert_eq!(
        (&outcome["container"]["asserted_by_host"], &outcome["platform"]),
        (&true.into(), &"plain".into())
    );
    assert!(case.left().is_empty(), "{:?}", case.left());
}

/// A blob as containerd's EROFS differ leaves it with dm-verity on, made by the tools that it calls.
#[test]
fn a_layer_of_stock_tools_is_used_as_it_is() {
    let case = Case::new();
    let file = case.path("layer.erofs");
    let mut mkfs = Command::new("mkfs.erofs");
    tool(mkfs.args(["--quiet", "--all-root", "-T0", "-Enoinline_data"]).arg(&file).arg(&layers()[0]));
    let size = fs::metadata(&file).unwrap().len();
    let salt = Salt(vec![0; 32]);
    let mut format = Command::new("veritysetup");
    format.args(["format", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096"]);
    format.args([
        format!("--salt={salt}"),
        format!("--hash-offset={size}"),
        format!("--data-blocks={}", size / 4096),
    ]);
    let said = String::from_utf8(tool(format.arg(&file).arg(&file))).unwrap();
    let root_hash = said.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
    let folder = case.path("c/layers").join(root_hash);
    fs::create_dir(&folder).unwrap();
    fs::rename(file, folder.join("layer.erofs")).unwrap();
    let metadata = json!({"roothash": root_hash, "hashoffset": size}).to_string();
    fs::write(folder.join("layer.erofs.dmverity"), metadata).unwrap();
    let script = "cat /which; exit 6";
    let mut manifest = decode(&fs::read(case.path("c/manifest.json")).unwrap()).unwrap();
    manifest.layers = vec![Layer { root_hash: root_hash.parse().unwrap(), salt, size }];
    manifest.process.args = ["sh", "-c", script].map(str::to_owned).into();
    fs::write(case.path("other.json"), encode(&manifest).unwrap()).unwrap();
    let output = case.run(&["--manifest", "other.json"], script).output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(6), &b"lowest\n"[..]), "{}", shown(&output));
}

#[test]
fn a_closed_standard_output_ends_a_container_as_in_a_pipeline() {
    let case = Case::new();
    let mut child = case.run(&[], "exec seq 1 1000000000").spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "1\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(128 + 13), "{}", shown(&output));
}

#[test]
fn signals_are_the_containers_own() {
    let case = Case::new();
    for (name, signal) in [("TERM", Signal::TERM), ("INT", Signal::INT)] {
        let script = format!("trap 'echo caught; exit 9' {name}; echo up; while :; do sleep 1; done");
        let mut child = case.run(&[], &script).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        send(&child, signal);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("caught\n", Some(9)), "{name}");
    }
}

/// Waits until the container `bg` has printed this and no more.
fn wait_for_logs(case: &Case, stdout: &[u8], stderr: &[u8]) {
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        let logs = case.cofferdam(&["logs", "bg"]).output().unwrap();
        if (&logs.stdout[..], &logs.stderr[..]) == (stdout, stderr) {
            return;
        }
        assert!(Instant::now() < end, "{}", shown(&logs));
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn one_in_the_background_runs_commands_and_says_what_it_uses() {
    let case = Case::new();
    let options = ["--detach", "--id", "bg", "-i", "--allow-exec", "wc -c", "--allow-signal", "USR1"];
    let script = "trap 'echo got it' USR1; echo out; echo err >&2; while :; do sleep 1; done";
    let started = case.run(&options, script).output().unwrap();
    assert_eq!((started.status.code(), &started.stdout[..]), (Some(0), &b"bg\n"[..]), "{}", shown(&started));
    wait_for_logs(&case, b"out\n", b"err\n");
    let mut exec = case.cofferdam(&["exec", "-i", "bg", "--", "wc", "-c"]);
    let mut exec = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    exec.stdin.take().unwrap().write_all(b"four").unwrap();
    let output = exec.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"4\n"[..]), "{}", shown(&output));
    let refused = case.cofferdam(&["exec", "bg", "--", "wc", "-l"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(124));
    assert!(shown(&refused).contains("host.exec"), "{}", shown(&refused));
    tool(&mut case.cofferdam(&["kill", "bg", "--signal", "USR1"]));
    let refused = case.cofferdam(&["kill", "bg", "--signal", "KILL"]).output().unwrap();
    assert!(shown(&refused).contains("host.signals"), "{}", shown(&refused));
    let stats: Value =
        serde_json::from_slice(&tool(&mut case.cofferdam(&["stats", "bg", "--json"]))).unwrap();
    assert_eq!(stats["refused"], json!({"Exec": 1, "Signal": 1}));
    wait_for_logs(&case, b"out\ngot it\n", b"err\n");
    tool(&mut case.cofferdam(&["stop", "bg"]));
    assert!(case.left().is_empty(), "{:?}", case.left());
}

#[test]
#[ignore = "long: make test-all"]
fn two_hundred_mebibytes_of_output_arrive_intact() {
    let case = Case::new();
    let script = "dd if=/dev/zero bs=1M count=200 2>/dev/null; echo end";
    let mut child = case.run(&[], script).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (mut bytes, mut count, mut tail) = ([0; 65_536], 0, Vec::new());
    loop {
        match stdout.read(&mut bytes).unwrap() {
            0 => break,
            read => {
                let text = &bytes[..read];
                if count + read as u64 <= 200 << 20 {
                    assert!(text.iter().all(|byte| *byte == 0), "at {count}");
                }
                count += read as u64;
                tail = [&tail[..], text].concat();
                tail.drain(..tail.len().saturating_sub(5));
            }
        }
    }
    assert_eq!((count, &tail[..]), ((200 << 20) + 4, &b"\0end\n"[..]));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
#[ignore = "long: make test-all"]
fn twenty_starts_leave_nothing_behind() {
    let case = Case::new();
    let processes = || {
        fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter(|entry| {
                fs::read_to_string(entry.path().join("comm"))
                    .is_ok_and(|name| name.starts_with("cofferdam-vmm"))
            })
            .count()
    };
    let files = || {
        let mut names: Vec<_> =
            fs::read_dir(case.folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    for index in 0..20 {
        let output = case.run(&["--scratch", "16M"], &format!("exit {index}")).output().unwrap();
        assert_eq!(output.status.code(), Some(index), "{}", shown(&output));
    }
    assert!(case.left().is_empty() && processes() == 0, "{:?}", case.left());
    assert_eq!(files(), ["c", "run"], "nothing beside the container and the run directory");
}

#[test]
#[ignore = "long: make test-all"]
fn debian_with_python_as_three_layers_of_an_image() {
    let assets = xtask::assets::Assets::from_environment().unwrap();
    let (case, layout) = (Case::new(), assets.debian_python.expect("a long test"));
    let source = format!("oci:{}", layout.display());
    let code = "import os, sys; print(sys.argv[1:], os.environ['WORD'], os.getuid()); sys.exit(4)";
    let options = &["-e", "WORD=w", "-u", "games", "--read-only", "--scratch", "64M"];
    for _ in 0..2 {
        let output = case.run_words(&source, options, &["-c", code, "a", "b"]).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{}", shown(&output));
        assert_eq!(output.stdout, b"['a', 'b'] w 5\n");
    }
    assert_eq!(fs::read_dir(case.path("data/cofferdam/layers")).unwrap().count(), 3);
    let output = case.run_words(&source, options, &["/srv/words.py", "one"]).output().unwrap();
    assert_eq!(output.stdout, b"['one']|w|5\n", "{}", shown(&output));
}

/// What is in the window of a terminal multiplexer, once it contains `part`.
fn wait_for_screen(case: &Case, part: &str) -> String {
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        let screen = tmux(case, &["capture-pane", "-p", "-t", "w"]);
        if screen.contains(part) {
            return screen;
        }
        assert!(Instant::now() < end, "no {part:?} in:\n{screen}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn tmux(case: &Case, words: &[&str]) -> String {
    let mut command = Command::new("tmux");
    command.args(["-f", "/dev/null", "-S"]).arg(case.path("tmux")).args(words);
    String::from_utf8_lossy(&tool(&mut command)).into_owned()
}

#[test]
fn a_terminal_in_a_terminal_multiplexer() {
    let case = Case::new();
    let keys = |text: &str| tmux(&case, &["send-keys", "-t", "w", text, "Enter"]);
    let run = case.run_words("c", &["-t"], &["sh"]);
    let words: Vec<String> = std::iter::once(run.get_program())
        .chain(run.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let script = format!(
        "cd '{}'; export COFFERDAM_RUN_DIR=run; {}; echo ended $?; exec sleep 1000",
        case.folder.path().display(),
        words.join(" ")
    );
    tmux(&case, &["new-session", "-d", "-s", "w", "-x", "90", "-y", "25", &script]);
    wait_for_screen(&case, "#");
    keys("stty size; echo $TERM");
    wait_for_screen(&case, "25 90\nxterm");
    keys("echo begun; sleep 1000");
    wait_for_screen(&case, "\nbegun");
    tmux(&case, &["send-keys", "-t", "w", "C-c"]);
    keys("echo code $?");
    wait_for_screen(&case, "\ncode 130");
    tmux(&case, &["resize-window", "-t", "w", "-x", "70", "-y", "20"]);
    // The size comes after the window's.
    keys("until stty size | grep '^20 70'; do sleep 1; done");
    wait_for_screen(&case, "\n20 70");
    keys("exit 5");
    wait_for_screen(&case, "\nended 5");
    tmux(&case, &["kill-server"]);
}
