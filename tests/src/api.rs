//! A monitor that serves its API, and raw HTTP to it.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::place;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// A monitor with an API. Dropped before its end, it is killed.
pub struct ApiMonitor {
    child: Child,
    socket: PathBuf,
}

impl ApiMonitor {
    /// Starts one with its socket in `folder`, and waits until it answers.
    pub fn start(folder: &Path) -> Self {
        Self::with(folder, &[])
    }

    /// Starts one with more arguments.
    pub fn with(folder: &Path, arguments: &[OsString]) -> Self {
        Self::wrapped(&[], folder, arguments)
    }

    /// Has `wrapper`, a program and its arguments, become the monitor.
    pub fn wrapped(wrapper: &[OsString], folder: &Path, arguments: &[OsString]) -> Self {
        let socket = folder.join("api.sock");
        let monitor = place::monitor().into_os_string();
        let mut words = wrapper.iter().chain([&monitor]);
        let child = Command::new(words.next().expect("there is the monitor at least"))
            .args(words)
            .arg("--api-sock")
            .arg(&socket)
            .args(["--id", "under-test"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the monitor starts");
        let mut monitor = Self { child, socket };
        let end = Instant::now() + PATIENCE;
        while UnixStream::connect(&monitor.socket).is_err() {
            assert!(Instant::now() < end, "nobody listens on {}", monitor.socket.display());
            assert!(monitor.child.try_wait().expect("it is our child").is_none(), "the monitor has ended");
            thread::sleep(Duration::from_millis(1));
        }
        monitor
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// The console.
    pub fn console(&mut self) -> (ChildStdin, ChildStdout) {
        let (stdin, stdout) = (self.child.stdin.take(), self.child.stdout.take());
        (stdin.expect("taken once"), stdout.expect("taken once"))
    }

    /// A connection.
    pub fn connect(&self) -> Connection {
        Connection::to(&self.socket).expect("the monitor listens")
    }

    /// Status and body of the answer to `request`, which is a method and a path, on a connection of its own.
    pub fn ask(&self, request: &str, body: &str) -> (u16, Value) {
        let mut connection = self.connect();
        connection.send(request, body);
        connection.answer()
    }

    /// Asks for what has to be answered with 204.
    pub fn done(&self, request: &str, body: &str) {
        assert_eq!(self.ask(request, body), (204, Value::Null), "{request} {body}");
    }

    /// The message with which `request` is refused.
    pub fn refusal(&self, request: &str, body: &str) -> String {
        let (status, answer) = self.ask(request, body);
        assert_eq!(status, 400, "{request} {body}: {answer}");
        answer["fault_message"].as_str().expect("a message").to_owned()
    }

    /// What `GET /` says of the state.
    pub fn state(&self) -> String {
        let (status, answer) = self.ask("GET /", "");
        assert_eq!(status, 200);
        answer["state"].as_str().expect("a state").to_owned()
    }

    /// Waits for its end.
    pub fn finish(mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            assert!(Instant::now() < end, "the monitor does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for ApiMonitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the API.
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// A new connection to the server on `socket`.
    pub fn to(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Writes bytes.
    pub fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("the monitor reads");
    }

    /// Sends a request.
    pub fn send(&mut self, request: &str, body: &str) {
        let length = body.len();
        let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        self.write(format!("{head}{body}").as_bytes());
    }

    /// Status and JSON of the next answer.
    pub fn answer(&mut self) -> (u16, Value) {
        let (status, _, body) = self.raw_answer();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("JSON") };
        (status, body)
    }

    /// Status, content type and body of the next answer.
    pub fn raw_answer(&mut self) -> (u16, String, Vec<u8>) {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {line:?}"));
        let status = status.parse().expect("a number");
        let (mut length, mut kind) = (0, String::new());
        while line != "\r\n" {
            line.clear();
            self.0.read_line(&mut line).expect("a header");
            let line = line.to_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a number");
            } else if let Some(value) = line.strip_prefix("content-type:") {
                kind = value.trim().to_owned();
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).expect("a body");
        (status, kind, body)
    }
}
