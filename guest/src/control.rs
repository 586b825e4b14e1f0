//! What the host may ask for, checked against the manifest: `container.proto` of the crate cofferdam-container-protocol.
//!
//! A connection's requests are answered one after the other. Everything is bounded: connections, the size of a request, and the
//! time for one to come as a whole. The container is not asked, and does not wait.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use cofferdam_container_manifest::{Manifest, Signal};
use cofferdam_container_protocol::frame::{Decoder, Frame, Kind};
use cofferdam_container_protocol::message::{
    ExecRequest, ExecResponse, Message, Method, ProcessState, Refused, Request, ResizeRequest,
    ResizeResponse, Response, SERVICE, SignalRequest, SignalResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, StopRequest, StopResponse, WaitRequest, WaitResponse, code, is_exec_id,
};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, recv};

/// Connections at once; further ones are closed.
const CONNECTIONS: usize = 16;
/// How long a connection may be idle, or a request take to come, or its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often somebody who waits for a process is looked after.
const LOOK: Duration = Duration::from_secs(1);
const CHUNK: usize = 16 << 10;

/// Why something that the manifest grants is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No such process.
    NotFound,
    /// There is such a process.
    AlreadyExists,
    /// There are too many processes of Exec.
    TooMany,
    /// The process has ended, or no terminal.
    NotInThisState(&'static str),
    /// It cannot be run.
    NotRunnable,
}

impl Refusal {
    fn response(self) -> Response {
        match self {
            Self::NotFound => Response::refused(code::NOT_FOUND, "there is no such process"),
            Self::AlreadyExists => Response::refused(code::ALREADY_EXISTS, "there is such a process already"),
            Self::TooMany => Response::refused(code::RESOURCE_EXHAUSTED, "there are too many processes"),
            Self::NotInThisState(why) => Response::refused(code::FAILED_PRECONDITION, why),
            Self::NotRunnable => Response::refused(code::INTERNAL, "the program cannot be run"),
        }
    }
}

/// What the container uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time, in microseconds.
    pub cpu_us: u64,
    /// Memory in use, in bytes.
    pub memory: u64,
    /// All memory, in bytes.
    pub memory_total: u64,
    /// Processes and threads.
    pub processes: u32,
}

/// The container, to which only what the manifest grants comes.
pub trait Container: Send + Sync {
    /// Whether a process runs, and its exit status if it has ended.
    fn state(&self, id: &str) -> Result<(ProcessState, Option<u8>), Refusal>;
    /// Waits, but not longer than `time`, for a process to end; its exit status if it has.
    fn wait(&self, id: &str, time: Duration) -> Result<Option<u8>, Refusal>;
    /// Sends a signal.
    fn signal(&self, id: &str, signal: Signal) -> Result<(), Refusal>;
    /// Starts a process.
    fn exec(&self, request: &ExecRequest) -> Result<(), Refusal>;
    /// Changes the size of a terminal: columns and rows.
    fn resize(&self, id: &str, columns: u16, rows: u16) -> Result<(), Refusal>;
    /// What it uses.
    fn usage(&self) -> Usage;
    /// Begins the orderly stop.
    fn stop(&self);
}

/// Answers requests.
pub struct Service<C> {
    manifest: Manifest,
    container: C,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

/// What came of looking at a request.
enum Verdict {
    Done(Response),
    /// The manifest's field of this name does not grant it.
    Denied(String),
}

impl<T: Message> From<Result<T, Refusal>> for Verdict {
    fn from(result: Result<T, Refusal>) -> Self {
        Self::Done(result.map_or_else(Refusal::response, |message| Response::done(&message)))
    }
}

fn malformed(what: &str) -> Verdict {
    Verdict::Done(Response::refused(code::INVALID_ARGUMENT, what))
}

impl<C: Container> Service<C> {
    /// A service for the container of this manifest.
    pub fn new(manifest: Manifest, container: C) -> Self {
        Self { manifest, container, refused: Mutex::default() }
    }

    /// The container.
    pub fn container(&self) -> &C {
        &self.container
    }

    /// Answers a request. `gone` says whether nobody waits for the answer any more.
    pub fn answer(&self, payload: &[u8], gone: &dyn Fn() -> bool) -> Response {
        let Ok(request) = Request::decode(payload) else {
            return Response::refused(code::INVALID_ARGUMENT, "this is no request of ttrpc");
        };
        let method = Method::from_name(&request.method).filter(|_| request.service == SERVICE);
        let Some(method) = method else {
            return Response::refused(code::UNIMPLEMENTED, "there is no such method");
        };
        match self.perform(method, &request.payload, gone) {
            Ok(Verdict::Done(response)) => response,
            Ok(Verdict::Denied(field)) => {
                let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                let count = refused.entry(method.name()).or_default();
                *count = count.saturating_add(1);
                Response::refused(
                    code::PERMISSION_DENIED,
                    format!("the manifest does not grant this: {field}"),
                )
            }
            Err(_) => Response::refused(code::INVALID_ARGUMENT, "this is not what the method takes"),
        }
    }

    fn perform(
        &self,
        method: Method,
        payload: &[u8],
        gone: &dyn Fn() -> bool,
    ) -> Result<Verdict, prost::DecodeError> {
        Ok(match method {
            Method::State => {
                let state = self.container.state(&StateRequest::decode(payload)?.id);
                state
                    .map(|(state, status)| StateResponse {
                        state: state.into(),
                        exit_status: status.unwrap_or(0).into(),
                    })
                    .into()
            }
            Method::Wait => self.wait(&WaitRequest::decode(payload)?.id, gone).into(),
            Method::Signal => self.signal(&SignalRequest::decode(payload)?),
            Method::Exec => self.exec(&ExecRequest::decode(payload)?),
            Method::Resize => self.resize(&ResizeRequest::decode(payload)?),
            Method::Stats => {
                StatsRequest::decode(payload)?;
                Ok(self.stats()).into()
            }
            Method::Stop => {
                StopRequest::decode(payload)?;
                self.container.stop();
                Ok(StopResponse {}).into()
            }
        })
    }

    fn wait(&self, id: &str, gone: &dyn Fn() -> bool) -> Result<WaitResponse, Refusal> {
        loop {
            if let Some(status) = self.container.wait(id, LOOK)? {
                return Ok(WaitResponse { exit_status: status.into() });
            }
            if gone() {
                return Err(Refusal::NotInThisState("nobody waits any more"));
            }
        }
    }

    fn signal(&self, request: &SignalRequest) -> Verdict {
        let Some(signal) = Signal::from_name(&request.signal) else {
            return malformed("there is no such signal");
        };
        if !self.manifest.host.signals.contains(&signal) {
            return Verdict::Denied("host.signals".to_owned());
        }
        self.container.signal(&request.id, signal).map(|()| SignalResponse {}).into()
    }

    fn exec(&self, request: &ExecRequest) -> Verdict {
        if !is_exec_id(&request.id) {
            return malformed("the identifier is not 1 to 64 letters, digits, underscores and hyphens");
        }
        let host = &self.manifest.host;
        if !host.exec.contains(&request.args) {
            return Verdict::Denied("host.exec".to_owned());
        }
        let streams = [
            ("host.stdin", host.stdin, request.stdin_port != 0),
            (
                "host.stdout",
                host.stdout,
                if request.terminal { request.stdin_port } else { request.stdout_port } != 0,
            ),
            ("host.stderr", host.stderr, !request.terminal && request.stderr_port != 0),
        ];
        if let Some((field, _, _)) = streams.iter().find(|(_, granted, wanted)| *wanted && !granted) {
            return Verdict::Denied((*field).to_owned());
        }
        if request.terminal && size(request.columns, request.rows).is_none() {
            return malformed("a terminal has at most 65535 columns and rows");
        }
        self.container.exec(request).map(|()| ExecResponse {}).into()
    }

    fn resize(&self, request: &ResizeRequest) -> Verdict {
        // The terminal of a further process is that of who was granted the process.
        if request.id.is_empty() && !self.manifest.host.signals.contains(&Signal::Winch) {
            return Verdict::Denied("host.signals".to_owned());
        }
        let Some((columns, rows)) = size(request.columns, request.rows) else {
            return malformed("a terminal has at most 65535 columns and rows");
        };
        self.container.resize(&request.id, columns, rows).map(|()| ResizeResponse {}).into()
    }

    fn stats(&self) -> StatsResponse {
        let Usage { cpu_us, memory, memory_total, processes } = self.container.usage();
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let refused =
            refused.iter().map(|(method, count)| Refused { method: (*method).to_owned(), count: *count });
        StatsResponse {
            cpu_us,
            memory_bytes: memory,
            memory_total_bytes: memory_total,
            processes,
            refused: refused.collect(),
        }
    }
}

fn size(columns: u32, rows: u32) -> Option<(u16, u16)> {
    Some((columns.try_into().ok()?, rows.try_into().ok()?))
}

/// Serves the host for ever, on the connections that `accept` waits for.
pub fn serve<C: Container + 'static>(
    mut accept: impl FnMut() -> rustix::io::Result<OwnedFd>,
    service: &Arc<Service<C>>,
) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        match accept() {
            Ok(socket) => {
                if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
                    open.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let connection = Connection { socket, open: open.clone() };
                let service = service.clone();
                // Without a thread the connection is closed.
                let _ = thread::Builder::new().spawn(move || connection.serve(&service));
            }
            // Somebody left before his turn, or was not the host.
            Err(Errno::CONNABORTED | Errno::ACCESS | Errno::INTR) => {}
            // No memory, no descriptors: later perhaps.
            Err(_) => thread::sleep(LOOK),
        }
    }
}

struct Connection {
    socket: OwnedFd,
    open: Arc<AtomicUsize>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Connection {
    fn serve<C: Container>(&self, service: &Service<C>) {
        let timeouts = [Timeout::Recv, Timeout::Send]
            .map(|which| set_socket_timeout(&self.socket, which, Some(PATIENCE)));
        if timeouts.iter().any(Result::is_err) {
            return;
        }
        let (mut decoder, mut buffer) = (Decoder::default(), vec![0; CHUNK]);
        // What is late, broken, or no frame at all ends the connection.
        while let Ok(length @ 1..) = retry_on_intr(|| read(&self.socket, &mut buffer[..])) {
            decoder.push(buffer.get(..length).unwrap_or_default());
            loop {
                let frame = match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(frame)) if frame.kind == Kind::Request => frame,
                    Ok(Some(_)) | Err(_) => return,
                };
                let response = service.answer(&frame.payload, &|| self.is_gone());
                if self.send(frame.stream, &response).is_none() {
                    return;
                }
            }
        }
    }

    /// Whether the host has closed the connection.
    fn is_gone(&self) -> bool {
        let peeked = recv(&self.socket, &mut [0_u8; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        !matches!(peeked, Ok((1.., _)) | Err(Errno::AGAIN | Errno::INTR))
    }

    fn send(&self, stream: u32, response: &Response) -> Option<()> {
        let frame =
            Frame { stream, kind: Kind::Response, payload: response.encode_to_vec() }.encode().ok()?;
        let mut rest = &frame[..];
        while !rest.is_empty() {
            let written = retry_on_intr(|| write(&self.socket, rest)).ok()?;
            rest = rest.get(written..).filter(|_| written > 0)?;
        }
        Some(())
    }
}
