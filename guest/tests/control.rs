//! Requests of the host: what comes to the container, and what does not.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_container_manifest::{Host, Layer, Manifest, OnVerityFailure, Process, RootHash, Salt, Signal};
use cofferdam_container_protocol::frame::{Frame, Kind};
use cofferdam_container_protocol::message::{
    ExecRequest, Message, Method, ProcessState, Refused, Request, ResizeRequest, Response, SignalRequest,
    StateRequest, StateResponse, StatsRequest, StatsResponse, StopRequest, WaitRequest, WaitResponse, code,
};
use cofferdam_guest::control::{Container, Refusal, Service, Usage, serve};
use proptest::prelude::*;
use rustix::net::accept;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// A container that writes down what comes to it. Process `ended` has ended with status 3, and the empty one runs.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
}

impl Container for Recorder {
    fn state(&self, id: &str) -> Result<(ProcessState, Option<u8>), Refusal> {
        match id {
            "" => Ok((ProcessState::Running, None)),
            "ended" => Ok((ProcessState::Stopped, Some(3))),
            _ => Err(Refusal::NotFound),
        }
    }

    fn wait(&self, id: &str, _: Duration) -> Result<Option<u8>, Refusal> {
        self.state(id).map(|(_, status)| status)
    }

    fn signal(&self, id: &str, signal: Signal) -> Result<(), Refusal> {
        self.note(format!("signal {id} {signal:?}"));
        Ok(())
    }

    fn exec(&self, request: &ExecRequest) -> Result<(), Refusal> {
        self.note(format!("exec {} {:?}", request.id, request.args));
        if request.id == "full" { Err(Refusal::TooMany) } else { Ok(()) }
    }

    fn resize(&self, id: &str, columns: u16, rows: u16) -> Result<(), Refusal> {
        self.note(format!("resize {id} {columns} {rows}"));
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage { cpu_us: 1, memory: 2, memory_total: 3, processes: 4 }
    }

    fn stop(&self) {
        self.note("stop".to_owned());
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The service of a container whose host may do this.
fn service(host: Host) -> Service<Recorder> {
    let manifest = Manifest {
        host,
        hostname: "a".to_owned(),
        layers: vec![Layer { root_hash: RootHash([0; 32]), salt: Salt(vec![]), size: 4096 }],
        mounts: vec![],
        on_verity_failure: OnVerityFailure::Kill,
        process: Process {
            args: words(&["/a"]),
            capabilities: vec![],
            cwd: "/".to_owned(),
            env: vec![],
            gid: 0,
            groups: vec![],
            no_new_privs: true,
            read_only_root: true,
            rlimits: vec![],
            start_env: vec![],
            terminal: false,
            uid: 0,
        },
        scratch: None,
        version: 1,
    };
    Service::new(manifest, Recorder::default())
}

fn nothing() -> Host {
    Host { exec: vec![], signals: vec![], stderr: false, stdin: false, stdout: false, stop: None }
}

fn everything() -> Host {
    Host {
        exec: vec![words(&["/bin/health", "--quick"])],
        signals: vec![Signal::Term, Signal::Winch],
        stderr: true,
        stdin: true,
        stdout: true,
        stop: None,
    }
}

fn ask(service: &Service<Recorder>, method: Method, message: &impl Message) -> Response {
    service.answer(&Request::new(method, message).encode_to_vec(), &|| true)
}

/// The code of an answer, and the words of a refusal.
fn code_of(response: &Response) -> (i32, String) {
    response.status.clone().map_or((0, String::new()), |status| (status.code, status.message))
}

fn recorded(service: &Service<Recorder>) -> Vec<String> {
    std::mem::take(&mut *service.container().0.lock().unwrap())
}

fn exec(args: &[&str]) -> ExecRequest {
    ExecRequest { id: "x".to_owned(), args: words(args), ..ExecRequest::default() }
}

#[test]
fn what_is_granted_comes_to_the_container() {
    let service = service(everything());
    let term = SignalRequest { id: "x".to_owned(), signal: "TERM".to_owned() };
    let all =
        ExecRequest { stdin_port: 1, stdout_port: 2, stderr_port: 3, ..exec(&["/bin/health", "--quick"]) };
    let terminal = ExecRequest { terminal: true, stdin_port: 1, columns: 80, rows: 24, ..all.clone() };
    let size = ResizeRequest { id: String::new(), columns: 65535, rows: 0 };
    let answers = [
        ask(&service, Method::Signal, &term),
        ask(&service, Method::Exec, &all),
        ask(&service, Method::Exec, &terminal),
        ask(&service, Method::Resize, &size),
        ask(&service, Method::Stop, &StopRequest {}),
    ];
    assert!(answers.iter().all(|answer| code_of(answer).0 == code::OK), "{answers:?}");
    let started = r#"exec x ["/bin/health", "--quick"]"#;
    assert_eq!(recorded(&service), ["signal x Term", started, started, "resize  65535 0", "stop"]);

    let state = ask(&service, Method::State, &StateRequest { id: "ended".to_owned() });
    let state = StateResponse::decode(&*state.payload).unwrap();
    assert_eq!((state.state(), state.exit_status), (ProcessState::Stopped, 3));
    let waited = ask(&service, Method::Wait, &WaitRequest { id: "ended".to_owned() });
    assert_eq!(WaitResponse::decode(&*waited.payload).unwrap().exit_status, 3);
}

#[test]
fn what_is_not_granted_is_refused_by_the_name_of_the_field_and_counted() {
    let health = || ExecRequest { id: "x".to_owned(), ..exec(&["/bin/health", "--quick"]) };
    let with_exec = |change: fn(&mut Host)| {
        let mut host = everything();
        change(&mut host);
        service(host)
    };
    let none = service(nothing());
    let all = service(everything());
    let cases = [
        (
            ask(&none, Method::Signal, &SignalRequest { signal: "TERM".to_owned(), ..Default::default() }),
            "host.signals",
        ),
        (
            ask(&all, Method::Signal, &SignalRequest { signal: "KILL".to_owned(), ..Default::default() }),
            "host.signals",
        ),
        (ask(&none, Method::Exec, &health()), "host.exec"),
        (ask(&all, Method::Exec, &exec(&["/bin/health"])), "host.exec"),
        (ask(&all, Method::Exec, &exec(&["/bin/health", "--quick", "--more"])), "host.exec"),
        (ask(&all, Method::Exec, &exec(&[])), "host.exec"),
        (ask(&none, Method::Resize, &ResizeRequest::default()), "host.signals"),
        (
            ask(&with_exec(|h| h.stdin = false), Method::Exec, &ExecRequest { stdin_port: 1, ..health() }),
            "host.stdin",
        ),
        (
            ask(&with_exec(|h| h.stdout = false), Method::Exec, &ExecRequest { stdout_port: 1, ..health() }),
            "host.stdout",
        ),
        (
            ask(&with_exec(|h| h.stderr = false), Method::Exec, &ExecRequest { stderr_port: 1, ..health() }),
            "host.stderr",
        ),
        (
            ask(
                &with_exec(|h| h.stdout = false),
                Method::Exec,
                &ExecRequest { terminal: true, stdin_port: 1, ..health() },
            ),
            "host.stdout",
        ),
    ];
    for (answer, field) in cases {
        let message = format!("the manifest does not grant this: {field}");
        assert_eq!(code_of(&answer), (code::PERMISSION_DENIED, message));
    }
    assert!(recorded(&none).is_empty() && recorded(&all).is_empty());
    let stats = StatsResponse::decode(&*ask(&none, Method::Stats, &StatsRequest {}).payload).unwrap();
    let refused: Vec<Refused> = [("Exec", 1), ("Resize", 1), ("Signal", 1)]
        .map(|(method, count)| Refused { method: method.to_owned(), count })
        .into();
    assert_eq!((stats.cpu_us, stats.memory_bytes, stats.memory_total_bytes, stats.processes), (1, 2, 3, 4));
    assert_eq!(stats.refused, refused);
}

#[test]
fn a_process_of_exec_has_the_terminal_it_was_granted() {
    let mut host = everything();
    host.signals.clear();
    let service = service(host);
    let resize = |id: &str| ResizeRequest { id: id.to_owned(), columns: 1, rows: 1 };
    assert_eq!(code_of(&ask(&service, Method::Resize, &resize("x"))).0, code::OK);
    assert_eq!(code_of(&ask(&service, Method::Resize, &resize(""))).0, code::PERMISSION_DENIED);
    assert_eq!(recorded(&service), ["resize x 1 1"]);

    // All of it is on one port: the others are not looked at.
    let service = self::service(Host { stderr: false, ..everything() });
    let terminal = ExecRequest { terminal: true, stderr_port: 3, ..exec(&["/bin/health", "--quick"]) };
    assert_eq!(code_of(&ask(&service, Method::Exec, &terminal)).0, code::OK);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let service = service(everything());
    let health = exec(&["/bin/health", "--quick"]);
    let named = |id: &str| ExecRequest { id: id.to_owned(), ..health.clone() };
    let wide = ExecRequest { terminal: true, columns: 65536, ..health.clone() };
    let unknown = SignalRequest { signal: "SEGV".to_owned(), ..Default::default() };
    let cases = [
        (ask(&service, Method::Exec, &named("")), code::INVALID_ARGUMENT),
        (ask(&service, Method::Exec, &named("a/b")), code::INVALID_ARGUMENT),
        (ask(&service, Method::Exec, &wide), code::INVALID_ARGUMENT),
        (
            ask(&service, Method::Resize, &ResizeRequest { rows: 65536, ..Default::default() }),
            code::INVALID_ARGUMENT,
        ),
        (ask(&service, Method::Signal, &unknown), code::INVALID_ARGUMENT),
        (ask(&service, Method::State, &StateRequest { id: "nobody".to_owned() }), code::NOT_FOUND),
        (ask(&service, Method::Wait, &WaitRequest { id: "nobody".to_owned() }), code::NOT_FOUND),
        // It runs, and nobody waits any more.
        (ask(&service, Method::Wait, &WaitRequest::default()), code::FAILED_PRECONDITION),
        (service.answer(&[0xFF], &|| true), code::INVALID_ARGUMENT),
    ];
    for (at, (answer, expected)) in cases.iter().enumerate() {
        assert_eq!(code_of(answer).0, *expected, "{at}");
    }
    assert!(recorded(&service).is_empty());
    assert_eq!(code_of(&ask(&service, Method::Exec, &named("full"))).0, code::RESOURCE_EXHAUSTED);

    let request = Request::new(Method::Stop, &StopRequest {});
    for (service_name, method) in
        [("cofferdam.container.v2.Container", "Stop"), (&*request.service, "Restart"), ("", "")]
    {
        let other =
            Request { service: service_name.to_owned(), method: method.to_owned(), ..request.clone() };
        let answer = service.answer(&other.encode_to_vec(), &|| true);
        assert_eq!(code_of(&answer).0, code::UNIMPLEMENTED, "{service_name} {method}");
    }
    for method in Method::ALL {
        let broken =
            Request { payload: vec![0x0A, 9, 1], method: method.name().to_owned(), ..request.clone() };
        let answer = service.answer(&broken.encode_to_vec(), &|| true);
        assert_eq!(code_of(&answer).0, code::INVALID_ARGUMENT, "{}", method.name());
    }
}

/// A connection of the host, one that it has had answered.
fn answered(path: &Path) -> Option<UnixStream> {
    let mut host = UnixStream::connect(path).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    let payload = Request::new(Method::Stats, &StatsRequest {}).encode_to_vec();
    // One that is closed already takes nothing.
    let _ = host.write_all(&Frame { stream: 1, kind: Kind::Request, payload }.encode().unwrap());
    match host.read(&mut [0; 4096]) {
        Ok(1..) => Some(host),
        Ok(0) => None,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        Err(error) => panic!("neither closed nor answered: {error}"),
    }
}

#[test]
fn sixteen_connections_are_served_at_once_and_more_are_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let service = Arc::new(service(nothing()));
    // It serves until the process ends.
    thread::spawn(move || serve(|| accept(&listener), &service));
    let mut open: Vec<_> =
        (0..16).map(|at| answered(&path).unwrap_or_else(|| panic!("{at} is closed"))).collect();
    for _ in 0..3 {
        assert!(answered(&path).is_none(), "the seventeenth is served");
    }
    // Who goes makes room, once that is seen.
    open.pop();
    let end = Instant::now() + PATIENCE;
    while answered(&path).is_none() {
        assert!(Instant::now() < end, "nobody is served any more");
    }
}

proptest! {
    /// Whatever is asked: with nothing granted, nothing but a stop comes to the container.
    #[test]
    fn nothing_but_a_stop_passes_without_a_grant(
        method in prop::sample::select(&Method::ALL[..]),
        payload in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let service = service(nothing());
        let request = Request { payload, ..Request::new(method, &StopRequest {}) };
        service.answer(&request.encode_to_vec(), &|| true);
        let recorded = recorded(&service);
        prop_assert!(recorded.iter().all(|what| what == "stop" || what.starts_with("resize ")), "{recorded:?}");
    }
}
