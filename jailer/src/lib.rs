//! `cofferdam-jailer`: runs a monitor where it can reach only what was named for it, and leaves nothing behind.
//!
//! The process that the caller starts is the supervisor ([`supervisor`]). It forks the keeper ([`keeper`]), which
//! makes and removes what outlives processes, and the process that becomes the monitor ([`inside`]).

mod arguments;
mod cgroup;
mod chroot;
mod devices;
mod directory;
mod inside;
mod keeper;
mod landlock;
mod limits;
mod namespaces;
mod privileges;
mod supervisor;
mod sys;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::arguments::Arguments;

/// Exit status when the program could not be started: that of a bad configuration or host.
const FAILURE: u8 = 125;

/// Its arguments, of which the manual is made.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// The program.
pub fn main() -> ExitCode {
    let start_time_us = supervisor::monotonic_us();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Fails only if nobody reads it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { FAILURE } else { 0 });
        }
    };
    match supervisor::run(&arguments, start_time_us) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("cofferdam-jailer: {error}");
            ExitCode::from(FAILURE)
        }
    }
}
