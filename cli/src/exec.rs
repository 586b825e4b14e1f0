//! `cofferdam exec`: a command beside the process of a container, with our standard streams.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::client::{Client, ClientError, Exec};
use cofferdam_container_manifest::Signal;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::getpid;
use serde_json::Value;

use crate::args::ExecArgs;
use crate::container::attached::{Attached, asks_for_an_end, caught, from_number};
use crate::control::{Domain, Failure};
use crate::signals::Signals;
use crate::streams::{Ends, Happened, Ports, Streams};
use crate::terminal::Input;
use crate::wait::wait_for;

/// The ports that commands have, from this one on: none that a container's streams have.
const FIRST_PORT: u32 = 1 << 30;
/// How many commands can have ports at a time; process ids go further.
const PLACES: u32 = 1 << 22;
/// Ports that are tried: another command, or one that was killed, may have the first ones.
const ATTEMPTS: u32 = 64;
/// How long the last output of a command may take when its end is known.
const REST: Duration = Duration::from_secs(10);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Signals,
    Refused,
    Ended,
    Stream(Happened),
}

/// Runs a command in a container. Returns its exit code.
pub fn exec(args: &ExecArgs) -> u8 {
    match run(args) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn run(args: &ExecArgs) -> Result<u8, Failure> {
    let domain = Domain::find(&args.target)?;
    let id = domain.entry.id.clone();
    let here = |error: io::Error| Failure::Here { id: id.clone(), error };
    let (socket, monitor) = place(&domain)?;
    let input = if args.interactive || args.tty { Input::look() } else { Input::Background };
    let (first, streams) = listen(args, &socket, input != Input::Background).map_err(here)?;
    let mut exec = Exec {
        id: format!("exec-{first}"),
        args: args.command.clone(),
        terminal: args.tty,
        stdin_port: if args.tty || args.interactive { first } else { 0 },
        ..Exec::default()
    };
    if !args.tty {
        (exec.stdout_port, exec.stderr_port) = (first.saturating_add(1), first.saturating_add(2));
    }
    let terminal = args.tty && input == Input::Terminal;
    let api = domain.entry.socket();
    let mut process = Attached::new(streams, api.clone(), Some(exec.id.clone()), terminal).map_err(here)?;
    process.streams.expect(monitor);
    (exec.columns, exec.rows) = process.size().unwrap_or((0, 0));
    let signals = Signals::catch(&caught()).map_err(here)?;
    let end = End::of(api, exec).map_err(here)?;
    let result = serve(&mut process, &signals, &end);
    process.take_the_rest();
    match result {
        Some(result) => domain.ask(|_| result),
        None => Err(Failure::Left(id)),
    }
}

/// The vsock socket of a container's domain, and the process id of its monitor.
fn place(domain: &Domain) -> Result<(PathBuf, u32), Failure> {
    let config = domain.ask(Client::config)?;
    let socket = config.pointer("/vsock/uds_path").and_then(Value::as_str);
    match (config.get("container"), socket, domain.entry.facts()) {
        (Some(Value::Object(_)), Some(socket), Some(facts)) => Ok((socket.into(), facts.pid)),
        _ => Err(Failure::NoContainer(domain.entry.id.clone())),
    }
}

/// Listens on ports that nobody has. Returns the first of them.
fn listen(args: &ExecArgs, socket: &Path, reads: bool) -> io::Result<(u32, Streams)> {
    let process = getpid().as_raw_pid().unsigned_abs();
    let mut attempt = 0_u32;
    loop {
        let place = process.wrapping_add(attempt.wrapping_mul(7919)) % PLACES;
        let first = FIRST_PORT.saturating_add(place.saturating_mul(4));
        let stdin = (args.tty || args.interactive).then_some(first);
        let ports = if args.tty {
            Ports { stdin, stdout: None, stderr: None }
        } else {
            let at = |number: u32| Some(first.saturating_add(number));
            Ports { stdin, stdout: at(1), stderr: at(2) }
        };
        let ends = Ends { reads, shows: true, terminal: args.tty, stdout_log: None, stderr_log: None };
        match Streams::listen(socket, ports, ends) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && attempt < ATTEMPTS => {}
            result => return result.map(|streams| (first, streams)),
        }
        attempt = attempt.saturating_add(1);
    }
}

/// Serves streams and signals until the command has ended; nothing if a second signal says that nobody waits for that.
fn serve(process: &mut Attached, signals: &Signals, end: &End) -> Option<Result<u8, ClientError>> {
    let mut result = None;
    let mut asked = false;
    let mut until = None;
    loop {
        let done = result.is_some() && process.streams.are_done();
        if done || result.as_ref().is_some_and(Result::is_err) || until.is_some_and(|at| at < Instant::now())
        {
            return result;
        }
        let mut waits = vec![
            (Source::Signals, signals.as_fd(), PollFlags::IN),
            (Source::Refused, process.answers(), PollFlags::IN),
        ];
        if result.is_none() {
            waits.push((Source::Ended, end.known.as_fd(), PollFlags::IN));
        }
        let streams = process.streams.waits().into_iter();
        waits.extend(streams.map(|(happened, fd, flags)| (Source::Stream(happened), fd, flags)));
        for source in wait_for(&waits, until) {
            match source {
                Source::Stream(happened) => process.serve(happened),
                Source::Refused => drop(process.refused()),
                Source::Ended => {
                    result = end.result.try_recv().ok();
                    until = Instant::now().checked_add(REST);
                }
                Source::Signals => {
                    for signal in signals.take().into_iter().filter_map(from_number) {
                        match signal {
                            Signal::Winch => process.resize(),
                            _ if asks_for_an_end(signal) && std::mem::replace(&mut asked, true) => {
                                return None;
                            }
                            _ => process.kill(signal),
                        }
                    }
                }
            }
        }
    }
}

/// The end of the command, for which a thread waits.
struct End {
    /// Readable when it is known.
    known: OwnedFd,
    result: Receiver<Result<u8, ClientError>>,
}

impl End {
    fn of(api: PathBuf, exec: Exec) -> io::Result<Self> {
        let (known, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
        let (sender, result) = channel();
        thread::Builder::new().name("exec".to_owned()).spawn(move || {
            let client = Client::new(&api, crate::control::ANSWER);
            let _ = sender.send(client.container_exec(&exec));
            // Closing it makes the other end readable.
            drop(write_end);
        })?;
        Ok(Self { known, result })
    }
}
