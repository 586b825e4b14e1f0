//! Containers, each in a domain of its own.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam_container_manifest::{DataVolume, Mount, Rlimit, Signal, StartVariable, Tmpfs, digest};
use cofferdam_container_protocol::CONTROL_PORT;
use cofferdam_container_protocol::frame::{Decoder, Frame, Kind};
use cofferdam_container_protocol::message::{
    ExecRequest, Message, Method, ProcessState, Request, ResizeRequest, Response, SignalRequest,
    StateRequest, StateResponse, StatsRequest, StatsResponse, StopRequest, WaitRequest, WaitResponse, code,
};
use cofferdam_tests::container::{Container, Ended, layer, smallest_memory};
use cofferdam_tests::hex;

/// The content of the file /large.
fn large() -> Vec<u8> {
    (0..200_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_container_runs_from_three_layers() {
    let script = "cat /which; echo $0 $X; sha256sum < /large; echo error >&2; exit 7";
    let mut container = Container::new(script);
    container.manifest.process.env.push("X=1 2".to_owned());
    let ended = container.finish();
    assert_eq!(ended.done.code(), 7, "{ended}");
    assert_eq!(ended.text(), format!("highest\nsh 1 2\n{}  -\n", hex(&digest(&large()))), "{ended}");
    assert_eq!(ended.stderr, b"error\n", "{ended}");
}

/// Checks that init did not start the container, for this reason.
pub(super) fn check_refused(ended: &Ended, why: &str) {
    assert!(ended.was_refused(why), "no {why:?}: {ended}");
    assert_eq!(ended.done.code(), 120, "{ended}");
    assert!(ended.stdout.is_empty(), "{ended}");
}

/// What the host gives, changed in one way, and why it is refused then.
type Case = (fn(&mut Container), &'static str);

/// Everything that is wrong before a layer is read.
const CASES: [Case; 11] = [
    (|c| c.bound = Some([1; 32]), "manifest: wrong_digest"),
    (|c| c.manifest_drive = Some(vec![0; 8192]), "manifest: not_valid"),
    (|c| of_text(c, |text| text.replace(r#""version":1"#, r#""version":2"#)), "manifest: not_valid"),
    (|c| of_text(c, |text| format!("{text}\n")), "manifest: not_valid"),
    (|c| drop(c.env.insert("X".to_owned(), "1".to_owned())), "manifest: start_values_refused"),
    (|c| drop(c.drives.remove(1)), "layers: layer 1 missing"),
    (swap, "layers: layer 0 wrong_size"),
    (|c| c.drives.push(("other".to_owned(), c.drives[0].1.clone(), false)), "layers: drive 3 unexpected"),
    (|c| truncate(c, 4096), "layers: layer 2 wrong_size"),
    (|c| c.manifest.mounts = vec![tmpfs("/tmp"), tmpfs("/var-run/x")], "root: mount 1 path_refused"),
    (|c| c.manifest.process.args[0] = "/nothing".to_owned(), "process: program_not_found"),
];

/// Puts another text in the place of the manifest, and binds its digest.
fn of_text(container: &mut Container, change: fn(String) -> String) {
    let bytes = cofferdam_container_manifest::encode(&container.manifest).unwrap();
    let changed = change(String::from_utf8(bytes).unwrap()).into_bytes();
    container.bound = Some(digest(&changed));
    container.manifest_drive =
        Some(cofferdam_container_protocol::drive::write(&changed, &container.env).unwrap());
}

/// Gives two layers each other's drives.
pub(super) fn swap(container: &mut Container) {
    let id = container.drives[0].0.clone();
    container.drives[0].0 = std::mem::replace(&mut container.drives[2].0, id);
}

/// Cuts the end of the highest layer's file off.
fn truncate(container: &mut Container, bytes: u64) {
    let path = container.own_file("layer2");
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
}

#[test]
fn a_shell_runs_in_little_memory() {
    let mut container =
        Container::new("while read name value unit; do echo $name $value; done < /proc/meminfo");
    container.memory = smallest_memory();
    let mebibytes: u64 = container.memory.trim_end_matches('M').parse().unwrap();
    let ended = container.finish();
    assert_eq!(ended.done.code(), 0, "{ended}");
    let text = ended.text();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal: ")).unwrap();
    assert!(total.parse::<u64>().unwrap() <= mebibytes << 10, "{ended}");
}

#[test]
fn what_the_launch_does_not_bind_is_refused() {
    for (change, why) in CASES {
        let mut container = Container::new("echo it runs");
        change(&mut container);
        check_refused(&container.finish(), why);
    }
}

/// A user who is not root, who may do little, with a root file system that nobody can write to.
#[test]
fn the_process_is_what_the_manifest_says() {
    let script = "id; grep -E '^(CapEff|CapBnd|NoNew|SigIgn|SigBlk)' /proc/self/status; pwd; hostname; ulimit -n; ulimit -Hn; \
        echo $MODE; umask; touch /a; touch /tmp/a && stat -c '%n %u:%g %a' /tmp /tmp/a; \
        echo 0 > /proc/sys/kernel/panic; echo $(ls /proc/self/fd); echo $(ls /dev); \
        echo > /dev/stdout; echo x > /dev/shm/x && echo shm; touch /dev/x; \
        test-guest port 0x620 9; echo $?; ps -o pid,comm; exit 3";
    let mut container = Container::new(&format!("exec 2>&1; {script}"));
    let process = &mut container.manifest.process;
    process.uid = 1000;
    process.gid = 1001;
    process.groups = vec![5, 1002];
    process.capabilities = vec!["CAP_KILL".to_owned(), "CAP_NET_BIND_SERVICE".to_owned()];
    process.no_new_privs = true;
    process.read_only_root = true;
    process.cwd = "/made/for this".to_owned();
    process.env.push("MODE=default".to_owned());
    process.start_env = vec![StartVariable { name: "MODE".to_owned(), pattern: "fast|slow".to_owned() }];
    process.rlimits = vec![Rlimit { hard: Some(200), name: "RLIMIT_NOFILE".to_owned(), soft: Some(100) }];
    container.manifest.mounts = vec![tmpfs("/tmp")];
    container.env.insert("MODE".to_owned(), "fast".to_owned());
    let ended = container.finish();
    let lines = [
        "uid=1000 gid=1001 groups=5,1002",
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000420",
        "NoNewPrivs:\t1",
        "/made/for this",
        "under-test",
        "100",
        "200",
        "fast",
        "0022",
        "touch: /a: Read-only file system",
        "/tmp 0:0 1777",
        "/tmp/a 1000:1001 644",
        "sh: can't create /proc/sys/kernel/panic: Read-only file system",
        "0 1 2 3",
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero",
        "",
        "shm",
        "touch: /dev/x: Read-only file system",
        "test-guest: Operation not permitted (os error 1)",
        "1",
        "PID   COMMAND",
        "1 init",
        "2 sh",
    ];
    let text = ended.text();
    let found: Vec<&str> = text.lines().map(str::trim_start).collect();
    assert_eq!(found.get(..lines.len()), Some(&lines[..]), "{ended}");
    assert_eq!(ended.done.code(), 3, "{ended}");
}

pub(super) fn tmpfs(path: &str) -> Mount {
    Mount::Tmpfs(Tmpfs { path: path.to_owned(), size: 1 << 20 })
}

/// User 0 has what the manifest leaves it, and device nodes are none.
#[test]
fn root_has_no_devices_and_no_ports_and_no_settings() {
    let script = "exec 2>&1; grep -E '^Cap(Eff|Prm|Bnd)' /proc/self/status; \
        for f in / /tmp /data; do mknod $f/n c 1 3; echo > $f/n; done; mknod /dev/n c 1 3; mknod /dev/shm/n b 254 0; cat /dev/shm/n; \
        echo h > /proc/sysrq-trigger; echo 1 > /sys/kernel/profiling; test-guest port 0x620 9; umount /proc; kill -9 1; \
        cat /data/../which; ls /var-run; chown 7:8 /tmp; touch /tmp/ok && echo ok; kill -TERM $$";
    let mut container = Container::new(script);
    let capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_MKNOD", "CAP_SETUID"];
    container.manifest.process.capabilities = capabilities.map(str::to_owned).into();
    let (layer, file) = {
        let content = container.file("data");
        std::fs::create_dir(&content).unwrap();
        std::fs::write(content.join("file"), "data").unwrap();
        layer(&container.file(""), &content)
    };
    container.drives.push(("volume0".to_owned(), file, false));
    let (root_hash, salt, size) = (layer.root_hash, layer.salt, layer.size);
    let path = "/data".to_owned();
    container.manifest.mounts = vec![Mount::Data(DataVolume { path, root_hash, salt, size }), tmpfs("/tmp")];
    let ended = container.finish();
    let lines = [
        "CapPrm:\t00000000080000a3",
        "CapEff:\t00000000080000a3",
        "CapBnd:\t00000000080000a3",
        "sh: can't create //n: Permission denied",
        "sh: can't create /tmp/n: Permission denied",
        "mknod: /data/n: Read-only file system",
        "sh: can't create /data/n: Read-only file system",
        "mknod: /dev/n: Read-only file system",
        "cat: can't open '/dev/shm/n': Permission denied",
        "sh: can't create /proc/sysrq-trigger: Read-only file system",
        "sh: can't create /sys/kernel/profiling: Read-only file system",
        "test-guest: Operation not permitted (os error 1)",
        "umount: can't unmount /proc: Operation not permitted",
        "highest",
        "ls: /var-run: No such file or directory",
        "ok",
    ];
    // The small kernel has no /proc/sysrq-trigger at all.
    let text = ended.text().replace("nonexistent directory", "Read-only file system");
    assert_eq!(text.lines().collect::<Vec<_>>(), lines, "{ended}");
    assert_eq!(ended.done.code(), 128 + 15, "{ended}");
}

#[test]
fn standard_input_arrives_and_ends() {
    let mut container = Container::new("sha256sum; echo end");
    container.manifest.host.stdin = true;
    container.stdin = large();
    let ended = container.finish();
    assert_eq!(ended.text(), format!("{}  -\nend\n", hex(&digest(&large()))), "{ended}");
}

/// Nothing that the manifest does not grant passes, though the host listens; and a program that the container's shell does not find is
/// not one that init did not find.
#[test]
fn ungranted_streams_are_dev_null() {
    let script =
        "exec 3>&1; cat; echo out; echo err >&2; stat -L -c %t:%T /proc/$$/fd/0 /proc/$$/fd/3 >&2; /nothing";
    let mut container = Container::new(script);
    container.manifest.host.stdout = false;
    let listening =
        [1025, 1026].map(|port| UnixListener::bind(container.file(&format!("v_{port}"))).unwrap());
    let ended = container.finish();
    assert_eq!(ended.stderr, b"err\n1:3\n1:3\nsh: /nothing: not found\n", "{ended}");
    assert_eq!(ended.done.code(), 127, "{ended}");
    for listener in listening {
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}

#[test]
fn many_bytes_of_output_arrive_intact() {
    output(8 << 20);
}

#[test]
#[ignore = "long: make test-all"]
fn two_hundred_mib_of_output_arrive_intact() {
    output(200 << 20);
}

fn output(bytes: u64) {
    let ended = Container::new(&format!("exec test-guest pattern {bytes} 5")).finish();
    assert_eq!(ended.done.code(), 0, "{}", ended.done);
    cofferdam_test_guest::check(&ended.stdout[..], bytes, 5).unwrap();
}

#[test]
fn a_terminal_is_one() {
    let mut container = Container::new(
        "stty size; tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo three; read line; echo \"<$line>\"; cat; exit 6",
    );
    container.manifest.process.terminal = true;
    container.manifest.process.uid = 1000;
    container.manifest.host.stdin = true;
    container.stdin = b"typed\n\x04".to_vec();
    let ended = container.finish();
    let text = String::from_utf8_lossy(&ended.terminal).into_owned();
    assert!(text.contains("24 80\r\n/dev/pts/0\r\nthree\r\n"), "{ended}");
    assert!(text.contains("<typed>\r\n"), "{ended}");
    assert_eq!(ended.done.code(), 6, "{ended}");
}

/// Connects to init's port as the monitor does.
fn connect(socket: &Path) -> UnixStream {
    let mut connection = UnixStream::connect(socket).unwrap();
    writeln!(connection, "CONNECT {CONTROL_PORT}").unwrap();
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the stream.
    while !answer.ends_with(b"\n") {
        let mut byte = [0];
        if connection.read(&mut byte).unwrap_or(0) == 0 {
            return connection;
        }
        answer.extend(byte);
    }
    connection
}

/// Asks over a connection of its own; an answer with nothing but a code if it was refused.
fn ask(socket: &Path, method: Method, message: &impl Message) -> Result<Vec<u8>, i32> {
    let payload = Request::new(method, message).encode_to_vec();
    let mut connection = connect(socket);
    connection.write_all(&Frame { stream: 1, kind: Kind::Request, payload }.encode().unwrap()).unwrap();
    let (mut decoder, mut buffer) = (Decoder::default(), [0; 4096]);
    loop {
        if let Some(frame) = decoder.next().unwrap() {
            let response = Response::decode(&*frame.payload).unwrap();
            return response.status.map_or(Ok(response.payload), |status| Err(status.code));
        }
        let length = connection.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "no answer");
        decoder.push(&buffer[..length]);
    }
}

#[test]
fn the_host_asks_and_abuses_and_the_container_notices_nothing() {
    let script = "trap 'trap \"\" TERM USR1; echo stopping; read line; echo $line; exit 9' TERM; trap 'echo user' USR1; echo ready; while :; do sleep 1000 & wait; done";
    let mut container = Container::new(script).stoppable(&[Signal::Usr1], Signal::Term, 3_600_000);
    container.manifest.host.stdin = true;
    let shell = |script: &str| ["sh", "-c", script].map(str::to_owned).to_vec();
    let ends = [
        ("exit 0", 0),
        ("exec /nothing", 127),
        ("exec /which", 126),
        ("kill -SEGV $$", 139),
        ("kill -9 $$", 137),
    ];
    container.manifest.host.exec = vec![shell("echo from exec; exit 11"), vec!["/nothing".to_owned()]];
    container.manifest.host.exec.extend(ends.map(|(script, _)| shell(script)));
    let exec = ExecRequest {
        id: "x".to_owned(),
        args: container.manifest.host.exec[0].clone(),
        stdout_port: 1500,
        ..Default::default()
    };
    let listener = UnixListener::bind(container.file("v_1500")).unwrap();
    let started = container.start();
    started.wait_for("ready");
    let socket = started.socket.clone();

    // Garbage, frames that never end, and more connections than there can be.
    for garbage in [&[0xFF; 5000][..], b"GET / HTTP/1.1\r\n\r\n", &[0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0]] {
        let mut connection = connect(&socket);
        connection.write_all(garbage).unwrap();
        // Closed, by whatever means.
        assert_eq!(connection.read(&mut [0; 16]).unwrap_or(0), 0);
    }
    let held: Vec<UnixStream> = (0..100).map(|_| connect(&socket)).collect();
    drop(held);
    let until = Instant::now() + Duration::from_secs(120);
    while ask_quietly(&socket).is_none() {
        assert!(Instant::now() < until, "init does not answer after a flood");
    }

    assert_eq!(ask(&socket, Method::Exec, &exec), Ok(vec![]));
    let mut output = String::new();
    listener.accept().unwrap().0.read_to_string(&mut output).unwrap();
    assert_eq!(output, "from exec\n");
    let waited = ask(&socket, Method::Wait, &WaitRequest { id: "x".to_owned() }).unwrap();
    assert_eq!(WaitResponse::decode(&*waited).unwrap().exit_status, 11);
    for (script, status) in ends {
        let exec = ExecRequest { id: "x".to_owned(), args: shell(script), ..Default::default() };
        assert_eq!(ask(&socket, Method::Exec, &exec), Ok(vec![]));
        let waited = ask(&socket, Method::Wait, &WaitRequest { id: "x".to_owned() }).unwrap();
        assert_eq!(WaitResponse::decode(&*waited).unwrap().exit_status, status, "{script}");
    }
    let nothing = ExecRequest { id: "y".to_owned(), args: vec!["/nothing".to_owned()], ..Default::default() };
    assert_eq!(ask(&socket, Method::Exec, &nothing), Err(code::INTERNAL));
    let signal_to = |id: &str, signal: &str| {
        ask(&socket, Method::Signal, &SignalRequest { id: id.to_owned(), signal: signal.to_owned() })
    };
    let signal = |signal: &str| signal_to("", signal);
    // Of one that has ended, and never had a terminal.
    assert_eq!(signal_to("x", "USR1"), Err(code::FAILED_PRECONDITION));
    let size = ResizeRequest { id: "x".to_owned(), columns: 1, rows: 1 };
    assert_eq!(ask(&socket, Method::Resize, &size), Err(code::FAILED_PRECONDITION));
    let ended = ask(&socket, Method::State, &StateRequest { id: "x".to_owned() }).unwrap();
    assert_eq!(StateResponse::decode(&*ended).unwrap().state(), ProcessState::Stopped);
    assert_eq!(signal("USR1"), Ok(vec![]));
    started.wait_for("user");
    assert_eq!(signal("KILL"), Err(code::PERMISSION_DENIED));
    let other = ExecRequest { args: vec!["/bin/sh".to_owned()], ..exec };
    assert_eq!(ask(&socket, Method::Exec, &other), Err(code::PERMISSION_DENIED));
    let stats = ask(&socket, Method::Stats, &StatsRequest {}).unwrap();
    let stats = StatsResponse::decode(&*stats).unwrap();
    let refused: Vec<_> = stats.refused.iter().map(|refused| (&*refused.method, refused.count)).collect();
    assert_eq!(refused, [("Exec", 1), ("Signal", 1)]);
    assert!(stats.processes >= 2 && stats.processes < 10, "{stats:?}");
    assert!(
        stats.cpu_us > 0 && stats.memory_bytes > 0 && stats.memory_bytes < stats.memory_total_bytes,
        "{stats:?}"
    );
    let state = ask(&socket, Method::State, &StateRequest::default()).unwrap();
    assert_eq!(StateResponse::decode(&*state).unwrap().state(), ProcessState::Running);
    assert_eq!(ask(&socket, Method::Stop, &StopRequest {}), Ok(vec![]));
    started.wait_for("stopping");
    // While it ends, nothing new begins, and all else is as before.
    let late = ExecRequest { id: "late".to_owned(), args: shell("exit 0"), ..Default::default() };
    assert_eq!(ask(&socket, Method::Exec, &late), Err(code::FAILED_PRECONDITION));
    let waited = ask(&socket, Method::Wait, &WaitRequest { id: "x".to_owned() }).unwrap();
    assert_eq!(WaitResponse::decode(&*waited).unwrap().exit_status, 137);
    assert_eq!(signal("USR1"), Ok(vec![]));
    assert_eq!(ask(&socket, Method::Stop, &StopRequest {}), Ok(vec![]));
    started.send(b"asked\n");
    let ended = started.finish();
    assert_eq!(ended.text(), "ready\nuser\nstopping\nasked\n", "{ended}");
    assert_eq!(ended.done.code(), 9, "{ended}");
}

/// Asks something harmless; nothing if there is no answer yet.
fn ask_quietly(socket: &Path) -> Option<()> {
    let payload = Request::new(Method::State, &StateRequest::default()).encode_to_vec();
    let mut connection = connect(socket);
    connection.write_all(&Frame { stream: 1, kind: Kind::Request, payload }.encode().unwrap()).ok()?;
    (connection.read(&mut [0; 64]).ok()? > 0).then_some(())
}

/// Whoever ignores the signal of an orderly stop is ended when its time is over.
#[test]
fn an_orderly_stop_ends_in_any_case() {
    let container = Container::new("trap '' TERM; echo ready; sleep 1000").stoppable(&[], Signal::Term, 500);
    let started = container.start();
    started.wait_for("ready");
    assert_eq!(ask(&started.socket, Method::Stop, &StopRequest {}), Ok(vec![]));
    let ended = started.finish();
    assert_eq!(ended.done.code(), 137, "{ended}");
}
