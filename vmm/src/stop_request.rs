//! The request to the init of a container's domain to stop in order, which takes the place of the power button there.
//!
//! The connection is made before the seccomp policies are in force, and given to the guest when a stop is asked for. The
//! event loop watches the monitor's end for what the guest says to it, which has a limit in length.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use cofferdam_container_protocol::CONNECT;
use cofferdam_container_protocol::frame::Decoder;
use cofferdam_container_protocol::message::{Method, Request, Response, Status, StopRequest as Stop, code};
use cofferdam_devices::virtio::mmio::MmioTransport;
use cofferdam_devices::virtio::vsock::Vsock;

/// Longest answer, bytes.
const MAX_ANSWER: usize = 4 << 10;
/// The stream of the only request.
const STREAM: u32 = 1;

/// A request to stop, sent or not.
pub struct StopRequest {
    vsock: Arc<MmioTransport>,
    ours: UnixStream,
    /// The guest's end, until it is sent.
    theirs: Option<OwnedFd>,
    /// The device has said that the guest accepted the connection.
    accepted: bool,
    decoder: Decoder,
}

/// What the guest says to it.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing yet.
    None,
    /// It has begun to stop.
    Begun,
    /// Nobody there takes requests, or the manifest grants no orderly stop.
    Refused,
    /// Something else, or nothing and never will.
    Nonsense,
}

impl StopRequest {
    /// A request to the guest behind `vsock`.
    pub fn new(vsock: Arc<MmioTransport>) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok(Self {
            vsock,
            ours,
            theirs: Some(theirs.into()),
            accepted: false,
            decoder: Decoder::new(MAX_ANSWER),
        })
    }

    /// Sends it, if it was not sent before.
    ///
    /// # Errors
    /// If the guest has no driver for vsock, or no room for a connection.
    pub fn send(&mut self) -> io::Result<()> {
        let Some(theirs) = self.theirs.take() else { return Ok(()) };
        let request = Request::new(Method::Stop, &Stop {}).encode_on(STREAM).map_err(io::Error::other)?;
        // Both together, and the first bytes on a socket: they fit.
        self.ours.write_all(&[CONNECT.as_bytes(), &request].concat())?;
        let adopted = self.vsock.with_device(|vsock: &mut Vsock| vsock.adopt(theirs));
        adopted.unwrap_or_else(|| Err(ErrorKind::NotConnected.into()))
    }

    /// Takes what has come.
    pub fn read(&mut self) -> Answer {
        let mut bytes = [0; 512];
        loop {
            match self.ours.read(&mut bytes) {
                Ok(count @ 1..) => match self.take(bytes.get(..count).unwrap_or_default()) {
                    Answer::None => {}
                    answer => return answer,
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Answer::None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The end, or, as the guest's end had yet to read something, an error.
                _ if self.accepted => return Answer::Nonsense,
                _ => return Answer::Refused,
            }
        }
    }

    fn take(&mut self, mut bytes: &[u8]) -> Answer {
        if !self.accepted {
            // The device's own line: `OK` and a port.
            let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else { return Answer::None };
            self.accepted = true;
            bytes = bytes.get(end..).and_then(|rest| rest.get(1..)).unwrap_or_default();
        }
        self.decoder.push(bytes);
        let answer = match self.decoder.next() {
            Ok(Some(frame)) => Response::to_request_on(STREAM, &frame),
            Ok(None) => return Answer::None,
            Err(_) => None,
        };
        match answer.map(|answer| answer.status) {
            Some(Some(Status { code: code::PERMISSION_DENIED, .. })) => Answer::Refused,
            Some(None | Some(Status { code: code::OK, .. })) => Answer::Begun,
            Some(Some(_)) | None => Answer::Nonsense,
        }
    }
}

impl AsRawFd for StopRequest {
    fn as_raw_fd(&self) -> RawFd {
        self.ours.as_raw_fd()
    }
}
