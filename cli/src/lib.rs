//! The command `cofferdam`: starts domains and shows what becomes of them, makes
//! images of them, and tells what a host can do.

mod args;
mod console;
mod container;
mod control;
mod detach;
mod drive;
mod exec;
mod host_check;
mod image;
mod inspect;
mod kept;
mod logs;
mod monitor;
mod ps;
mod record;
mod run;
mod run_dir;
mod say;
mod signals;
mod stats;
mod status;
mod streams;
mod supervise;
mod table;
mod terminal;
mod units;
mod wait;
mod waiting;

use std::env;
use std::process::ExitCode;

use clap::CommandFactory;
use rustix::time::{ClockId, clock_gettime};

use crate::args::{Cli, Command, HostCommand};

/// Exit code of a command line that cannot be understood: that of a bad configuration.
const BAD_USAGE: u8 = 125;

/// Its arguments, of which the manual is made.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program.
pub fn main() -> ExitCode {
    let start_time_us = monotonic_us();
    signals::ignore_limits();
    let code = match args::parse() {
        Ok(command) => match command {
            Command::Run(args) => run::run(&args, start_time_us),
            Command::Ps(args) => ps::ps(&args),
            Command::Inspect(target) => inspect::inspect(&target),
            Command::Logs(args) => logs::logs(&args),
            Command::Exec(args) => exec::exec(&args),
            Command::Kill(args) => control::kill(&args),
            Command::Stats(args) => stats::stats(&args),
            Command::Stop(args) => control::stop(&args),
            Command::Pause(target) => control::pause(&target),
            Command::Resume(target) => control::resume(&target),
            Command::Wait(args) => control::wait(&args),
            Command::Image(command) => image::run(&command),
            Command::Container(command) => container::run(&command),
            Command::Host(HostCommand::Check { json }) => host_check::check(json),
        },
        Err(error) => usage(&error),
    };
    ExitCode::from(code)
}

/// Prints help, or what is wrong with the command line. `run --json` ends with
/// its line of JSON in this case too.
fn usage(error: &clap::Error) -> u8 {
    // Fails only if nobody reads it.
    let _ = error.print();
    if !error.use_stderr() {
        return 0;
    }
    let mut words = env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "run") && words.any(|word| word == "--json") {
        run::print_json(&run::refused(first_paragraph(&error.to_string())), false);
    }
    BAD_USAGE
}

/// What a message of clap says, in one line and without its hints.
fn first_paragraph(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// CLOCK_MONOTONIC in microseconds; the phases of a launch are counted from it.
fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let micros = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
    u64::try_from(micros).unwrap_or(0)
}
