//! A small blocking client of a monitor's API, for programs that ask one thing at a time.
//!
//! Each request has a connection of its own. What the monitor may take is limited in time, over the whole
//! exchange, and its answer in size; so a monitor that is stuck, or is none, costs its client a known time and
//! little memory.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;

use crate::actions::ActionError;
use crate::config::{MAX_CONFIG_SIZE, MachineConfig};
use crate::router::MAX_TIMEOUT_MS;
use crate::status::VmStatus;

/// Largest head of an answer that is read, bytes, and most headers in it.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 32;
/// Largest body of an answer that is read, bytes. Of what this client asks for, a configuration is the largest.
pub const MAX_BODY: usize = 2 * MAX_CONFIG_SIZE;
/// Most that is read at once, bytes.
const CHUNK: usize = 4096;

/// Why a request was not done, or its answer not understood.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody can be reached there.
    #[error("cannot connect to {}: {error}", socket.display())]
    Connect {
        /// The socket's path.
        socket: PathBuf,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// The time is over.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The connection ended before the answer did, or the monitor answered that it is about to end.
    #[error("the monitor ended before it answered")]
    Closed,
    /// The connection broke.
    #[error("the connection to the monitor: {0}")]
    Broken(#[source] io::Error),
    /// The monitor refused.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why.
        message: String,
    },
    /// The answer is no HTTP.
    #[error("the answer is not HTTP/1.1: {0}")]
    NotHttp(#[from] httparse::Error),
    /// The answer's body has a form that a monitor never gives it.
    #[error("the answer's header {0} is missing or bad")]
    BadHeader(&'static str),
    /// The answer is too large.
    #[error("the answer's {what} is larger than {limit} bytes")]
    TooLarge {
        /// Head or body.
        what: &'static str,
        /// Most that is read.
        limit: usize,
    },
    /// The answer's body is not what was asked for.
    #[error("the answer to {request}: {error}")]
    BadBody {
        /// Method and path.
        request: String,
        /// What is wrong.
        #[source]
        error: serde_json::Error,
    },
}

impl ClientError {
    /// Whether nobody is there: nobody listens, or whoever did ended before the answer.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Connect { error, .. } => {
                matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
            }
            Self::Closed => true,
            _ => false,
        }
    }
}

/// A command to run in a container: `POST /container/exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exec {
    /// What it is called; nobody else's name.
    pub id: String,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Whether its standard streams are one terminal, on `stdin_port`.
    pub terminal: bool,
    /// Size of that terminal, in characters.
    pub columns: u16,
    /// Size of that terminal, in characters.
    pub rows: u16,
    /// The vsock port of the host that the guest connects to for standard input; 0: there is none.
    pub stdin_port: u32,
    /// The same for standard output.
    pub stdout_port: u32,
    /// The same for standard error.
    pub stderr_port: u32,
}

/// Asks the monitor that listens on one socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// Of the monitor that listens on `socket`, of at most 107 bytes. Each request may take `timeout`, from the connection to the
    /// last byte of the answer.
    pub fn new(socket: &Path, timeout: Duration) -> Self {
        Self { socket: socket.to_owned(), timeout }
    }

    /// `GET /vm`: what the domain does.
    pub fn status(&self) -> Result<VmStatus, ClientError> {
        self.get("/vm", Some(self.timeout))
    }

    /// `GET /machine-config`: vCPUs and memory.
    pub fn machine(&self) -> Result<MachineConfig, ClientError> {
        self.get("/machine-config", Some(self.timeout))
    }

    /// `GET /vm/config`: the whole configuration. As JSON, so that the monitor may be of another version.
    pub fn config(&self) -> Result<Value, ClientError> {
        self.get("/vm/config", Some(self.timeout))
    }

    /// `PATCH /vm`: returns when every vCPU is held.
    pub fn pause(&self) -> Result<(), ClientError> {
        self.exchange("PATCH", "/vm", Some(r#"{"state": "Paused"}"#), Some(self.timeout)).map(drop)
    }

    /// `PATCH /vm`: lets the vCPUs run.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.exchange("PATCH", "/vm", Some(r#"{"state": "Resumed"}"#), Some(self.timeout)).map(drop)
    }

    /// `DELETE /vm`: asks for an orderly stop, and for a hard one after `time` (at most a day) or else after that
    /// of the domain's configuration. It does not wait for the end.
    pub fn stop(&self, time: Option<Duration>) -> Result<(), ClientError> {
        let query = time.map(|time| format!("?timeout_ms={}", millis(time))).unwrap_or_default();
        self.exchange("DELETE", &format!("/vm{query}"), None, Some(self.timeout)).map(drop)
    }

    /// `GET /vm/wait`: how the domain ended, when it has; or, after `time` (at most a day), what it does then.
    pub fn wait(&self, time: Option<Duration>) -> Result<VmStatus, ClientError> {
        let Some(time) = time else { return self.get("/vm/wait", None) };
        let millis = millis(time);
        let limit = Duration::from_millis(millis).saturating_add(self.timeout);
        self.get(&format!("/vm/wait?timeout_ms={millis}"), Some(limit))
    }

    /// `POST /container/kill`: sends a signal, by its name without `SIG`, to the container's process, or to that of the
    /// exec `id`.
    pub fn container_kill(&self, signal: &str, id: Option<&str>) -> Result<(), ClientError> {
        self.post("/container/kill", json!({"signal": signal}), id, Some(self.timeout)).map(drop)
    }

    /// `POST /container/resize`: gives the terminal of the container, or of the exec `id`, a size in characters.
    pub fn container_resize(&self, columns: u16, rows: u16, id: Option<&str>) -> Result<(), ClientError> {
        self.post("/container/resize", json!({"columns": columns, "rows": rows}), id, Some(self.timeout))
            .map(drop)
    }

    /// `POST /container/exec`: runs a command beside the container's process, and returns its exit code when it has
    /// ended, however long that takes.
    pub fn container_exec(&self, exec: &Exec) -> Result<u8, ClientError> {
        #[derive(Deserialize)]
        struct Ended {
            exit_code: u8,
        }
        let body = serde_json::to_value(exec).unwrap_or_default();
        let request = "/container/exec";
        let answer = self.post(request, body, None, None)?;
        let ended: Ended = serde_json::from_slice(&answer)
            .map_err(|error| ClientError::BadBody { request: format!("POST {request}"), error })?;
        Ok(ended.exit_code)
    }

    /// `GET /container/stats`. As JSON, so that the guest's init may be of another version.
    pub fn container_stats(&self) -> Result<Value, ClientError> {
        self.get("/container/stats", Some(self.timeout))
    }

    fn post(
        &self,
        target: &str,
        mut body: Value,
        id: Option<&str>,
        limit: Option<Duration>,
    ) -> Result<Vec<u8>, ClientError> {
        if let (Some(id), Some(fields)) = (id, body.as_object_mut()) {
            fields.insert("id".to_owned(), id.into());
        }
        self.exchange("POST", target, Some(&body.to_string()), limit)
    }

    fn get<T: DeserializeOwned>(&self, target: &str, limit: Option<Duration>) -> Result<T, ClientError> {
        let body = self.exchange("GET", target, None, limit)?;
        serde_json::from_slice(&body)
            .map_err(|error| ClientError::BadBody { request: format!("GET {target}"), error })
    }

    /// Sends a request and returns the body of its answer, all within `limit`.
    fn exchange(
        &self,
        method: &str,
        target: &str,
        body: Option<&str>,
        limit: Option<Duration>,
    ) -> Result<Vec<u8>, ClientError> {
        let mut connection = Connection::new(&self.socket, self.timeout, limit)?;
        let content = match body {
            Some(body) => {
                format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            }
            None => "\r\n".to_owned(),
        };
        let request =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{content}");
        connection.send(request.as_bytes())?;
        let (status, body) = connection.answer()?;
        if matches!(status, 200 | 204) { Ok(body) } else { Err(refusal(status, &body)) }
    }
}

/// `time` as a time-out of the API.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).min(MAX_TIMEOUT_MS)
}

fn refusal(status: u16, body: &[u8]) -> ClientError {
    #[derive(Deserialize)]
    struct Fault {
        fault_message: String,
    }
    let message = match serde_json::from_slice::<Fault>(body) {
        Ok(fault) if fault.fault_message == ActionError::Stopped.to_string() => return ClientError::Closed,
        Ok(fault) => fault.fault_message,
        Err(_) if status == 503 => "the monitor has too many connections".to_owned(),
        Err(_) => format!("the monitor answered with status {status}"),
    };
    ClientError::Refused { status, message }
}

/// A connection for one request.
struct Connection {
    stream: UnixStream,
    limit: Option<(Duration, Instant)>,
}

impl Connection {
    fn new(socket: &Path, timeout: Duration, limit: Option<Duration>) -> Result<Self, ClientError> {
        let start = Instant::now();
        let limit = limit.and_then(|limit| Some((limit, start.checked_add(limit)?)));
        let stream = connect_within(socket, timeout).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::TimedOut(timeout),
            _ => ClientError::Connect { socket: socket.to_owned(), error },
        })?;
        Ok(Self { stream, limit })
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(self.time_left()?).map_err(ClientError::Broken)?;
            match self.stream.write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) => self.mind(error)?,
            }
        }
        Ok(())
    }

    /// Status and body of the answer.
    fn answer(&mut self) -> Result<(u16, Vec<u8>), ClientError> {
        let mut bytes = Vec::new();
        let (status, length) = loop {
            if self.read(&mut bytes)? == 0 {
                return Err(ClientError::Closed);
            }
            if let Some((status, head, length)) = parse_head(&bytes)? {
                bytes.drain(..head);
                break (status, length);
            }
            if bytes.len() >= MAX_HEAD {
                return Err(ClientError::TooLarge { what: "head", limit: MAX_HEAD });
            }
        };
        while bytes.len() < length {
            if self.read(&mut bytes)? == 0 {
                return Err(ClientError::Closed);
            }
        }
        bytes.truncate(length);
        Ok((status, bytes))
    }

    /// Reads what comes next, at most [`CHUNK`]; 0 at the end.
    fn read(&mut self, bytes: &mut Vec<u8>) -> Result<usize, ClientError> {
        let mut chunk = [0; CHUNK];
        loop {
            self.stream.set_read_timeout(self.time_left()?).map_err(ClientError::Broken)?;
            match self.stream.read(&mut chunk) {
                Ok(count) => {
                    bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
                    return Ok(count);
                }
                Err(error) => self.mind(error)?,
            }
        }
    }

    /// What is left of the time; an error if nothing is.
    fn time_left(&self) -> Result<Option<Duration>, ClientError> {
        let Some((limit, end)) = self.limit else { return Ok(None) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ClientError::TimedOut(limit)) } else { Ok(Some(left)) }
    }

    /// Passes over an error after which one can go on; `time_left` finds that the time is over.
    fn mind(&self, error: io::Error) -> Result<(), ClientError> {
        match error.kind() {
            ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(()),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Err(ClientError::Closed),
            _ => Err(ClientError::Broken(error)),
        }
    }
}

/// Connects. It takes time when the monitor has not accepted what came before, and more than its backlog waits.
fn connect_within(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

/// Status, length of the head and length of the body, once the head is complete.
fn parse_head(bytes: &[u8]) -> Result<Option<(u16, usize, usize)>, ClientError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = answer.parse(bytes)? else { return Ok(None) };
    // A complete answer has a status.
    let status = answer.code.unwrap_or_default();
    let header = |name: &str| answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
    if header("Transfer-Encoding").is_some() {
        return Err(ClientError::BadHeader("Transfer-Encoding"));
    }
    let length = match header("Content-Length") {
        None if status == 204 => 0,
        None => return Err(ClientError::BadHeader("Content-Length")),
        Some(header) => std::str::from_utf8(header.value)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(ClientError::BadHeader("Content-Length"))?,
    };
    if length > MAX_BODY {
        return Err(ClientError::TooLarge { what: "body", limit: MAX_BODY });
    }
    Ok(Some((status, head, length)))
}

#[cfg(test)]
mod tests;
