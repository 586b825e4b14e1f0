//! A hostile host: everything that it can ask of a container's init, in every state, with garbage and floods between; and a
//! container that does not mind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_container_manifest::Signal;
use cofferdam_container_protocol::CONTROL_PORT;
use cofferdam_container_protocol::frame::{Decoder, Frame, HEADER, Kind, MAX_PAYLOAD};
use cofferdam_container_protocol::message::*;
use cofferdam_tests::container::Container;

/// How long anything may take, in an emulator.
const PATIENCE: Duration = Duration::from_secs(240);

/// A connection to init, if it takes one.
fn connect(socket: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {CONTROL_PORT}").ok()?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        line.extend(byte);
    }
    line.starts_with(b"OK ").then_some(stream)
}

fn frame(request: &Request) -> Vec<u8> {
    Frame { stream: 1, kind: Kind::Request, payload: request.encode_to_vec() }.encode().unwrap()
}

/// The answer that comes on a connection, if one does.
fn answer(stream: &mut UnixStream) -> Option<Response> {
    let (mut decoder, mut bytes) = (Decoder::default(), [0; 4096]);
    loop {
        if let Some(frame) = decoder.next().unwrap() {
            assert_eq!((frame.kind, frame.stream), (Kind::Response, 1));
            return Some(Response::decode(&*frame.payload).unwrap());
        }
        let length = stream.read(&mut bytes).ok().filter(|length| *length > 0)?;
        decoder.push(&bytes[..length]);
    }
}

/// The code of the answer to a request, if one comes.
fn ask(socket: &Path, request: &Request) -> Option<i32> {
    let mut stream = connect(socket)?;
    stream.write_all(&frame(request)).ok()?;
    Some(answer(&mut stream)?.status.map_or(code::OK, |status| status.code))
}

/// Every method, with what it takes and the manifest does not grant, or of what there is not; and with garbage.
fn requests() -> Vec<Request> {
    let id = || "nobody".to_owned();
    let exec = ExecRequest { id: id(), args: vec!["/bin/sh".to_owned()], ..ExecRequest::default() };
    let mut requests = vec![
        Request::new(Method::State, &StateRequest { id: id() }),
        Request::new(Method::Wait, &WaitRequest { id: id() }),
        Request::new(Method::Signal, &SignalRequest { id: String::new(), signal: "KILL".to_owned() }),
        Request::new(Method::Signal, &SignalRequest { id: id(), signal: "USR1".to_owned() }),
        Request::new(Method::Exec, &exec),
        Request::new(Method::Exec, &ExecRequest { id: "..".to_owned(), ..exec.clone() }),
        Request::new(Method::Exec, &ExecRequest { args: vec!["x".repeat(200_000)], ..exec }),
        Request::new(Method::Resize, &ResizeRequest { id: String::new(), columns: u32::MAX, rows: 0 }),
        Request { service: "agent".to_owned(), ..Request::new(Method::Stats, &StatsRequest {}) },
        Request { method: "Format".to_owned(), ..Request::new(Method::Stats, &StatsRequest {}) },
    ];
    for method in Method::ALL {
        requests.push(Request { payload: vec![0xFF; 12], ..Request::new(method, &StatsRequest {}) });
    }
    requests
}

/// What is no request at all.
fn garbage() -> Vec<Vec<u8>> {
    let header = |length: usize, kind: u8| {
        [&(length as u32).to_be_bytes()[..], &1_u32.to_be_bytes(), &[kind, 0]].concat()
    };
    let response = Frame { stream: 1, kind: Kind::Response, payload: vec![] }.encode().unwrap();
    let stats = frame(&Request::new(Method::Stats, &StatsRequest {}));
    vec![
        vec![],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xFF; 100_000],
        header(MAX_PAYLOAD + 1, 1),
        header(4, 9),
        response,
        stats[..HEADER / 2].to_vec(),
        stats[..stats.len() - 1].to_vec(),
        [stats.repeat(50), vec![0xFF; 64]].concat(),
    ]
}

/// All of it, on connections of their own.
fn abuse(socket: &Path) {
    for bytes in garbage() {
        if let Some(mut stream) = connect(socket) {
            // Init may have closed it before all was written.
            let _ = stream.write_all(&bytes);
        }
    }
    for request in requests() {
        // Init is free to be gone, or to have too many connections; but it grants nothing of this.
        assert_ne!(ask(socket, &request), Some(code::OK), "{request:?}");
    }
    // As many connections as there can be, which say nothing; then they go.
    let idle: Vec<_> = (0..100).map(|_| UnixStream::connect(socket)).collect();
    for mut stream in idle.iter().flatten() {
        let _ = writeln!(stream, "CONNECT {CONTROL_PORT}");
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_hostile_host_gets_nothing_and_the_container_goes_on() {
    let script =
        "trap 'echo asked; sleep 5; echo done; exit 7' USR1; echo up; while true; do sleep 0.1; done";
    let mut container = Container::new(script);
    container.manifest.host.signals = vec![Signal::Usr1];
    let started = container.start();
    let socket = started.socket.clone();
    wait_for("no socket", || socket.exists());
    // While it boots.
    abuse(&socket);
    let stats = Request::new(Method::Stats, &StatsRequest {});
    wait_for("init serves nobody", || ask(&socket, &stats) == Some(code::OK));
    // While it runs: all of it, and each is refused; many at once; then a good request is served.
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| abuse(&socket)))));
    for request in requests() {
        wait_for("no refusal", || ask(&socket, &request).is_some_and(|code| code != code::OK));
    }
    let mut named = vec![];
    wait_for("no statistics", || {
        let answered = connect(&socket).and_then(|mut stream| {
            stream.write_all(&frame(&stats)).ok()?;
            StatsResponse::decode(&*answer(&mut stream)?.payload).ok()
        });
        named =
            answered.iter().flat_map(|stats| &stats.refused).map(|refused| refused.method.clone()).collect();
        answered.is_some()
    });
    assert_eq!(named, ["Exec", "Resize", "Signal"], "what the manifest does not grant is counted");
    let usr1 = SignalRequest { id: String::new(), signal: "USR1".to_owned() };
    wait_for("no signal", || ask(&socket, &Request::new(Method::Signal, &usr1)) == Some(code::OK));
    // While it ends.
    abuse(&socket);
    let ended = started.finish();
    assert_eq!((ended.text().as_str(), ended.done.code()), ("up\nasked\ndone\n", 7), "{ended}");
}
