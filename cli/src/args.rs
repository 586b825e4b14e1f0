//! The command line.

mod run;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use cofferdam_container_manifest::Signal;

pub use self::run::RunArgs;
use crate::container::ContainerCommand;
use crate::container::args::parse_signal;
use crate::image::ImageCommand;
use crate::run_dir;
use crate::units::parse_time;

/// Runs each workload in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "cofferdam", version, after_help = TOP_EXAMPLES, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// `cofferdam run` by itself.
#[derive(Debug, Parser)]
#[command(name = "cofferdam-run", bin_name = "cofferdam run", version, about = RUN_ABOUT)]
struct RunOnly {
    #[command(flatten)]
    args: RunArgs,
}

const RUN_ABOUT: &str = "Start a domain, show its console, and wait until it ends";

/// Understands the command line of this process. A start is what people wait for, so `run` is tried without the
/// definitions of all other commands: building them would cost a start some 50 µs.
pub fn parse() -> Result<Command, clap::Error> {
    let mut words = std::env::args_os().skip(1).peekable();
    if words.peek().is_some_and(|word| word == "run") {
        return RunOnly::try_parse_from(words).map(|run| Command::Run(Box::new(run.args)));
    }
    Cli::try_parse().map(|cli| cli.command)
}

const TOP_EXAMPLES: &str = "\
Examples:
  cofferdam host check                     What can this machine do?
  cofferdam run --kernel vmlinuz --initrd initrd.img
                                           Boot a Linux kernel, its console on this terminal
  cofferdam run --container oci:python:3.13 -- python3 -c 'print(1)'
                                           A container in a domain of its own
  cofferdam run --detach ... ; cofferdam ps
                                           In the background; what runs?
  cofferdam run --help                     All options, more examples, exit codes";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(about = RUN_ABOUT)]
    Run(Box<RunArgs>),
    /// List the domains that run
    Ps(PsArgs),
    /// Print all that is known of a domain, as JSON
    Inspect(Target),
    /// Print what a domain has printed on its console, or its container
    Logs(LogsArgs),
    /// Run a command in a container that runs, as its manifest allows
    Exec(ExecArgs),
    /// Send a signal to a container's process, as its manifest allows
    Kill(KillArgs),
    /// Print what a container uses
    Stats(StatsArgs),
    /// Press the power button of a domain, and wait for its end
    Stop(StopArgs),
    /// Hold the CPUs of a domain
    Pause(Target),
    /// Let the CPUs of a paused domain run again
    Resume(Target),
    /// Wait until a domain ends, and exit with its exit code
    Wait(WaitArgs),
    /// Image files: made, looked into, measured, signed
    #[command(subcommand)]
    Image(Box<ImageCommand>),
    /// Container images, made ready for domains
    #[command(subcommand)]
    Container(Box<ContainerCommand>),
    /// Questions about this machine
    #[command(subcommand)]
    Host(HostCommand),
}

/// Where domains are found.
#[derive(Debug, Args)]
pub struct Place {
    /// Where the entries of domains are [default: $COFFERDAM_RUN_DIR, else by user]
    ///
    /// Without both it is /run/cofferdam for root, $XDG_RUNTIME_DIR/cofferdam for other users, and
    /// /tmp/cofferdam-<user id> for those who have no such directory. It is made if need be, and refused if others
    /// can enter it.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl Place {
    /// The path of the run directory.
    pub fn path(&self) -> PathBuf {
        run_dir::locate(self.run_dir.as_deref())
    }
}

/// A domain that runs.
#[derive(Debug, Args)]
#[command(after_help = CONTROL_CODES)]
pub struct Target {
    /// Name of the domain, as `cofferdam ps` shows it
    pub id: String,
    /// Where to look for it.
    #[command(flatten)]
    pub place: Place,
}

const CONTROL_CODES: &str = "\
Exit codes:
  0    done
  124  the monitor or the guest refuses, does not answer or does not end
  125  there is no such domain, or it has just ended";

/// `cofferdam ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print one JSON array: an object per domain
    #[arg(long)]
    pub json: bool,
    /// Where to look.
    #[command(flatten)]
    pub place: Place,
}

const LOGS_CODES: &str = "\
Exit codes:
  0    done
  125  there is no such domain, or nothing is kept of what is asked for";

/// `cofferdam logs`.
#[derive(Debug, Args)]
#[command(after_help = LOGS_CODES)]
pub struct LogsArgs {
    /// Go on until the domain ends
    #[arg(short, long)]
    pub follow: bool,
    /// What is on the console of a container's domain, instead of what the container has printed
    #[arg(long, conflicts_with = "monitor")]
    pub console: bool,
    /// What the monitor had to say instead; kept for domains started with --detach
    #[arg(long)]
    pub monitor: bool,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
}

/// `cofferdam exec`.
#[derive(Debug, Args)]
#[command(after_help = EXEC_CODES)]
pub struct ExecArgs {
    /// Let the command read standard input, if the manifest grants that (host.stdin)
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal, with standard input, if the manifest grants that (host.stdin)
    #[arg(short, long)]
    pub tty: bool,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
    /// Program and arguments, exactly as the manifest allows them (host.exec)
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

const EXEC_CODES: &str = "\
Exit code: that of the command, 128 and its number after a signal; else
  124  the manifest, the guest or the monitor refuses, or does not answer
  125  there is no such domain, or no container in it
  143  a second signal, after which nobody waits for the command";

/// `cofferdam kill`.
#[derive(Debug, Args)]
pub struct KillArgs {
    /// The signal, with or without SIG
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM", value_parser = parse_signal)]
    pub signal: Signal,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
}

/// `cofferdam stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
}

/// `cofferdam stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Time until a hard stop, 0 for at once [default: its --stop-timeout]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub timeout: Option<Duration>,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
}

const WAIT_CODES: &str = "\
Exit code: that of `cofferdam run`; 124 also if the monitor does not answer,
125 also if there is no such domain.";

/// `cofferdam wait`.
#[derive(Debug, Args)]
#[command(after_help = WAIT_CODES)]
pub struct WaitArgs {
    /// Print the end as one line of JSON, as `cofferdam run --json` does
    #[arg(long)]
    pub json: bool,
    /// Which domain.
    #[command(flatten)]
    pub target: Target,
}

/// The commands about the host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List what this machine can do, why not, and what would change that
    #[command(after_help = "Exit code: 0 if a plain domain can run here, 125 if not.")]
    Check {
        /// Print one JSON object: `checks` (name, ok, reason, remedy) and `platforms`
        #[arg(long)]
        json: bool,
    },
}

#[cfg(test)]
mod tests;
