//! `cofferdam run --detach`: the same in a process of its own, which belongs to no terminal and keeps what there is
//! to say in the domain's entry of the run directory. Whoever starts it waits until the domain runs, or is told
//! why it does not.
#![allow(unsafe_code)] // fork has no safe form

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};

use cofferdam_api::status::{Event, ExitReason};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, getpid, kill_process, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::args::RunArgs;
use crate::container::start::Start;
use crate::run::{refused, report, say_running, to_its_end};
use crate::waiting::Waiting;

/// Longest line that the background process says, bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Starts a domain in the background. Returns the exit code: 0 once it runs.
pub fn run(args: &RunArgs, container: Option<&Start>, start_time_us: u64) -> u8 {
    match split() {
        Ok(Side::Foreground { child, pipe }) => wait_for(args, container, child, pipe),
        Ok(Side::Background(mut starter)) => {
            let (_, ended) = to_its_end(args, container, start_time_us, Some(&mut starter));
            let code = ended.outcome.process_exit_code();
            starter.tell(&Event::Stopped(ended.outcome));
            code
        }
        Err(error) => {
            let outcome = refused(format!("cannot start a process in the background: {error}"));
            report(None, &outcome);
            outcome.process_exit_code()
        }
    }
}

/// Whoever started the domain: it waits for the first thing that it is told.
pub struct Starter {
    pipe: Option<File>,
}

impl Starter {
    /// Tells it, if it waits. If it has gone before the domain ran, nobody knows of the domain, and it is to stop.
    pub fn tell(&mut self, event: &Event) {
        let Some(mut pipe) = self.pipe.take() else { return };
        // Names, numbers and texts always have a form in JSON.
        let mut line = serde_json::to_vec(event).unwrap_or_default();
        line.push(b'\n');
        if pipe.write_all(&line).is_err() {
            // As if it had asked: it is caught.
            let _ = kill_process(getpid(), Signal::TERM);
        }
    }
}

fn wait_for(args: &RunArgs, container: Option<&Start>, child: u32, pipe: File) -> u8 {
    let waiting = container.map(|_| Waiting::new("starting the container"));
    let mut line = String::new();
    let read = BufReader::new(pipe.take(MAX_LINE)).read_line(&mut line);
    let event = read.map_err(|error| error.to_string()).and_then(|_| {
        serde_json::from_str(&line).map_err(|_| "the process in the background has ended".to_owned())
    });
    drop(waiting);
    let manifest = container.map(|container| &container.bound.digest);
    let outcome = match (event, args.domain_id(child)) {
        (Ok(Event::Running { platform, protected }), Ok(id)) => {
            if !args.quiet {
                say_running(&id, platform, protected, manifest, false);
            }
            // Who closed standard output does not want it.
            let _ = writeln!(io::stdout(), "{id}");
            return 0;
        }
        (Ok(Event::Stopped(outcome)), _) => outcome,
        (_, Err(message)) => refused(message),
        // The first thing to be told is neither.
        (Ok(Event::Step { .. }), _) => refused("the process in the background speaks out of turn".to_owned()),
        (Err(message), _) => {
            let mut outcome = refused(message);
            outcome.exit_reason = ExitReason::MonitorError;
            outcome
        }
    };
    let name = args.id.as_deref().filter(|_| outcome.exit_reason != ExitReason::Config);
    report(name, &outcome);
    outcome.process_exit_code()
}

enum Side {
    /// The process that was started by a person; the other one tells it by `pipe` what becomes of the domain.
    Foreground { child: u32, pipe: File },
    /// The other one.
    Background(Starter),
}

/// Forks.
fn split() -> io::Result<Side> {
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC)?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    // SAFETY: this process has one thread, so the child finds no lock taken and nothing half done.
    let child = unsafe { libc::fork() };
    match u32::try_from(child) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(0) => {
            drop(read_end);
            setsid()?;
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            dup2_stderr(&null)?;
            Ok(Side::Background(Starter { pipe: Some(write_end.into()) }))
        }
        Ok(child) => Ok(Side::Foreground { child, pipe: read_end.into() }),
    }
}
