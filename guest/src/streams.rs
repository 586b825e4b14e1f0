//! The standard streams of the container's processes, between pipes or terminals here and vsock connections to the host.
//!
//! A thread for each direction of each stream copies what comes, and waits where it cannot go on: the host's flow control is
//! vsock's, the container's that of its pipes. A stream that the manifest does not grant, or that nobody takes, is `/dev/null`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use cofferdam_container_manifest::Host;
use cofferdam_container_protocol::step::Reason;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::failure::{Failure, Reasoned};
use crate::spawn::{Streams, null};
use crate::vsock;

/// Most bytes that a thread holds.
const CHUNK: usize = 64 << 10;
/// What a terminal takes for the end of what is typed: VEOF, Ctrl-D.
const END_OF_INPUT: u8 = 4;

/// Ports of the host, 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Of standard input, or of the terminal.
    pub stdin: u32,
    /// Of standard output.
    pub stdout: u32,
    /// Of standard error.
    pub stderr: u32,
}

/// Our ends of a process's streams.
#[derive(Debug)]
pub enum Plumbing {
    /// Of three streams.
    Pipes {
        /// From the host to the process.
        stdin: Option<(OwnedFd, OwnedFd)>,
        /// From the process to the host.
        outputs: Vec<(OwnedFd, OwnedFd)>,
    },
    /// Of a terminal.
    Terminal {
        /// The connection.
        socket: Option<OwnedFd>,
        /// Whether the host may type.
        types: bool,
        /// Whether the host sees what is shown.
        sees: bool,
    },
}

/// Connects to the host's ports.
///
/// # Errors
/// If the kernel has no pipes left.
pub fn connect(ports: Ports, terminal: bool, host: &Host) -> Result<(Streams, Plumbing), Failure> {
    // A port where nobody listens is no failure of the container's.
    let socket = |port: u32| (port != 0).then(|| vsock::connected(port).ok()).flatten();
    if terminal {
        let socket = if host.stdin || host.stdout { socket(ports.stdin) } else { None };
        return Ok((Streams::Terminal, Plumbing::Terminal { socket, types: host.stdin, sees: host.stdout }));
    }
    let pipe = || pipe_with(PipeFlags::CLOEXEC).because(Reason::KernelRefused);
    let mut stdin = (null()?, None);
    if host.stdin
        && let Some(socket) = socket(ports.stdin)
    {
        let (reader, writer) = pipe()?;
        stdin = (reader, Some((socket, writer)));
    }
    let mut outputs = Vec::new();
    let mut output = |granted: bool, port| match granted.then(|| socket(port)).flatten() {
        Some(socket) => {
            let (reader, writer) = pipe()?;
            outputs.push((reader, socket));
            Ok(writer)
        }
        None => null(),
    };
    let (stdout, stderr) = (output(host.stdout, ports.stdout)?, output(host.stderr, ports.stderr)?);
    let (stdin, input) = stdin;
    Ok((Streams::Pipes { stdin, stdout, stderr }, Plumbing::Pipes { stdin: input, outputs }))
}

impl Plumbing {
    /// Copies until the streams end. `terminal` is our side of the terminal, if the process has one.
    pub fn run(self, terminal: Option<OwnedFd>, outputs: &Arc<Outputs>) {
        match (self, terminal) {
            (Self::Pipes { stdin, outputs: pipes }, _) => {
                if let Some((socket, pipe)) = stdin {
                    begin(move || feed(&socket, &pipe));
                }
                for (pipe, socket) in pipes {
                    let open = outputs.open();
                    begin(move || drain(pipe, Some(socket), &open));
                }
            }
            (Self::Terminal { socket, types, sees }, Some(terminal)) => {
                let input = socket.as_ref().filter(|_| types).and_then(|socket| socket.try_clone().ok());
                if let (Some(socket), Ok(terminal)) = (input, terminal.try_clone()) {
                    begin(move || {
                        feed(&socket, &terminal);
                        let _ = write_all(&terminal, &[END_OF_INPUT]);
                    });
                }
                let open = outputs.open();
                // Somebody must take what is shown, or the process waits.
                begin(move || drain(terminal, socket.filter(|_| sees), &open));
            }
            (Self::Terminal { .. }, None) => {}
        }
    }
}

/// Without a thread the streams end at once, for their descriptors are closed.
fn begin(work: impl FnOnce() + Send + 'static) {
    let _ = thread::Builder::new().stack_size(CHUNK.saturating_mul(2)).spawn(work);
}

/// From the host to a process, until either has enough.
fn feed(socket: &OwnedFd, process: &OwnedFd) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let (none, input) = (PollFlags::empty(), PollFlags::IN);
        let mut both = [PollFd::new(socket, input), PollFd::new(process, none)];
        if retry_on_intr(|| poll(&mut both, None)).is_err() {
            return;
        }
        let [_, process_now] = both;
        // The process has closed its end.
        if process_now.revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return;
        }
        match retry_on_intr(|| read(socket, &mut buffer[..])) {
            Ok(0) | Err(_) => return,
            Ok(length) if write_all(process, buffer.get(..length).unwrap_or_default()).is_err() => return,
            Ok(_) => {}
        }
    }
}

/// From a process to the host. When the host wants no more, the process is told so, as with any pipe; without a host at all
/// everything vanishes.
fn drain(process: OwnedFd, socket: Option<OwnedFd>, open: &Open) {
    let mut buffer = vec![0; CHUNK];
    // At the end of a terminal the error is EIO.
    while let Ok(length @ 1..) = retry_on_intr(|| read(&process, &mut buffer[..])) {
        if let Some(socket) = &socket {
            if write_all(socket, buffer.get(..length).unwrap_or_default()).is_err() {
                return;
            }
            open.moved(length);
        }
    }
    drop(process);
    if let Some(socket) = socket {
        // What was written is on its way. It has arrived when the host has closed its end too.
        let _ = shutdown(&socket, Shutdown::Write);
        while let Ok(1..) = retry_on_intr(|| read(&socket, &mut buffer[..])) {}
    }
}

fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = retry_on_intr(|| write(to, bytes))?;
        bytes = bytes.get(written..).filter(|_| written > 0).ok_or(Errno::IO)?;
    }
    Ok(())
}

/// The outputs that are not delivered yet.
#[derive(Debug, Default)]
pub struct Outputs {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    open: usize,
    bytes: u64,
}

/// One of them, until this is dropped.
struct Open(Arc<Outputs>);

impl Outputs {
    fn open(self: &Arc<Self>) -> Open {
        let mut state = self.state();
        state.open = state.open.saturating_add(1);
        Open(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all are delivered, or nothing has moved for as long as `patience`. Processes that could write have ended.
    pub fn delivered(&self, patience: Duration) {
        let mut state = self.state();
        while state.open > 0 {
            let (bytes, open) = (state.bytes, state.open);
            let waited = self
                .changed
                .wait_timeout_while(state, patience, |state| (state.bytes, state.open) == (bytes, open));
            let (now, result) = waited.unwrap_or_else(PoisonError::into_inner);
            if result.timed_out() {
                return;
            }
            state = now;
        }
    }
}

impl Open {
    fn moved(&self, length: usize) {
        let mut state = self.0.state();
        state.bytes = state.bytes.wrapping_add(length as u64);
        self.0.changed.notify_all();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.open = state.open.saturating_sub(1);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, theirs.into())
    }

    #[test]
    fn output_is_delivered_and_its_end_seen() {
        let outputs = Arc::new(Outputs::default());
        let (mut process, pipe) = pair();
        let (mut host, socket) = pair();
        let open = outputs.open();
        let thread = thread::spawn(move || drain(pipe, Some(socket), &open));
        process.write_all(&[7; 300_000]).unwrap();
        drop(process);
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        assert_eq!(all, [7; 300_000]);
        // Delivered only once the host has closed its end.
        outputs.delivered(Duration::from_millis(10));
        assert_eq!(outputs.state().open, 1);
        drop(host);
        outputs.delivered(Duration::MAX);
        thread.join().unwrap();
    }

    #[test]
    fn a_host_that_is_gone_ends_the_pipe() {
        let outputs = Arc::new(Outputs::default());
        let (mut process, pipe) = pair();
        let (host, socket) = pair();
        drop(host);
        let open = outputs.open();
        let thread = thread::spawn(move || drain(pipe, Some(socket), &open));
        while process.write_all(b"x").is_ok() {}
        thread.join().unwrap();
    }

    #[test]
    fn without_a_host_output_vanishes() {
        let outputs = Arc::new(Outputs::default());
        let (mut process, pipe) = pair();
        let open = outputs.open();
        let thread = thread::spawn(move || drain(pipe, None, &open));
        process.write_all(&[7; 300_000]).unwrap();
        drop(process);
        thread.join().unwrap();
    }

    #[test]
    fn input_ends_with_either_side() {
        let (mut host, socket) = pair();
        let (mut process, pipe) = pair();
        let thread = thread::spawn(move || feed(&socket, &pipe));
        host.write_all(b"abc").unwrap();
        drop(host);
        let mut all = Vec::new();
        process.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abc");
        thread.join().unwrap();

        // The host is quiet, and the process leaves.
        let (_host, socket) = pair();
        let (process, pipe) = pair();
        let thread = thread::spawn(move || feed(&socket, &pipe));
        drop(process);
        thread.join().unwrap();
    }
}
