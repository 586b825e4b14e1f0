//! The monitor's API against `small-server`, from the start to the first reply and in memory while it waits; and the
//! way from `PUT /vm?start=true` to the first guest instruction against that of `floor`, from its `main` on.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use cofferdam_tests::place;
use serde_json::{Value, json};

use crate::report::{Better, Row, Subject};
use crate::server::{Server, Sockets, now};
use crate::start_up::{MEMORY, last_line, milliseconds};
use crate::{Result, in_turns, programs, progress};

const FIRST_REPLY: Subject =
    Subject { name: "start to first API reply", unit: "ms", better: Better::Lower, goal: Some(1.3) };
const IDLE_MEMORY: Subject =
    Subject { name: "idle memory with API", unit: "MiB", better: Better::Lower, goal: Some(1.5) };
const OWN_MEMORY: Subject =
    Subject { name: "the same without pages of files", unit: "MiB", better: Better::Lower, goal: None };
const ONE_SHOT: Subject = Subject {
    name: "PUT /vm?start=true to first instruction",
    unit: "ms",
    better: Better::Lower,
    goal: None,
};

const SOCKET: &str = "socket";
/// How often memory is looked at, and how long a server is left alone before.
const MEMORY_SAMPLES: usize = 5;
const REST: Duration = Duration::from_millis(20);

/// Runs both sides of each comparison `rounds` times in turns.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let sockets = Sockets::new(directory.path())?;
    let mut rows = vec![first_replies(&sockets, rounds)?];
    rows.extend(idle_memory(&sockets)?);
    rows.push(one_shots(&sockets, &directory.path().join("status"), rounds)?);
    Ok(rows)
}

/// A monitor that waits for its domain.
pub fn monitor(socket: &Path) -> Command {
    let mut command = Command::new(programs::monitor());
    // That a guest powered off is no news here.
    command.args(["--level", "error"]).arg("--api-sock").arg(socket);
    command
}

fn small_server(socket: &Path) -> Command {
    let mut command = Command::new(programs::reference("small-server"));
    command.arg(socket);
    command
}

/// The configuration of a domain of 1 vCPU and `memory` MiB, without a console.
pub fn domain(payload: &str, memory: u64) -> Value {
    json!({
        "boot-source": {"kernel_image_path": place::payload(payload)},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": memory},
        "serial": {"mode": "None"},
    })
}

fn first_replies(sockets: &Sockets, rounds: usize) -> Result<Row> {
    progress(format_args!("{rounds} first replies of the monitor and of small-server, in turns"));
    let measure = |command: &mut Command| Ok(replied(command, sockets)?.1);
    let (ours, theirs) = in_turns(
        rounds,
        || measure(&mut monitor(&sockets.path(SOCKET))),
        || measure(&mut small_server(&sockets.path(SOCKET))),
    )?;
    Ok(FIRST_REPLY.row(&ours, &theirs, "small-server"))
}

/// Starts a server; returns it with the milliseconds to its first reply.
fn replied(command: &mut Command, sockets: &Sockets) -> Result<(Server, f64)> {
    let mut server = Server::start(command, sockets, SOCKET)?;
    server.ask("GET /", "", 200)?;
    let time = server.age();
    Ok((server, time))
}

/// Resident sets, in which pages of program files count in full, though all servers of a host share them; and those
/// without, which each server has for itself.
fn idle_memory(sockets: &Sockets) -> Result<[Row; 2]> {
    let measure = |command: &mut Command| {
        let (server, _) = replied(command, sockets)?;
        sleep(REST);
        Ok((server.memory("VmRSS")?, server.memory("RssAnon")?))
    };
    let (ours, theirs) = in_turns(
        MEMORY_SAMPLES,
        || measure(&mut monitor(&sockets.path(SOCKET))),
        || measure(&mut small_server(&sockets.path(SOCKET))),
    )?;
    let row = |subject: Subject, of: fn(&(f64, f64)) -> f64| {
        let column = |samples: &[(f64, f64)]| samples.iter().map(of).collect::<Vec<_>>();
        subject.row(&column(&ours), &column(&theirs), "small-server")
    };
    Ok([row(IDLE_MEMORY, |sample| sample.0), row(OWN_MEMORY, |sample| sample.1)])
}

fn one_shots(sockets: &Sockets, status: &Path, rounds: usize) -> Result<Row> {
    progress(format_args!("{rounds} starts by the API and of floor, in turns"));
    let config = domain("first", MEMORY).to_string();
    let ours = || -> Result<f64> {
        let _ = fs::remove_file(status);
        let mut command = monitor(&sockets.path(SOCKET));
        // Phases since 0 are times of the clock.
        command.arg("--start-time-us=0").arg("--status-file").arg(status);
        let (mut server, _) = replied(&mut command, sockets)?;
        let start = now();
        server.ask("PUT /vm?start=true", &config, 204)?;
        server.finish()?;
        Ok(milliseconds(&last_line(status)?, &["phases", "user_space"])? - start)
    };
    let theirs = || -> Result<f64> {
        let mut command = Command::new(programs::reference("floor"));
        command.arg(place::payload("first")).arg(status).stdin(Stdio::null());
        if !command.status()?.success() {
            return Err("floor failed".into());
        }
        let last = last_line(status)?;
        Ok(milliseconds(&last, &["user_space"])? - milliseconds(&last, &["start"])?)
    };
    let (ours, theirs) = in_turns(rounds, ours, theirs)?;
    Ok(ONE_SHOT.row(&ours, &theirs, "floor, from main"))
}
