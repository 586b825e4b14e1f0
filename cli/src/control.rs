//! The commands that ask a domain's monitor for something: stop, pause, resume, kill, wait.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::client::{Client, ClientError};
use cofferdam_api::status::{ExitReason, Outcome, Phases, VmState, VmStatus};
use serde_json::Value;
use thiserror::Error;

use crate::args::{KillArgs, StopArgs, Target, WaitArgs};
use crate::run::print_json;
use crate::run_dir::{Entry, RunDir, RunDirError};
use crate::say::{Tone, platform_name, print, protection, say};
use crate::supervise::GRACE;

/// How long a monitor may take for one answer: it is busy for seconds when the host is short of memory.
pub const ANSWER: Duration = Duration::from_secs(10);
/// Time between two looks at an entry that is about to go.
const LOOK: Duration = Duration::from_millis(5);

/// Why a command failed.
#[derive(Debug, Error)]
pub enum Failure {
    /// There is no such domain, or no run directory.
    #[error(transparent)]
    Place(#[from] RunDirError),
    /// The monitor has gone.
    #[error("domain {0} has ended")]
    Ended(String),
    /// The monitor did not do it, or did not answer.
    #[error("domain {id}: {error}")]
    Monitor {
        /// Name of the domain.
        id: String,
        /// What it answered.
        #[source]
        error: ClientError,
    },
    /// The domain does not end.
    #[error("domain {0} is asked to stop, but its monitor does not end")]
    Stays(String),
    /// Nothing is kept of what is asked for.
    #[error("{0}")]
    NotKept(String),
    /// There is nothing to run a command in.
    #[error("domain {0} has no container that `cofferdam run` has started")]
    NoContainer(String),
    /// A command cannot be served.
    #[error("domain {id}: cannot run a command in its container: {error}")]
    Here {
        /// Name of the domain.
        id: String,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// Nobody waits for a command any more.
    #[error("domain {0}: the command goes on without this one")]
    Left(String),
}

impl Failure {
    /// Says it, and returns the exit code.
    pub fn report(&self) -> u8 {
        say(Tone::Error, &self.to_string(), false);
        match self {
            Self::Place(_) | Self::Ended(_) | Self::NotKept(_) | Self::NoContainer(_) | Self::Here { .. } => {
                125
            }
            Self::Left(_) => ExitReason::Stopped.process_exit_code(None),
            Self::Monitor { .. } | Self::Stays(_) => 124,
        }
    }
}

/// A domain that lives, and its monitor.
pub struct Domain {
    /// Where its entry is.
    pub run_dir: RunDir,
    /// Its entry.
    pub entry: Entry,
    client: Client,
}

impl Domain {
    /// Finds the domain that was named.
    pub fn find(target: &Target) -> Result<Self, Failure> {
        let (run_dir, entry) = RunDir::find(&target.place.path(), &target.id)?;
        let client = Client::new(&entry.socket(), ANSWER);
        Ok(Self { run_dir, entry, client })
    }

    /// Asks its monitor.
    pub fn ask<T>(&self, what: impl FnOnce(&Client) -> Result<T, ClientError>) -> Result<T, Failure> {
        what(&self.client).map_err(|error| {
            let id = self.entry.id.clone();
            if error.is_gone() { Failure::Ended(id) } else { Failure::Monitor { id, error } }
        })
    }

    /// Waits until its entry has gone, so that its id is free.
    fn wait_until_gone(&self) -> Result<(), Failure> {
        let end = Instant::now().checked_add(GRACE);
        while self.run_dir.is_live(&self.entry)? {
            if end.is_some_and(|end| end < Instant::now()) {
                return Err(Failure::Stays(self.entry.id.clone()));
            }
            thread::sleep(LOOK);
        }
        // If its command was killed, the entry is left.
        self.run_dir.live()?;
        Ok(())
    }

    fn print_state(&self) -> Result<(), Failure> {
        let status = self.ask(Client::status)?;
        let platform = status.platform.map(|platform| format!(" on platform {}", platform_name(platform)));
        print(&format!(
            "domain {} is {}{}: {}\n",
            status.id,
            state_name(status.state),
            platform.unwrap_or_default(),
            protection(status.protected)
        ));
        Ok(())
    }
}

/// What a domain is doing, as people read it.
pub fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::NotStarted => "not started",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopped => "stopped",
    }
}

/// `cofferdam pause`.
pub fn pause(target: &Target) -> u8 {
    done(Domain::find(target).and_then(|domain| {
        domain.ask(Client::pause)?;
        domain.print_state()
    }))
}

/// `cofferdam resume`.
pub fn resume(target: &Target) -> u8 {
    done(Domain::find(target).and_then(|domain| {
        domain.ask(Client::resume)?;
        domain.print_state()
    }))
}

/// `cofferdam kill`.
pub fn kill(args: &KillArgs) -> u8 {
    done(
        Domain::find(&args.target)
            .and_then(|domain| domain.ask(|client| client.container_kill(&args.signal.to_string(), None))),
    )
}

/// The exit code of a command that was done, or failed.
pub fn done(result: Result<(), Failure>) -> u8 {
    result.map_or_else(|failure| failure.report(), |()| 0)
}

/// `cofferdam stop`.
pub fn stop(args: &StopArgs) -> u8 {
    done(Domain::find(&args.target).and_then(|domain| {
        let message = match stop_and_wait(&domain, args.timeout) {
            Ok(status) => status.message,
            // It was faster.
            Err(Failure::Ended(_)) => None,
            Err(failure) => return Err(failure),
        };
        domain.wait_until_gone()?;
        let message =
            message.unwrap_or_else(|| recorded(&args.target).unwrap_or_else(without_a_word).message);
        print(&format!("domain {}: {message}\n", domain.entry.id));
        Ok(())
    }))
}

fn stop_and_wait(domain: &Domain, timeout: Option<Duration>) -> Result<VmStatus, Failure> {
    let own = || domain.ask(Client::config).map(|config| stop_timeout(&config));
    let time = timeout.map_or_else(own, Ok)?;
    domain.ask(|client| client.stop(timeout))?;
    let status = domain.ask(|client| client.wait(Some(time.saturating_add(GRACE))))?;
    if status.state == VmState::Stopped { Ok(status) } else { Err(Failure::Stays(domain.entry.id.clone())) }
}

/// The time that a configuration gives the domain to power off.
fn stop_timeout(config: &Value) -> Duration {
    Duration::from_millis(config.get("stop_timeout_ms").and_then(Value::as_u64).unwrap_or_default())
}

/// `cofferdam wait`. Returns the exit code of the domain.
pub fn wait(args: &WaitArgs) -> u8 {
    match wait_for(&args.target) {
        Err(failure) => failure.report(),
        Ok(outcome) => {
            let code = outcome.process_exit_code();
            if args.json {
                print_json(&outcome, false);
            } else {
                let Outcome { message, protected, .. } = &outcome;
                let id = &args.target.id;
                print(&format!("domain {id}, {}: {message} (exit code {code})\n", protection(*protected)));
            }
            code
        }
    }
}

fn wait_for(target: &Target) -> Result<Outcome, Failure> {
    let domain = match Domain::find(target) {
        Err(failure @ Failure::Place(RunDirError::NotFound { .. })) => {
            return recorded(target).ok_or(failure);
        }
        found => found?,
    };
    let answer = match domain.ask(|client| client.wait(None)) {
        Ok(status) => Some(outcome(status)),
        Err(Failure::Ended(_)) => None,
        Err(failure) => return Err(failure),
    };
    let gone = domain.wait_until_gone();
    match answer.or_else(|| recorded(target)) {
        Some(outcome) => Ok(outcome),
        None => gone.map(|()| without_a_word()),
    }
}

/// How a domain ended, if that is kept.
fn recorded(target: &Target) -> Option<Outcome> {
    RunDir::record(&target.place.path(), &target.id)
}

fn outcome(status: VmStatus) -> Outcome {
    Outcome {
        platform: status.platform,
        protected: status.protected,
        identity: status.identity,
        container: status.container,
        // One that has stopped has a reason.
        exit_reason: status.exit_reason.unwrap_or(ExitReason::MonitorError),
        exit_code: status.exit_code,
        message: status.message.unwrap_or_default(),
        phases: status.phases,
    }
}

/// Of a monitor that was killed together with its command.
fn without_a_word() -> Outcome {
    Outcome {
        platform: None,
        protected: false,
        identity: Default::default(),
        container: None,
        exit_reason: ExitReason::MonitorError,
        exit_code: None,
        message: "the monitor ended without saying how".to_owned(),
        phases: Phases::new(),
    }
}
