//! `cofferdam run`: a domain from its configuration to its outcome.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::process::{self, Stdio};
use std::time::Duration;

use cofferdam_api::config::SerialMode;
use cofferdam_api::status::{Event, ExitReason, Outcome, Phases, Platform};

use crate::args::RunArgs;
use crate::console::{Keyboard, Messages, Screen, Target};
use crate::container::attached::caught;
use crate::container::side::Side;
use crate::container::start::Start;
use crate::detach::{self, Starter};
use crate::kept::Log;
use crate::monitor::{Launch, Monitor};
use crate::run_dir::{Facts, RunDir, RunDirError};
use crate::say::{Tone, running, say};
use crate::signals::{ENDS, Signals};
use crate::status::StatusReader;
use crate::supervise::{Ended, GRACE, Reached, Supervisor, log};
use crate::terminal::{Input, RawTerminal};

/// Runs a domain; `start_time_us` is when this process began. Returns the exit code.
pub fn run(args: &RunArgs, start_time_us: u64) -> u8 {
    let (name, ended) = match Start::new(&args.container) {
        Ok(container) if args.detach => return detach::run(args, container.as_ref(), start_time_us),
        Ok(container) => to_its_end(args, container.as_ref(), start_time_us, None),
        Err(error) => (None, never_began(error.to_string())),
    };
    report(name.as_deref(), &ended.outcome);
    if args.json {
        print_json(&ended.outcome, ended.line_is_open);
    }
    ended.outcome.process_exit_code()
}

/// A domain from its start to its end, and its name if it got that far. One in the background tells `starter` when it runs.
pub fn to_its_end(
    args: &RunArgs,
    container: Option<&Start>,
    start_time_us: u64,
    starter: Option<&mut Starter>,
) -> (Option<String>, Ended) {
    let result = args.domain_id(process::id()).and_then(|id| {
        let ended = execute(args, container, &id, start_time_us, starter)?;
        Ok((id, ended))
    });
    match result {
        Ok((id, ended)) => (Some(id), ended),
        Err(message) => (None, never_began(message)),
    }
}

fn never_began(message: String) -> Ended {
    Ended { outcome: refused(message), in_order: true, line_is_open: false }
}

/// The outcome of a domain that was refused before anything was started.
pub fn refused(message: String) -> Outcome {
    Outcome {
        platform: None,
        protected: false,
        identity: Default::default(),
        container: None,
        exit_reason: ExitReason::Config,
        exit_code: None,
        message,
        phases: Phases::new(),
    }
}

/// Prints `outcome` as a line of its own.
pub fn print_json(outcome: &Outcome, line_is_open: bool) {
    let start = if line_is_open { "\n" } else { "" };
    // Numbers, texts and maps with text keys always have a form in JSON.
    let json = serde_json::to_string(outcome).unwrap_or_default();
    let mut stdout = io::stdout().lock();
    // Who closed standard output does not want it; the exit code says it too.
    let _ = stdout.write_all(format!("{start}{json}\n").as_bytes()).and_then(|()| stdout.flush());
}

fn execute(
    args: &RunArgs,
    container: Option<&Start>,
    id: &str,
    start_time_us: u64,
    mut starter: Option<&mut Starter>,
) -> Result<Ended, String> {
    let in_domain = container.map(|container| container.in_domain(args, id)).transpose();
    let config = args.domain_config(in_domain.map_err(|error| error.to_string())?)?;
    let json = serde_json::to_vec(&config)
        .map_err(|error| format!("the configuration has no form in JSON: {error}"))?;
    let socket = config.vsock.as_ref().map(|vsock| Socket::before(vsock.uds_path.clone()));
    let caught = if container.is_some() { &caught()[..] } else { &ENDS[..] };
    let signals = Signals::catch(caught).map_err(|error| format!("cannot catch signals: {error}"))?;
    let words = |error: RunDirError| error.to_string();
    let entry = RunDir::open_or_make(&args.place.path()).and_then(|dir| dir.make_entry(id)).map_err(words)?;
    let background = starter.is_some();
    let beside = config.vsock.as_ref().map(|vsock| vsock.uds_path.as_path());
    let mut side = match container.zip(beside) {
        Some((container, beside)) => Some(Side::listen(container, beside, entry.entry(), background)?),
        None => None,
    };
    // The console of a container's domain is kept, and not shown.
    let on_stdio = config.serial.mode == SerialMode::Stdio;
    let input =
        if on_stdio && !background && container.is_none() { Input::look() } else { Input::Background };
    let terminal = match input {
        Input::Terminal => {
            Some(RawTerminal::enter().map_err(|error| format!("cannot set up the terminal: {error}"))?)
        }
        Input::File | Input::Background => None,
    };
    let raw = terminal.is_some();
    let mut inherited = vec![entry.as_fd()];
    inherited.extend(container.map(Start::inherited));
    let (monitor, pipes) = Monitor::start(Launch {
        program: args.vmm.as_deref(),
        config: &json,
        id,
        start_time_us,
        api: entry.listen().map_err(words)?,
        entry: entry.entry().dir.as_fd(),
        inherited: &inherited,
        stdin: match input {
            Input::Terminal => Stdio::piped(),
            Input::File => Stdio::inherit(),
            Input::Background => Stdio::null(),
        },
        stdout: if on_stdio { Stdio::piped() } else { Stdio::null() },
        stderr: if background { Stdio::piped() } else { Stdio::inherit() },
    })?;
    if let Some(side) = &mut side {
        side.process.streams.expect(monitor.id());
        side.process.wait_aloud();
    }
    // What can be done while the monitor starts is done now. Without facts `cofferdam ps` shows less.
    let _ = entry.begin(Facts::now(monitor.id()));
    let target = if background || container.is_some() { None } else { Some(Target::Stdout) };
    let dir = &entry.entry().dir;
    let screen = pipes.stdout.map(|pipe| Screen::new(Some(pipe), log(dir, Log::Console, raw), target));
    let messages = pipes.stderr.map(|pipe| Messages::new(pipe, log(dir, Log::Monitor, raw)));
    let supervisor = Supervisor {
        monitor,
        status: StatusReader::new(pipes.status),
        signals,
        keyboard: pipes.stdin.map(Keyboard::new),
        screen,
        container: side,
        messages,
        entry: Some(entry),
        raw,
        stop_timeout: Duration::from_millis(config.stop_timeout_ms),
        grace: GRACE,
    };
    let ended = supervisor.run(|reached| match (reached, &mut starter) {
        (Reached::Domain(platform, protected), None) if !args.quiet => {
            say_running(id, platform, protected, container.map(|container| &container.bound.digest), raw);
        }
        // Whoever waits for a container in the background wants to talk to it.
        (Reached::Domain(platform, protected), Some(starter)) if container.is_none() => {
            starter.tell(&Event::Running { platform, protected });
        }
        (Reached::Container(platform, protected), Some(starter)) => {
            starter.tell(&Event::Running { platform, protected });
        }
        _ => {}
    });
    // Back from raw mode, before anything is said.
    drop(terminal);
    if let (false, Some(socket)) = (ended.in_order, socket) {
        socket.remove_if_new();
    }
    Ok(ended)
}

/// Says that the domain runs, how it is protected, and what is in it if that is the container of a manifest with this
/// digest.
pub fn say_running(id: &str, platform: Platform, protected: bool, manifest: Option<&[u8; 32]>, raw: bool) {
    let tone = if protected { Tone::Plain } else { Tone::Warning };
    say(tone, &running(id, platform, protected, manifest), raw);
    if raw && io::stderr().is_terminal() {
        say(Tone::Plain, "Ctrl-A x stops the domain, Ctrl-A Ctrl-A sends a Ctrl-A", raw);
    }
}

/// Says how the domain ended, unless it powered itself off and found nothing wrong.
pub fn report(name: Option<&str>, outcome: &Outcome) {
    let code = outcome.process_exit_code();
    let tone = match outcome.exit_reason {
        // The code of a container's process says it.
        ExitReason::PowerOff if code == 0 || outcome.container.is_some() => return,
        ExitReason::PowerOff | ExitReason::Stopped => Tone::Plain,
        _ => Tone::Error,
    };
    let message = &outcome.message;
    match (name, outcome.exit_reason) {
        (Some(name), ExitReason::PowerOff) => {
            say(tone, &format!("domain {name}: {message} (exit code {code})"), false)
        }
        (Some(name), _) => say(tone, &format!("domain {name}: {message}"), false),
        (None, _) => say(tone, message, false),
    }
}

/// The vsock socket, which a monitor that was killed leaves behind.
struct Socket {
    path: PathBuf,
    /// Device and inode of what was there before: that is another domain's.
    before: Option<(u64, u64)>,
}

impl Socket {
    fn before(path: PathBuf) -> Self {
        let before = Self::look(&path);
        Self { path, before }
    }

    fn look(path: &PathBuf) -> Option<(u64, u64)> {
        let meta = std::fs::symlink_metadata(path).ok().filter(|meta| meta.file_type().is_socket())?;
        Some((meta.dev(), meta.ino()))
    }

    fn remove_if_new(&self) {
        let now = Self::look(&self.path);
        if now.is_some() && now != self.before {
            // Someone else may have been faster.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_a_new_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");

        let socket = Socket::before(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        Socket::before(path.clone()).remove_if_new();
        assert!(path.exists(), "it was there before");
        socket.remove_if_new();
        assert!(!path.exists());

        let socket = Socket::before(path.clone());
        std::fs::write(&path, "").unwrap();
        socket.remove_if_new();
        assert!(path.exists(), "no socket");
    }
}
