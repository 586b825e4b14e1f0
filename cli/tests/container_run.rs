//! `cofferdam run --container` and its relatives, with a monitor that is a Python script: what it starts, what becomes of
//! the container's streams, of signals, and of its end. The guest's side of all that is in `tests/tests/domain`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cofferdam_container_manifest::{Manifest, decode, digest};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::support::{minding_signals, terminal};

mod support;

/// A folder with a container, a monitor, and the run directory.
struct Case {
    folder: TempDir,
    script: String,
}

impl Case {
    /// The monitor does what `script` says: see `fake-monitor.py`.
    fn new(script: &str) -> Self {
        let case = Self { folder: tempfile::tempdir().unwrap(), script: script.to_owned() };
        fs::create_dir_all(case.path("root/etc")).unwrap();
        fs::write(case.path("root/etc/passwd"), "web:x:33:34::/:\n").unwrap();
        let tar = Command::new("tar")
            .args(["-C", "root", "-cf", "root.tar", "."])
            .current_dir(case.folder.path())
            .status();
        assert!(tar.unwrap().success());
        let output = case
            .cofferdam(&["container", "build", "root.tar", "-o", "c", "--", "/bin/app"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        // A program that is open for writing cannot be executed: see `run.rs`.
        fs::write(case.path("text"), concat!("#!/usr/bin/env python3\n", include_str!("fake-monitor.py")))
            .unwrap();
        assert!(Command::new("cp").arg(case.path("text")).arg(case.path("vmm")).status().unwrap().success());
        fs::set_permissions(case.path("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(case.path("domain.igvm"), "").unwrap();
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cofferdam(&self, words: &[&str]) -> Command {
        let mut command = minding_signals(env!("CARGO_BIN_EXE_cofferdam"));
        command.args(words).current_dir(self.folder.path());
        command
            .env("COFFERDAM_RUN_DIR", "run")
            .env("XDG_DATA_HOME", self.path("data"))
            .env("SCRIPT", &self.script);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn command(&self, extra: &[&str]) -> Command {
        let words =
            ["run", "--container", "c", "--image", "domain.igvm", "--vmm", "./vmm", "--id", "d", "--quiet"];
        self.cofferdam(&[&words[..], extra].concat())
    }

    fn run(&self, extra: &[&str]) -> Output {
        self.command(extra).output().unwrap()
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Waits until the monitor has written a file.
    fn wait_for(&self, name: &str) -> String {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            match fs::read_to_string(self.path(name)) {
                Ok(text) => return text,
                Err(_) => assert!(Instant::now() < end, "no {name}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("run")).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| !name.starts_with('.'))
            .collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

fn manifest(bytes: &[u8]) -> Manifest {
    decode(bytes).unwrap()
}

const SAVE: &str = "save('config', json.dumps(config)); open('manifest', 'wb').write(manifest); stopped(0)";

#[test]
fn the_monitor_gets_a_manifest_that_is_made_of_the_stored_one() {
    let case = Case::new(SAVE);
    let output = case.run(&[
        "--env",
        "A=1",
        "--user",
        "web",
        "--scratch",
        "1M",
        "--memory",
        "64M",
        "--",
        "stop",
        "now",
    ]);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    let bytes = fs::read(case.path("manifest")).unwrap();
    let process = manifest(&bytes).process;
    assert_eq!((process.uid, process.gid), (33, 34));
    // `container build` has put no entry point before the command.
    assert_eq!(process.args, ["stop", "now"]);
    assert!(process.env.contains(&"A=1".to_owned()));
    let config = case.json("config");
    assert_eq!(config["container"]["scratch"], json!({"size": 1 << 20}));
    assert_eq!(config["container"].get("env"), None);
    let layer = config["container"]["layers"][0].as_str().unwrap();
    assert!(layer.starts_with('/') && layer.ends_with("/layer.erofs"), "{layer}");
    assert_eq!(config["boot-source"]["image_path"], "domain.igvm");
    let socket = fs::canonicalize(case.path("run")).unwrap().join("d/vsock");
    assert_eq!(config["vsock"], json!({"guest_cid": 3, "uds_path": socket}));
    assert_eq!(config["stop_timeout_ms"], 15_000, "the manifest's own time, and some more");
    assert_eq!(case.left(), Vec::<String>::new());
}

#[test]
fn a_manifest_is_used_as_it_is() {
    let case = Case::new(SAVE);
    let mut made = manifest(&fs::read(case.path("c/manifest.json")).unwrap());
    made.hostname = "other".to_owned();
    made.process.start_env = vec![cofferdam_container_manifest::StartVariable {
        name: "ID".to_owned(),
        pattern: "[0-9]+".to_owned(),
    }];
    let bytes = cofferdam_container_manifest::encode(&made).unwrap();
    fs::write(case.path("own.json"), &bytes).unwrap();
    let output = case.run(&["--manifest", "own.json", "--env", "ID=7"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(case.path("manifest")).unwrap(), bytes);
    assert_eq!(case.json("config")["container"]["env"], json!({"ID": "7"}));

    let output = case.run(&["--manifest", "own.json", "--json", "--", "/bin/other"]);
    assert_eq!(output.status.code(), Some(125));
    let message =
        "cofferdam: COMMAND: the manifest says otherwise (process.args), and --manifest uses it as it is\n";
    assert_eq!(stderr(&output), message);
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&outcome["exit_reason"], &outcome["container"]), (&json!("config"), &Value::Null));
}

#[test]
fn a_source_is_built_into_the_store_on_its_first_use() {
    let case = Case::new(SAVE);
    for store in ["data/cofferdam", "own"] {
        let mut words = vec!["run", "--container", "root.tar", "--image", "domain.igvm", "--vmm", "./vmm"];
        if store == "own" {
            words.extend(["--store", "own"]);
        }
        let output = case.cofferdam(&words).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert!(
            stderr(&output).contains("the image names no program; give one after --"),
            "{}",
            stderr(&output)
        );
        let output = case.cofferdam(&[&words[..], &["--", "/bin/app"]].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let layer = case.json("config")["container"]["layers"][0].as_str().unwrap().to_owned();
        assert!(layer.contains(store) && fs::exists(&layer).unwrap(), "{layer}");
        assert_eq!(fs::read_dir(case.path(store).join("images")).unwrap().count(), 1);
    }
}

#[test]
fn the_image_of_the_domain_is_the_installed_one() {
    let case = Case::new(SAVE);
    let words = ["run", "--container", "c", "--vmm", "./vmm"];
    let output = case.cofferdam(&words).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let (installed, own) = ("share/cofferdam/domain.igvm", case.path("data/cofferdam/domain.igvm"));
    for part in [installed, own.to_str().unwrap(), "cofferdam image build --init", "make install"] {
        assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
    }
    fs::create_dir_all(own.parent().unwrap()).unwrap();
    fs::write(&own, "").unwrap();
    assert_eq!(case.cofferdam(&words).output().unwrap().status.code(), Some(0));
    assert_eq!(case.json("config")["boot-source"]["image_path"], json!(own));

    // A copy of the program, as it is installed.
    fs::create_dir_all(case.path("usr/bin")).unwrap();
    fs::create_dir_all(case.path("usr/share/cofferdam")).unwrap();
    fs::write(case.path("usr").join(installed), "").unwrap();
    let program = case.path("usr/bin/cofferdam");
    assert!(
        Command::new("cp").arg(env!("CARGO_BIN_EXE_cofferdam")).arg(&program).status().unwrap().success()
    );
    let mut command = Command::new(program);
    command.args(words).current_dir(case.folder.path()).env("COFFERDAM_RUN_DIR", "run").env("SCRIPT", SAVE);
    assert!(command.status().unwrap().success());
    let image = case.json("config")["boot-source"]["image_path"].as_str().unwrap().to_owned();
    assert_eq!(PathBuf::from(image), fs::canonicalize(case.path("usr")).unwrap().join(installed));
}

#[test]
fn what_does_not_go_with_a_container_is_refused_by_name() {
    let case = Case::new("save('started', '')");
    for (extra, part) in [
        (&["--kernel", "k"][..], "--kernel"),
        (&["--initrd", "i"], "--initrd"),
        (&["--cmdline", "c"], "--cmdline"),
        (&["--boot", "direct"], "--boot"),
        (&["--drive", "path=d"], "--drive"),
        (&["--host-data", &"0".repeat(64)], "--host-data"),
        (&["--console", "stdio"], "--console"),
        (&["--env", "A"], "it is NAME=VALUE"),
        (&["--env", "=1"], "it is NAME=VALUE"),
        (&["--allow-exec", " "], "it has no words"),
        (&["--allow-signal", "SEGV"], "is not a signal that a manifest can allow"),
        (&["--user", "nobody"], "--user: the image has no user \"nobody\""),
        (&["--scratch", "1K"], "--scratch: scratch.size: 1024 is not a size"),
        (&["--manifest", "none.json"], "cannot read none.json"),
        (&["--run-dir", &"r".repeat(100)], "--run-dir: the path"),
    ] {
        let output = case.run(extra);
        assert_eq!(output.status.code(), Some(125), "{extra:?}");
        assert!(stderr(&output).contains(part), "{extra:?}: {}", stderr(&output));
    }
    for (option, name) in [
        (&["--manifest", "m"][..], "--manifest"),
        (&["--store", "s"], "--store"),
        (&["-i"], "--interactive"),
        (&["-t"], "--tty"),
        (&["-e", "A=1"], "--env"),
        (&["-u", "0"], "--user"),
        (&["--scratch", "1M"], "--scratch"),
        (&["--read-only"], "--read-only"),
        (&["--allow-exec", "ls"], "--allow-exec"),
        (&["--allow-signal", "HUP"], "--allow-signal"),
        (&["--", "ls"], "COMMAND"),
    ] {
        let words = [&["run", "--kernel", "k", "--vmm", "./vmm"][..], option].concat();
        let output = case.cofferdam(&words).output().unwrap();
        let message = format!("cofferdam: {name}: there is no container; --container DIR|SOURCE names one\n");
        assert_eq!((output.status.code(), stderr(&output)), (Some(125), message));
    }
    assert!(!case.path("started").exists());
}

#[test]
fn streams_are_the_containers_own_byte_for_byte() {
    let case = Case::new(
        "running()\n\
         into, out, err = [connect(port) for port in (1025, 1026, 1027)]\n\
         step('running')\n\
         data = read_all(into)\n\
         out.sendall(data); err.sendall(data[::-1])\n\
         out.close(); err.close(); stopped(3)",
    );
    let data: Vec<u8> = (0..3_000_000_u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
    let mut child = case.command(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn({
        let data = data.clone();
        move || stdin.write_all(&data)
    });
    let output = child.wait_with_output().unwrap();
    let last_words = output.stderr.len().saturating_sub(1000);
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr[last_words..]));
    writer.join().unwrap().unwrap();
    assert!(output.stdout == data, "{} bytes", output.stdout.len());
    let reversed: Vec<u8> = data.into_iter().rev().collect();
    assert!(output.stderr == reversed, "{} bytes", output.stderr.len());
}

#[test]
fn output_of_a_container_that_was_faster_than_we_are_is_not_lost() {
    let case = Case::new("out = connect(1026)\nout.sendall(b'quick')\nout.close()\nos.kill(os.getpid(), 9)");
    let output = case.run(&[]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(124), &b"quick"[..]));
}

#[test]
fn without_a_grant_there_is_no_socket() {
    let case = Case::new("save('sockets', ' '.join(sorted(os.listdir('run/d')))); stopped(0)");
    case.run(&[]);
    assert_eq!(
        fs::read_to_string(case.path("sockets"))
            .unwrap()
            .split(' ')
            .filter(|name| name.starts_with("vsock"))
            .collect::<Vec<_>>(),
        ["vsock_1026", "vsock_1027"]
    );
    case.run(&["--tty"]);
    assert!(fs::read_to_string(case.path("sockets")).unwrap().ends_with(" vsock_1025"));
}

#[test]
fn a_reader_that_goes_away_is_seen_by_the_container() {
    let case = Case::new(
        "running(); out, err = connect(1026), connect(1027); step('running')\n\
         try:\n  while True: out.sendall(b'y\\n' * 1000)\n\
         except (BrokenPipeError, ConnectionResetError): stopped(141)",
    );
    let mut child = case.command(&[]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "y\n");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
}

#[test]
fn a_full_disk_is_told_and_closes_the_containers_stream() {
    let case = Case::new(
        "running(); out, err = connect(1026), connect(1027); step('running')\n\
         try:\n  while True: out.sendall(b'y\\n' * 1000)\n\
         except (BrokenPipeError, ConnectionResetError): stopped(1)",
    );
    let output =
        case.command(&[]).stdout(File::options().write(true).open("/dev/full").unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("standard output: No space left on device"), "{}", stderr(&output));
}

#[test]
fn standard_input_is_read_only_as_long_as_it_is_wanted() {
    let case = Case::new(
        "running(); into = connect(1025); step('running')\n\
         save('got', into.recv(6).decode()); into.close(); save('closed', '')\n\
         while not os.path.exists('go'): pass\n\
         stopped(0)",
    );
    let mut child = case.command(&["-i"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"first\n").unwrap();
    assert_eq!(case.wait_for("got"), "first\n");
    case.wait_for("closed");
    fs::write(case.path("go"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "with standard input still open");
}

#[test]
fn others_cannot_connect_in_the_monitors_place() {
    let case = Case::new(
        "import subprocess\n\
         code = 'import socket,sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b\"bad\"); print(len(s.recv(1)))'\n\
         save('other', subprocess.run(['python3', '-c', code, streams + '_1026'], capture_output=True, text=True).stdout)\n\
         out = connect(1026); out.sendall(b'good'); out.close(); stopped(0)",
    );
    let output = case.run(&[]);
    assert_eq!(output.stdout, b"good");
    assert_ne!(case.wait_for("other"), "1\n");
}

#[test]
fn signals_go_to_the_container_as_the_manifest_allows() {
    let case = Case::new(
        "running(); out = connect(1026); step('running'); save('up', '')\n\
         save('got', json.dumps([wait_for('/container/kill'), wait_for('/container/kill')]))\n\
         stopped(130)",
    );
    let mut child = case.command(&["--allow-signal", "USR1"]).spawn().unwrap();
    case.wait_for("up");
    send(&child, Signal::USR1);
    send(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut got: Vec<String> = case
        .json("got")
        .as_array()
        .unwrap()
        .iter()
        .map(|body| body["signal"].as_str().unwrap().to_owned())
        .collect();
    got.sort();
    assert_eq!(got, ["INT", "USR1"]);
}

/// A monitor that says when it is asked to stop, and ends then.
const STOPS: &str = "import signal, time\n\
    def stop(*_): stopped(None, 'stopped', 'asked'); os._exit(0)\n\
    signal.signal(signal.SIGTERM, stop)\n\
    running(); out = connect(1026); step('running'); save('up', '')\n";

#[test]
fn a_signal_that_nobody_takes_stops_the_domain() {
    let forever = format!("{STOPS}while True: time.sleep(0.02)");
    for (first, second) in [(Signal::HUP, None), (Signal::TERM, Some(Signal::INT))] {
        // HUP is not allowed; TERM is taken, and nothing comes of it.
        let case = Case::new(&forever);
        let mut child = case.command(&[]).spawn().unwrap();
        case.wait_for("up");
        send(&child, first);
        if let Some(second) = second {
            send(&child, second);
        }
        assert_eq!(child.wait().unwrap().code(), Some(143), "{first:?}");
    }
    let case = Case::new(&format!(
        "answers['/container/kill'] = (400, {{'fault_message': 'no such process'}})\n{forever}"
    ));
    let child = case.command(&[]).spawn().unwrap();
    case.wait_for("up");
    send(&child, Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143));
    let text = stderr(&output);
    assert!(text.contains("the container does not get the signal TERM: no such process"), "{text}");
}

#[test]
fn a_signal_that_is_not_allowed_and_asks_for_no_end_is_told() {
    let case = Case::new(&format!("{STOPS}while not os.path.exists('go'): pass\nstopped(0)"));
    let mut child = case.command(&[]).spawn().unwrap();
    case.wait_for("up");
    send(&child, Signal::USR2);
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("does not allow the signal USR2 (host.signals)"), "{line}");
    fs::write(case.path("go"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn a_terminal_is_raw_has_the_size_of_ours_and_is_restored() {
    let case = Case::new(
        "running(); tty = connect(1025); step('running')\n\
         sizes = [wait_for('/container/resize')]\n\
         tty.sendall(b'hello\\r\\n')\n\
         save('typed', tty.recv(1).hex())\n\
         sizes.append(wait_for('/container/resize'))\n\
         save('sizes', json.dumps(sizes)); tty.close(); stopped(0)",
    );
    let (mut person, program) = terminal();
    tcsetwinsize(&person, size(100, 30)).unwrap();
    let is_cooked =
        || tcgetattr(&program).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ISIG);
    assert!(is_cooked());
    let mut command = case.command(&["-t"]);
    command.stdin(program.try_clone().unwrap()).stdout(program.try_clone().unwrap());
    let mut child = command.stderr(program.try_clone().unwrap()).spawn().unwrap();
    // Before that may stand that the start takes long.
    let mut shown = String::new();
    while !shown.ends_with("hello\r\n") {
        let mut bytes = [0; 64];
        let count = person.read(&mut bytes).unwrap();
        shown.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    let before = shown.trim_end_matches("hello\r\n");
    assert!(before.is_empty() || before.ends_with("\r\x1b[K"), "{shown:?}");
    assert!(!is_cooked());
    person.write_all(b"\x03").unwrap();
    assert_eq!(case.wait_for("typed"), "03", "Ctrl-C is the container's");
    tcsetwinsize(&person, size(90, 20)).unwrap();
    // Whoever changes the size of a terminal that is not a controlling one signals that.
    send(&child, Signal::WINCH);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(is_cooked());
    assert_eq!(case.json("sizes"), json!([{"columns": 100, "rows": 30}, {"columns": 90, "rows": 20}]));
}

#[test]
fn what_is_bound_is_told_and_an_end_with_a_code_is_not() {
    let case = Case::new("running(); out = connect(1026); out.sendall(b'line'); out.close(); stopped(7)");
    let words = ["run", "--container", "c", "--image", "domain.igvm", "--vmm", "./vmm", "--id", "d"];
    let output = case.cofferdam(&[&words[..], &["--json"]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(7));
    let digest = digest(&fs::read(case.path("c/manifest.json")).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = format!(
        "cofferdam: container d is on platform plain: not protected; manifest sha256:{digest}, asserted by this host alone\n"
    );
    assert_eq!(stderr(&output), line);
    let text = String::from_utf8(output.stdout).unwrap();
    let (container, json) = text.split_once('\n').unwrap();
    assert_eq!(container, "line");
    assert_eq!(serde_json::from_str::<Value>(json).unwrap()["container"]["asserted_by_host"], true);
}

#[test]
fn in_the_background_output_is_kept_and_commands_are_run() {
    let case = Case::new(
        "def run(body):\n\
         \x20 save('exec', json.dumps(body)); into, out, err = [connect(body[f'{name}_port']) for name in ('stdin', 'stdout', 'stderr')]\n\
         \x20 text = read_all(into); out.sendall(text.upper()); err.sendall(b'and this'); out.close(); err.close()\n\
         \x20 return {'id': body['id'], 'exit_code': 9}\n\
         answers['/vm/config'] = (200, config); answers['/container/exec'] = (200, run)\n\
         answers['/container/stats'] = (200, {'cpu_us': 5, 'processes': 1})\n\
         import time; running(); out, err = connect(1026), connect(1027)\n\
         out.sendall(b'to stdout'); err.sendall(b'to stderr'); time.sleep(0.5); step('running')\n\
         save('killed', json.dumps(wait_for('/container/kill'))); stopped(0)",
    );
    let output = case.run(&["--detach"]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"d\n"[..]), "{}", stderr(&output));
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        let logs = case.cofferdam(&["logs", "d"]).output().unwrap();
        if (&logs.stdout[..], &logs.stderr[..]) == (&b"to stdout"[..], &b"to stderr"[..]) {
            break;
        }
        assert!(Instant::now() < end, "{logs:?}");
    }
    let mut exec =
        case.cofferdam(&["exec", "-i", "d", "--", "ls", "/"]).stdin(Stdio::piped()).spawn().unwrap();
    exec.stdin.take().unwrap().write_all(b"text").unwrap();
    let output = exec.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..], stderr(&output).as_str()),
        (Some(9), &b"TEXT"[..], "and this")
    );
    assert_eq!(case.json("exec")["args"], json!(["ls", "/"]));
    let stats = case.cofferdam(&["stats", "d", "--json"]).output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&stats.stdout).unwrap()["cpu_us"], 5);
    let kill = case.cofferdam(&["kill", "d", "--signal", "SIGINT"]).output().unwrap();
    assert_eq!(kill.status.code(), Some(0), "{}", stderr(&kill));
    assert_eq!(serde_json::from_str::<Value>(&case.wait_for("killed")).unwrap(), json!({"signal": "INT"}));
    while !case.left().is_empty() {
        assert!(Instant::now() < end, "{:?}", case.left());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_command_that_is_refused_is_told() {
    let case = Case::new(
        "answers['/vm/config'] = (200, config)\n\
         answers['/container/exec'] = (400, {'fault_message': 'the manifest does not allow it (host.exec)'})\n\
         running(); step('running'); wait_for('/container/exec'); stopped(0)",
    );
    assert_eq!(case.run(&["-d"]).status.code(), Some(0));
    let output = case.cofferdam(&["exec", "d", "--", "ls"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124));
    assert!(
        stderr(&output).contains("domain d: the manifest does not allow it (host.exec)"),
        "{}",
        stderr(&output)
    );
}
