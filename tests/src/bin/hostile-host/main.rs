//! `hostile-host PLAN COMMAND...`: becomes COMMAND, on a host that does to the monitor which COMMAND starts, and so to its
//! guest, what the file PLAN says ([`cofferdam_tests::tamper`]). It needs root.

mod host;
mod trace;

use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use cofferdam_tests::tamper::Plan;

use crate::host::Host;
use crate::trace::{Stop, Thread};

/// How often is looked for a plan's file that a test makes.
const LOOK: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    eprintln!("hostile-host: {error}");
    ExitCode::FAILURE
}

fn run() -> io::Result<()> {
    let usage = || io::Error::other("usage: hostile-host PLAN COMMAND...");
    let mut words = env::args_os().skip(1);
    let plan: Plan = serde_json::from_slice(&fs::read(words.next().ok_or_else(usage)?)?)?;
    let program = words.next().ok_or_else(usage)?;
    let command = Thread(i32::try_from(std::process::id()).map_err(io::Error::other)?);
    let (mut ready, mut tell) = io::pipe()?;
    if trace::split_off()? {
        drop(ready);
        command.seize()?;
        tell.write_all(&[1])?;
        drop(tell);
        return watch(Host::new(plan)?);
    }
    drop(tell);
    ready.read_exact(&mut [0])?;
    trace::trace_ioctls(&host::TRACED)?;
    Err(Command::new(program).args(words).exec())
}

/// Lets everything go its way, but for the plan's.
fn watch(mut host: Host) -> io::Result<()> {
    // Until nothing is traced any more.
    while let Ok(stopped) = trace::wait(!host.waits_for_word()) {
        let Some((thread, stop)) = stopped else {
            host.look_for_word();
            thread::sleep(LOOK);
            continue;
        };
        let signal = match stop {
            None => continue,
            Some(Stop::Group) => {
                let _ = thread.stay();
                continue;
            }
            Some(Stop::Signal(signal)) => signal,
            Some(_) => 0,
        };
        let done = match stop {
            Some(Stop::Call) => host.call(thread),
            Some(Stop::Interrupt) => host.interrupted(thread),
            _ => Ok(()),
        };
        if let Err(error) = done {
            eprintln!("hostile-host: {error}");
        }
        // It may be killed at any time.
        let _ = thread.go_on(signal);
    }
    Ok(())
}
