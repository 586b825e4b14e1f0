//! The messages of `container.proto` and those of ttrpc around them, and what the crate `prost` makes of them.
//!
//! `tests/proto.rs` compares them with the published files.

pub use prost::Message;

use crate::frame::{Frame, FrameError, Kind};

/// The service, as a request names it.
pub const SERVICE: &str = "cofferdam.container.v1.Container";

/// Longest identifier of a process, in bytes.
pub const MAX_ID: usize = 64;

/// Whether `id` can be the identifier of a further process: 1 to 64 letters, digits, underscores and hyphens.
pub fn is_exec_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// How a process is.
    State,
    /// Its exit status, once it has ended.
    Wait,
    /// A signal for it.
    Signal,
    /// A further process.
    Exec,
    /// Another size of a terminal.
    Resize,
    /// What the container uses.
    Stats,
    /// The orderly stop.
    Stop,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::State, Self::Wait, Self::Signal, Self::Exec, Self::Resize, Self::Stats, Self::Stop];

    /// Its name, as a request has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "State",
            Self::Wait => "Wait",
            Self::Signal => "Signal",
            Self::Exec => "Exec",
            Self::Resize => "Resize",
            Self::Stats => "Stats",
            Self::Stop => "Stop",
        }
    }

    /// What has this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// Codes of a [`Status`]: those of gRPC that this protocol has.
pub mod code {
    /// All is well.
    pub const OK: i32 = 0;
    /// The request makes no sense.
    pub const INVALID_ARGUMENT: i32 = 3;
    /// There is no such process.
    pub const NOT_FOUND: i32 = 5;
    /// There is such a process already.
    pub const ALREADY_EXISTS: i32 = 6;
    /// The manifest does not grant it.
    pub const PERMISSION_DENIED: i32 = 7;
    /// There are too many of them.
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    /// Not in this state.
    pub const FAILED_PRECONDITION: i32 = 9;
    /// There is no such method.
    pub const UNIMPLEMENTED: i32 = 12;
    /// The guest failed.
    pub const INTERNAL: i32 = 13;
}

/// ttrpc's request. Its metadata are not read.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// [`SERVICE`].
    #[prost(string, tag = "1")]
    pub service: String,
    /// Name of a [`Method`].
    #[prost(string, tag = "2")]
    pub method: String,
    /// The message that the method takes.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// How long the caller waits, in nanoseconds; 0: for ever.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

impl Request {
    /// A request without a time-out.
    pub fn new(method: Method, message: &impl Message) -> Self {
        Self {
            service: SERVICE.to_owned(),
            method: method.name().to_owned(),
            payload: message.encode_to_vec(),
            timeout_nano: 0,
        }
    }

    /// It on stream `stream`, as it is sent.
    ///
    /// # Errors
    /// If it is too long.
    pub fn encode_on(&self, stream: u32) -> Result<Vec<u8>, FrameError> {
        Frame { stream, kind: Kind::Request, payload: self.encode_to_vec() }.encode()
    }
}

/// ttrpc's response.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Missing or with code 0: all is well.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The message that the method answers with.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

impl Response {
    /// A good answer.
    pub fn done(message: &impl Message) -> Self {
        Self { status: None, payload: message.encode_to_vec() }
    }

    /// What `frame` is as the answer to the request on stream `stream`; `None`: something else.
    pub fn to_request_on(stream: u32, frame: &Frame) -> Option<Self> {
        let is_answer = (frame.stream, frame.kind) == (stream, Kind::Response);
        is_answer.then(|| Self::decode(&*frame.payload).ok()).flatten()
    }

    /// A refusal with one of the codes in [`code`].
    pub fn refused(code: i32, message: impl Into<String>) -> Self {
        Self { status: Some(Status { code, message: message.into() }), payload: Vec::new() }
    }
}

/// google.rpc.Status, without details.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Status {
    /// One of [`code`].
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// What is wrong, for people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// How a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ProcessState {
    /// Nothing that is known.
    Unspecified = 0,
    /// It is yet to be started.
    Created = 1,
    /// It runs.
    Running = 2,
    /// It has ended.
    Stopped = 3,
}

/// Of [`Method::State`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StateRequest {
    /// Which process; empty: the container's own.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Of [`Method::State`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StateResponse {
    /// How it is.
    #[prost(enumeration = "ProcessState", tag = "1")]
    pub state: i32,
    /// Of a process that has ended: its exit code, or 128 and the number of the signal that ended it.
    #[prost(uint32, tag = "2")]
    pub exit_status: u32,
}

/// Of [`Method::Wait`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WaitRequest {
    /// Which process; empty: the container's own.
    #[prost(string, tag = "1")]
    pub id: String,
}

/// Of [`Method::Wait`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WaitResponse {
    /// Exit code, or 128 and the number of the signal that ended it.
    #[prost(uint32, tag = "1")]
    pub exit_status: u32,
}

/// Of [`Method::Signal`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SignalRequest {
    /// Which process; empty: the container's own.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Name of the signal without `SIG`.
    #[prost(string, tag = "2")]
    pub signal: String,
}

/// Of [`Method::Signal`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SignalResponse {}

/// Of [`Method::Exec`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExecRequest {
    /// Identifier of the new process: see [`is_exec_id`].
    #[prost(string, tag = "1")]
    pub id: String,
    /// Exactly a command of `host.exec`.
    #[prost(string, repeated, tag = "2")]
    pub args: Vec<String>,
    /// Whether the standard streams are one terminal.
    #[prost(bool, tag = "3")]
    pub terminal: bool,
    /// Its width, in characters.
    #[prost(uint32, tag = "4")]
    pub columns: u32,
    /// Its height, in characters.
    #[prost(uint32, tag = "5")]
    pub rows: u32,
    /// vsock port of the host for standard input, or for the terminal; 0: `/dev/null`.
    #[prost(uint32, tag = "6")]
    pub stdin_port: u32,
    /// The same for standard output.
    #[prost(uint32, tag = "7")]
    pub stdout_port: u32,
    /// The same for standard error.
    #[prost(uint32, tag = "8")]
    pub stderr_port: u32,
}

/// Of [`Method::Exec`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExecResponse {}

/// Of [`Method::Resize`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ResizeRequest {
    /// Which process; empty: the container's own.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Width of its terminal, in characters.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
    /// Height of its terminal, in characters.
    #[prost(uint32, tag = "3")]
    pub rows: u32,
}

/// Of [`Method::Resize`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ResizeResponse {}

/// Of [`Method::Stats`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StatsRequest {}

/// Of [`Method::Stats`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StatsResponse {
    /// Processor time of all processes of the guest, in microseconds.
    #[prost(uint64, tag = "1")]
    pub cpu_us: u64,
    /// Memory in use in the guest, in bytes.
    #[prost(uint64, tag = "2")]
    pub memory_bytes: u64,
    /// All memory of the guest, in bytes.
    #[prost(uint64, tag = "3")]
    pub memory_total_bytes: u64,
    /// Processes and threads of the container.
    #[prost(uint32, tag = "4")]
    pub processes: u32,
    /// Requests that the manifest does not grant.
    #[prost(message, repeated, tag = "5")]
    pub refused: Vec<Refused>,
}

/// Requests that were refused.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Refused {
    /// Name of the method.
    #[prost(string, tag = "1")]
    pub method: String,
    /// How many there were.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

/// Of [`Method::Stop`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StopRequest {}

/// Of [`Method::Stop`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StopResponse {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for good in ["a", "Exec_1-b", &"x".repeat(64)] {
            assert!(is_exec_id(good), "{good}");
        }
        for bad in ["", "a b", "é", "a/b", &"x".repeat(65)] {
            assert!(!is_exec_id(bad), "{bad}");
        }
    }

    #[test]
    fn only_the_answer_to_what_was_asked_is_one() {
        let frame = |stream, kind, payload: &[u8]| Frame { stream, kind, payload: payload.to_vec() };
        let good = Response::refused(code::NOT_FOUND, "m");
        let payload = good.encode_to_vec();
        assert_eq!(Response::to_request_on(3, &frame(3, Kind::Response, &payload)), Some(good));
        for other in [
            frame(5, Kind::Response, &payload),
            frame(3, Kind::Request, &payload),
            frame(3, Kind::Response, &[0xFF]),
        ] {
            assert_eq!(Response::to_request_on(3, &other), None);
        }
        assert_eq!(crate::CONNECT, format!("CONNECT {}\n", crate::CONTROL_PORT));
    }

    #[test]
    fn methods_have_names() {
        for method in Method::ALL {
            assert_eq!(Method::from_name(method.name()), Some(method));
        }
        assert_eq!(Method::from_name("stop"), None);
    }

    #[test]
    fn other_fields_are_skipped_and_broken_bytes_refused() {
        // ttrpc's metadata (field 5), which is not read.
        let mut bytes = Request::new(Method::Stop, &StopRequest {}).encode_to_vec();
        bytes.extend([0x2A, 2, 8, 1]);
        assert_eq!(Request::decode(&*bytes).unwrap().method, "Stop");
        for bad in [&[0x0A_u8, 200][..], &[0xFF; 12], &[0x0A, 1, 0xFF], &[0x08, 1]] {
            assert!(Request::decode(bad).is_err(), "{bad:?}");
        }
    }
}
