use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream as Stream;
use std::path::PathBuf;
use std::sync::Mutex;

use super::*;
use crate::actions::Version;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, whose monitor keeps those that wait and refuses everything but `GET /version`.
struct Fixture {
    server: Option<Server>,
    metrics: Arc<ApiMetrics>,
    waiting: Arc<Mutex<Vec<Reply>>>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let waiting = Arc::new(Mutex::new(Vec::new()));
        let kept = waiting.clone();
        let deliver = move |envelope: Envelope| match envelope.action {
            VmmAction::Wait => kept.lock().unwrap().push(envelope.reply),
            VmmAction::GetVersion => envelope.reply.send(Ok(VmmData::Version(Version::this()))),
            VmmAction::GetMetrics => envelope.reply.send(Ok(VmmData::Metrics("text".to_owned()))),
            VmmAction::PutSerial(_) => envelope.reply.send(Ok(VmmData::Empty)),
            VmmAction::Stop(_) => drop(envelope.reply),
            _ => envelope.reply.send(Err(ActionError::BeforeStart)),
        };
        let metrics = Arc::<ApiMetrics>::default();
        let confine = || Ok::<_, Infallible>(());
        let server =
            Server::start(listener, 1000, metrics.clone(), Arc::new(deliver), confine).unwrap().unwrap();
        Self { server: Some(server), metrics, waiting, path, _directory: directory }
    }

    fn connect(&self) -> Client {
        let stream = Stream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(BufReader::new(stream))
    }

    fn ask(&self, request: &str, body: &str) -> (u16, String) {
        let mut client = self.connect();
        client.send(request, body);
        client.answer()
    }

    fn wait_for_waiters(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        while self.waiting.lock().unwrap().len() < count {
            assert!(Instant::now() < end, "nobody waits");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Client(BufReader<Stream>);

impl Client {
    /// Writes; a server that has had enough has answered already.
    fn write(&mut self, bytes: &[u8]) {
        let _ = self.0.get_mut().write_all(bytes);
    }

    fn send(&mut self, request: &str, body: &str) {
        let length = body.len();
        self.write(
            format!("{request} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes(),
        );
    }

    /// Status and body.
    fn answer(&mut self) -> (u16, String) {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
        let mut length = 0;
        loop {
            line.clear();
            self.0.read_line(&mut line).unwrap();
            if line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (status, String::from_utf8(body).unwrap())
    }

    /// Whether the server has closed the connection.
    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

#[test]
fn answers_have_firecracker_s_forms() {
    let server = Fixture::new();
    let (status, body) = server.ask("GET /version", "");
    assert_eq!(status, 200);
    assert!(body.contains("\"firecracker_version\":\"1.16.0\""), "{body}");
    assert_eq!(server.ask("PUT /serial", "{}"), (204, String::new()));
    assert_eq!(
        server.ask("PATCH /vm", r#"{"state": "Paused"}"#),
        (400, format!("{{\"fault_message\":\"{}\"}}", ActionError::BeforeStart))
    );
    assert_eq!(server.ask("GET /openapi.json", ""), (200, DOCUMENT.to_owned()));
    assert_eq!(server.ask("DELETE /vm", "").0, 400);
}

#[test]
fn a_body_over_the_limit_is_refused_and_the_next_request_served() {
    let server = Fixture::new();
    let (status, body) = server.ask("PUT /serial", &"x".repeat(1001));
    assert_eq!(status, 400);
    assert!(body.contains("payload with size 1001 is larger than the limit of 1000"), "{body}");
    // Of unknown length.
    let mut client = server.connect();
    client.write(b"PUT /serial HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.write(format!("3e9\r\n{}\r\n0\r\n\r\n", "x".repeat(1001)).as_bytes());
    let (status, body) = client.answer();
    assert!(status == 400 && body.contains("at most 1000 bytes"), "{status} {body}");
    assert_eq!(server.ask("PUT /serial", "{}").0, 204);
}

/// A monitor that is busy for a while, and clients that do not wait for it.
#[test]
fn requests_whose_clients_have_gone_do_not_pile_up() {
    let server = Fixture::new();
    for count in 1..=MAX_REQUESTS {
        let mut client = server.connect();
        client.send("GET /vm/wait", "");
        server.wait_for_waiters(count);
    }
    let (status, body) = server.ask("GET /version", "");
    assert_eq!((status, body), (400, format!("{{\"fault_message\":\"{}\"}}", ActionError::Busy)));
    assert_eq!(server.ask("GET /openapi.json", "").0, 200);
    server.waiting.lock().unwrap().pop();
    assert_eq!(server.ask("GET /version", "").0, 200);
}

#[test]
fn a_head_over_the_limit_and_nonsense_end_the_connection_only() {
    let server = Fixture::new();
    for request in
        [format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_HEAD)), "\u{1}\u{2}\r\n\r\n".to_owned()]
    {
        let mut client = server.connect();
        let _ = client.0.get_mut().write_all(request.as_bytes());
        let (status, _) = client.answer();
        assert!((400..500).contains(&status), "{status}");
        assert!(client.is_closed());
    }
    assert_eq!(server.ask("GET /version", "").0, 200);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = Fixture::new();
    let mut client = server.connect();
    let one = "GET /version HTTP/1.1\r\nHost: x\r\n\r\n";
    let other = "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n";
    client.write(format!("{one}{other}{one}").as_bytes());
    assert_eq!([client.answer().0, client.answer().0, client.answer().0], [200, 400, 200]);
}

#[test]
fn half_requests_and_waiting_ones_hold_up_nobody() {
    let server = Fixture::new();
    let mut head = server.connect();
    head.write(b"GET /ver");
    let mut body = server.connect();
    body.write(b"PUT /serial HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{");
    let mut waiting = server.connect();
    waiting.send("GET /vm/wait", "");
    server.wait_for_waiters(1);
    assert_eq!(server.ask("GET /version", "").0, 200);
    // What is late is served all the same.
    body.write(b"}");
    assert_eq!(body.answer().0, 204);
    head.write(b"sion HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(head.answer().0, 200);
}

#[test]
fn idle_connections_make_room_and_waiting_ones_stay() {
    let server = Fixture::new();
    let mut waiting = server.connect();
    waiting.send("GET /vm/wait", "");
    server.wait_for_waiters(1);
    let mut idle: Vec<Client> = (0..2 * MAX_CONNECTIONS).map(|_| server.connect()).collect();
    assert_eq!(server.ask("GET /version", "").0, 200);
    assert!(idle[0].is_closed());
    server.waiting.lock().unwrap().pop().unwrap().send(Ok(VmmData::Empty));
    assert_eq!(waiting.answer().0, 204);
}

#[test]
fn when_all_wait_one_more_is_told_so() {
    let server = Fixture::new();
    let mut waiting: Vec<Client> = (0..MAX_CONNECTIONS).map(|_| server.connect()).collect();
    waiting.iter_mut().for_each(|client| client.send("GET /vm/wait", ""));
    server.wait_for_waiters(MAX_CONNECTIONS);
    assert_eq!(server.connect().answer().0, 503);
    // Who goes makes room.
    waiting.pop();
    let end = Instant::now() + PATIENCE;
    loop {
        let mut client = server.connect();
        client.send("GET /version", "");
        match client.answer().0 {
            200 => break,
            status => assert!(status == 503 && Instant::now() < end, "{status}"),
        }
    }
}

#[test]
fn who_waited_long_enough_gets_an_answer_and_is_not_wanted_any_more() {
    let server = Fixture::new();
    // The status that it gets then is this monitor's refusal.
    assert_eq!(server.ask("GET /vm/wait?timeout_ms=20", "").0, 400);
    assert!(!server.waiting.lock().unwrap()[0].is_wanted());
}

#[test]
fn the_end_sends_answers_under_way() {
    let mut server = Fixture::new();
    let mut waiting = server.connect();
    waiting.send("GET /vm/wait", "");
    let mut idle = server.connect();
    server.wait_for_waiters(1);
    server.waiting.lock().unwrap().pop().unwrap().send(Ok(VmmData::Version(Version::this())));
    drop(server.server.take());
    assert_eq!(waiting.answer().0, 200);
    assert!(idle.is_closed());
    assert!(Stream::connect(&server.path).is_err());
}

#[test]
fn who_asked_before_the_end_is_answered_whether_or_not_anybody_had_looked() {
    for round in 0..200 {
        let mut server = Fixture::new();
        let mut clients: Vec<_> = (0..3).map(|_| server.connect()).collect();
        clients.iter_mut().for_each(|client| client.send("GET /version", ""));
        drop(server.server.take());
        for client in &mut clients {
            assert_eq!(client.answer().0, 200, "round {round}");
        }
    }
}

#[test]
fn requests_are_counted_by_route_and_result() {
    let fixture = Fixture::new();
    fixture.ask("GET /version", "");
    fixture.ask("PUT /serial", "{}");
    fixture.ask("PUT /serial", "{");
    fixture.ask("PUT /actions", r#"{"action_type": "InstanceStart"}"#);
    fixture.ask("GET /nothing", "");
    fixture.ask("PUT /serial", &" ".repeat(1001));
    let groups = fixture.metrics.groups();
    let count = |group: &str, field: &str| {
        let group = groups.iter().find(|other| other.family == group).unwrap();
        let field = group.fields.iter().find(|other| other.name == field).unwrap();
        match field.reading {
            cofferdam_metrics::Reading::Counter(count) => count,
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!(count("get_api_requests", "vmm_version_count"), 1);
    assert_eq!(count("get_api_requests", "vmm_version_fails"), 0);
    assert_eq!(
        (count("put_api_requests", "serial_count"), count("put_api_requests", "serial_fails")),
        (2, 1)
    );
    assert_eq!(
        (count("put_api_requests", "actions_count"), count("put_api_requests", "actions_fails")),
        (1, 1)
    );
    assert_eq!(count("api_server", "invalid_requests_count"), 2);
    let times = fixture.metrics.server.requests_agg.distribution();
    assert_eq!(times.counts.iter().sum::<u64>(), 5);
}

#[test]
fn metrics_are_text() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    client.send("GET /metrics", "");
    let mut answer = String::new();
    while !answer.ends_with("text") {
        assert_ne!(client.0.read_line(&mut answer).unwrap(), 0, "{answer}");
        if answer.ends_with("\r\n\r\n") {
            let mut body = [0; 4];
            client.0.read_exact(&mut body).unwrap();
            answer.push_str(std::str::from_utf8(&body).unwrap());
        }
    }
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
}
