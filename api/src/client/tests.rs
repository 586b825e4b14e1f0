use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use super::*;
use crate::status::VmState;

/// What no test should need.
const PATIENCE: Duration = Duration::from_secs(60);
const STATUS: &str = r#"{"id": "d", "state": "Running", "platform": "plain", "protected": false, "exit_reason": null,
    "exit_code": null, "message": null, "phases": {}}"#;

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// A monitor that reads one request and gives one answer, in these pieces.
struct Monitor {
    thread: JoinHandle<String>,
    client: Client,
    _directory: tempfile::TempDir,
}

impl Monitor {
    fn answering(pieces: &[&str], timeout: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let pieces: Vec<String> = pieces.iter().map(|piece| (*piece).to_owned()).collect();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 1000];
            let count = stream.read(&mut request).unwrap();
            for piece in pieces {
                // The client may have gone.
                let _ = stream.write_all(piece.as_bytes());
                thread::sleep(Duration::from_millis(1));
            }
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        Self { thread, client: Client::new(&path, timeout), _directory: directory }
    }

    fn with(answer: &str) -> Self {
        Self::answering(&[answer], PATIENCE)
    }

    fn error(answer: &str) -> ClientError {
        let monitor = Self::with(answer);
        let error = monitor.client.status().unwrap_err();
        monitor.thread.join().unwrap();
        error
    }
}

#[test]
fn requests_are_those_of_the_router() {
    type Ask = fn(&Client) -> Result<(), ClientError>;
    let asks: [(&str, Ask); 9] = [
        ("GET /vm", |client| client.status().map(drop)),
        ("GET /vm/wait", |client| client.wait(None).map(drop)),
        ("GET /vm/wait?timeout_ms=1500", |client| client.wait(Some(Duration::from_millis(1500))).map(drop)),
        ("GET /vm/wait?timeout_ms=86400000", |client| client.wait(Some(Duration::MAX)).map(drop)),
        ("GET /vm/config", |client| client.config().map(drop)),
        ("PATCH /vm", Client::pause),
        ("PATCH /vm", Client::resume),
        ("DELETE /vm", |client| client.stop(None)),
        ("DELETE /vm?timeout_ms=70", |client| client.stop(Some(Duration::from_millis(70)))),
    ];
    for (expected, ask) in asks {
        let monitor = Monitor::with(&ok(STATUS));
        ask(&monitor.client).unwrap();
        let request = monitor.thread.join().unwrap();
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        let line = head.lines().next().unwrap();
        assert_eq!(line, format!("{expected} HTTP/1.1"));
        let (method, target) = expected.split_once(' ').unwrap();
        let (path, query) =
            target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        crate::router::route(method, path, query, body.as_bytes()).unwrap();
    }
}

#[test]
fn an_answer_may_come_in_pieces_and_without_a_body() {
    let text = ok(STATUS);
    let pieces: Vec<&str> =
        text.as_bytes().chunks(7).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
    let status = Monitor::answering(&pieces, PATIENCE).client.status().unwrap();
    assert_eq!((status.id.as_str(), status.state), ("d", VmState::Running));
    Monitor::with("HTTP/1.1 204 No Content\r\n\r\n").client.pause().unwrap();
}

#[test]
fn a_refusal_says_what_the_monitor_said() {
    let fault = r#"{"fault_message": "not now"}"#;
    let answer = format!("HTTP/1.1 400 Bad Request\r\ncontent-length: {}\r\n\r\n{fault}", fault.len());
    let error = Monitor::error(&answer);
    assert!(matches!(&error, ClientError::Refused { status: 400, .. }), "{error:?}");
    assert_eq!(error.to_string(), "not now");
    let fault = r#"{"fault_message": "The domain has stopped."}"#;
    let answer = format!("HTTP/1.1 400 Bad Request\r\ncontent-length: {}\r\n\r\n{fault}", fault.len());
    assert!(matches!(Monitor::error(&answer), ClientError::Closed));
    let busy = Monitor::error("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(busy.to_string(), "the monitor has too many connections");
    let other = Monitor::error("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(other.to_string(), "the monitor answered with status 500");
}

#[test]
fn what_is_no_answer_is_an_error() {
    for (answer, expected) in [
        ("", "the monitor ended before it answered"),
        ("HTTP/1.1 200 OK\r\n", "the monitor ended before it answered"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}", "the monitor ended before it answered"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "the answer is not HTTP/1.1: invalid HTTP version"),
        ("HTTP/1.1 200 OK\r\n\r\n{}", "the answer's header Content-Length is missing or bad"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "the answer's header Content-Length is missing or bad",
        ),
        ("HTTP/1.1 100 Continue\r\n\r\n", "the answer's header Content-Length is missing or bad"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "the answer's header Transfer-Encoding is missing or bad",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n",
            "the answer's body is larger than 2097152 bytes",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\n",
            "the answer's header Content-Length is missing or bad",
        ),
    ] {
        let error = Monitor::error(answer);
        assert_eq!(error.to_string(), expected, "{answer:?}");
        assert_eq!(error.is_gone(), matches!(error, ClientError::Closed), "{answer:?}");
    }
    let error = Monitor::error(&ok("{}"));
    assert!(error.to_string().starts_with("the answer to GET /vm: missing field"), "{error}");
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(MAX_HEAD));
    let error = Monitor::error(&endless);
    assert!(matches!(error, ClientError::TooLarge { what: "head", .. }), "{error}");
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(MAX_HEADERS + 1));
    assert!(matches!(Monitor::error(&many), ClientError::NotHttp(httparse::Error::TooManyHeaders)));
}

/// The time counts for the whole answer, not from one byte to the next.
#[test]
fn a_slow_answer_has_its_time_and_no_more() {
    let drip = vec!["x"; 100_000];
    let pieces = [&["HTTP/1.1 200 OK\r\nX: "][..], &drip[..]].concat();
    let monitor = Monitor::answering(&pieces, Duration::from_millis(100));
    let error = monitor.client.status().unwrap_err();
    assert!(matches!(error, ClientError::TimedOut(_)), "{error}");
    assert_eq!(error.to_string(), "no answer within 100 ms");
}

#[test]
fn nobody_there_is_told_apart_from_nobody_who_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let client = Client::new(&path, Duration::from_millis(50));
    assert!(client.status().unwrap_err().is_gone(), "no file");
    let listener = UnixListener::bind(&path).unwrap();
    // More than the backlog: those that are not accepted, and then one that cannot connect.
    let waiting: Vec<ClientError> = (0..3).map(|_| client.status().unwrap_err()).collect();
    assert!(waiting.iter().all(|error| matches!(error, ClientError::TimedOut(_))), "{waiting:?}");
    rustix::net::listen(&listener, 0).unwrap();
    let full = client.status().unwrap_err();
    assert!(matches!(full, ClientError::TimedOut(_)), "{full}");
    drop(listener);
    let gone = client.status().unwrap_err();
    assert!(gone.is_gone(), "{gone}");
    let long = Client::new(&directory.path().join("x".repeat(200)), PATIENCE).status().unwrap_err();
    assert!(matches!(long, ClientError::Connect { .. }) && !long.is_gone(), "{long}");
}
