//! Requests to the init of a container's domain: ttrpc on a socket whose other end the monitor hands to the guest's
//! vsock device, as if a program had connected.
//!
//! The guest is not trusted: what it answers has a limit in length and time, and anything but the answer to what was
//! asked is an error that closes the connection. Each request of a client has a connection of its own, so nothing that
//! one guest process does to one of them touches another.

use std::time::Duration;

use cofferdam_container_protocol::CONNECT;
use cofferdam_container_protocol::frame::{Decoder, Frame, FrameError};
use cofferdam_container_protocol::message::{
    ExecRequest, ExecResponse, Message, Method, Request, ResizeRequest, ResizeResponse, Response,
    SignalRequest, SignalResponse, StatsRequest, StatsResponse, Status, WaitRequest, WaitResponse, code,
};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::requests::{Exec, Kill, Resize};
use crate::status::{ContainerStats, Executed};

/// How long the guest may take to accept a connection, and to answer a request that waits for nothing.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Longest answer, bytes: all are short.
const MAX_ANSWER: usize = 16 << 10;
/// Longest message of the guest's that is passed on, characters.
const MAX_MESSAGE: usize = 512;
/// Longest line that the vsock device greets with, bytes: `OK 4294967295\n`.
const MAX_GREETING: usize = 14;

/// Why the guest did not do what was asked.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The guest refuses connections.
    #[error("container: the guest takes no requests")]
    NotThere,
    /// It closed the connection.
    #[error("container: the guest has closed the connection")]
    Closed,
    /// It did not answer.
    #[error("container: the guest did not answer within {} s", PATIENCE.as_secs())]
    Late,
    /// What it sent is no frame.
    #[error("container: the guest answered with {0}")]
    Frame(#[from] FrameError),
    /// What it sent is no answer to what was asked.
    #[error("container: the guest answered with what is no answer to {}", .0.name())]
    Nonsense(Method),
    /// It refused, in these words. Control characters are replaced.
    #[error("container: the guest refused: {0}")]
    Refused(String),
    /// The host failed.
    #[error("container: {0}")]
    Host(#[from] std::io::Error),
}

/// A connection to the guest's init.
pub struct Guest {
    stream: UnixStream,
    decoder: Decoder,
    next: u32,
}

impl Guest {
    /// Connects by `stream`, whose other end the device has.
    pub async fn connect(mut stream: UnixStream) -> Result<Self, GuestError> {
        timeout(PATIENCE, greet(&mut stream)).await.unwrap_or(Err(GuestError::Late))?;
        Ok(Self { stream, decoder: Decoder::new(MAX_ANSWER), next: 1 })
    }

    /// Asks for what is answered at once.
    pub async fn ask<A: Message + Default>(
        &mut self,
        method: Method,
        message: &impl Message,
    ) -> Result<A, GuestError> {
        timeout(PATIENCE, self.wait(method, message)).await.unwrap_or(Err(GuestError::Late))
    }

    /// Asks, and waits for the answer as long as it takes.
    pub async fn wait<A: Message + Default>(
        &mut self,
        method: Method,
        message: &impl Message,
    ) -> Result<A, GuestError> {
        let stream = self.next;
        self.next = stream.wrapping_add(2);
        let request = Request::new(method, message).encode_on(stream)?;
        self.stream.write_all(&request).await.map_err(|_| GuestError::Closed)?;
        match Response::to_request_on(stream, &self.frame().await?) {
            Some(Response { status: Some(Status { code, message }), .. }) if code != code::OK => {
                Err(GuestError::Refused(clean(&message)))
            }
            Some(Response { payload, .. }) => A::decode(&*payload).map_err(|_| GuestError::Nonsense(method)),
            None => Err(GuestError::Nonsense(method)),
        }
    }

    async fn frame(&mut self) -> Result<Frame, GuestError> {
        let mut bytes = [0; 2048];
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(frame);
            }
            match self.stream.read(&mut bytes).await {
                Ok(0) | Err(_) => return Err(GuestError::Closed),
                Ok(count) => self.decoder.push(bytes.get(..count).unwrap_or_default()),
            }
        }
    }
}

/// Runs a command as process `id`, and waits for its end, `time` at most.
pub async fn execute(
    guest: &mut Guest,
    id: String,
    exec: Exec,
    time: Option<Duration>,
) -> Result<Executed, GuestError> {
    let request = ExecRequest {
        id: id.clone(),
        args: exec.args,
        terminal: exec.terminal,
        columns: exec.columns.into(),
        rows: exec.rows.into(),
        stdin_port: exec.stdin_port,
        stdout_port: exec.stdout_port,
        stderr_port: exec.stderr_port,
    };
    guest.ask::<ExecResponse>(Method::Exec, &request).await?;
    end(guest, id, time).await
}

/// Waits for the end of process `id`, `time` at most.
pub async fn end(guest: &mut Guest, id: String, time: Option<Duration>) -> Result<Executed, GuestError> {
    let request = WaitRequest { id: id.clone() };
    let end = guest.wait::<WaitResponse>(Method::Wait, &request);
    let end = match time {
        Some(time) => match timeout(time, end).await {
            Ok(end) => end?,
            Err(_) => return Ok(Executed { id, exit_code: None }),
        },
        None => end.await?,
    };
    match u8::try_from(end.exit_status) {
        Ok(code) => Ok(Executed { id, exit_code: Some(code) }),
        Err(_) => Err(GuestError::Nonsense(Method::Wait)),
    }
}

/// Sends a signal.
pub async fn kill(guest: &mut Guest, kill: Kill) -> Result<(), GuestError> {
    let request = SignalRequest { id: kill.id.unwrap_or_default(), signal: kill.signal };
    guest.ask::<SignalResponse>(Method::Signal, &request).await.map(drop)
}

/// Changes the size of a terminal.
pub async fn resize(guest: &mut Guest, resize: Resize) -> Result<(), GuestError> {
    let Resize { id, columns, rows } = resize;
    let request = ResizeRequest { id: id.unwrap_or_default(), columns: columns.into(), rows: rows.into() };
    guest.ask::<ResizeResponse>(Method::Resize, &request).await.map(drop)
}

/// What the container uses.
pub async fn stats(guest: &mut Guest) -> Result<ContainerStats, GuestError> {
    let stats = guest.ask::<StatsResponse>(Method::Stats, &StatsRequest {}).await?;
    let known = stats.refused.into_iter().filter(|refused| Method::from_name(&refused.method).is_some());
    Ok(ContainerStats {
        cpu_us: stats.cpu_us,
        memory_bytes: stats.memory_bytes,
        memory_total_bytes: stats.memory_total_bytes,
        processes: stats.processes,
        refused: known.map(|refused| (refused.method, refused.count)).collect(),
    })
}

/// Says which port is wanted, and waits until the guest has accepted.
async fn greet(stream: &mut UnixStream) -> Result<(), GuestError> {
    stream.write_all(CONNECT.as_bytes()).await?;
    // The line is the device's own. What follows it is the guest's: not one byte of it is read here.
    for _ in 0..MAX_GREETING {
        match stream.read_u8().await {
            Ok(b'\n') => return Ok(()),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    Err(GuestError::NotThere)
}

/// What can be shown to a person of what the guest says.
fn clean(message: &str) -> String {
    let printable = |letter: char| if letter.is_control() { '\u{fffd}' } else { letter };
    message.chars().take(MAX_MESSAGE).map(printable).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream as Stream;

    use cofferdam_container_protocol::frame::Kind;
    use cofferdam_container_protocol::message::Refused;

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(future)
    }

    /// What comes of a connection on which the device and the guest say `words`, and no more.
    fn stats(words: &[u8]) -> Result<ContainerStats, String> {
        let (ours, mut theirs) = Stream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(words).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        run(async {
            let mut guest = Guest::connect(UnixStream::from_std(ours).unwrap()).await?;
            super::stats(&mut guest).await
        })
        .map_err(|error| error.to_string())
    }

    fn answer(stream: u32, kind: Kind, response: &Response) -> Vec<u8> {
        let payload = response.encode_to_vec();
        [b"OK 7\n".to_vec(), Frame { stream, kind, payload }.encode().unwrap()].concat()
    }

    #[test]
    fn only_the_answer_to_what_was_asked_is_taken() {
        let good = StatsResponse {
            cpu_us: 1,
            refused: [("Signal", 2), ("Format", 3)]
                .map(|(method, count)| Refused { method: method.to_owned(), count })
                .into(),
            ..StatsResponse::default()
        };
        let good = Response::done(&good);
        let expected = ContainerStats {
            cpu_us: 1,
            refused: [("Signal".to_owned(), 2)].into(),
            ..ContainerStats::default()
        };
        assert_eq!(stats(&answer(1, Kind::Response, &good)), Ok(expected));
        let nonsense = "container: the guest answered with what is no answer to Stats";
        let broken = Response { status: None, payload: vec![0xFF] };
        let refusal = |code, message: &str| answer(1, Kind::Response, &Response::refused(code, message));
        let long = Response { status: None, payload: vec![0; MAX_ANSWER] };
        for (words, message) in [
            (answer(3, Kind::Response, &good), nonsense),
            (answer(1, Kind::Request, &good), nonsense),
            (answer(1, Kind::Response, &broken), nonsense),
            (refusal(code::NOT_FOUND, "a\nb\x1b"), "container: the guest refused: a\u{fffd}b\u{fffd}"),
            (refusal(code::PERMISSION_DENIED, "host.exec"), "container: the guest refused: host.exec"),
            (
                answer(1, Kind::Response, &long),
                "container: the guest answered with a frame of 16388 bytes, which is too long",
            ),
            (b"OK 7\n\0\0".to_vec(), "container: the guest has closed the connection"),
            (b"OK 7\n".to_vec(), "container: the guest has closed the connection"),
            (b"OK 7".to_vec(), "container: the guest takes no requests"),
            (vec![], "container: the guest takes no requests"),
            (vec![b'x'; 100], "container: the guest takes no requests"),
        ] {
            assert_eq!(stats(&words), Err(message.to_owned()));
        }
        assert_eq!(clean(&"x".repeat(2 * MAX_MESSAGE)).len(), MAX_MESSAGE);
    }
}
