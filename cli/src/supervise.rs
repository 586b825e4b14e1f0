//! One loop that waits for everything at once: the monitor's report and its
//! end, signals, the keyboard, the screen, and the time by which a monitor that
//! was asked to stop must have done so.
//!
//! A request to stop is a SIGTERM to the monitor, and it then presses the power
//! button; a second one stops the domain at once. The kernel merges signals that
//! are pending together, so the second one is repeated until the monitor ends. One
//! that does not end in time is killed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use cofferdam_api::status::{Event, ExitReason, Outcome, Phases, Platform};
use cofferdam_container_protocol::step::Step;
use rustix::event::PollFlags;
use rustix::process::Signal;

use crate::console::{Keyboard, Messages, Screen};
use crate::container::side::{Side, Wish};
use crate::kept::{Log, LogWriter};
use crate::monitor::Monitor;
use crate::run_dir::OwnEntry;
use crate::say::{Tone, running, say};
use crate::signals::Signals;
use crate::status::StatusReader;
use crate::streams::Happened;
use crate::wait::wait_for;

/// A good value for [`Supervisor::grace`]: the memory of a large domain takes seconds to free.
pub const GRACE: Duration = Duration::from_secs(30);
/// Time from the start of the domain until the run directory is swept: not when what is waited for is the guest.
const SWEEP: Duration = Duration::from_secs(1);
/// Exit status of a monitor that made a system call that its seccomp policy forbids.
const FORBIDDEN_CALL: i32 = 148;
/// Time between two requests to stop at once.
const REPEAT: Duration = Duration::from_millis(200);

/// What the loop waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Stream(Happened),
    Answer,
    Monitor,
    Status,
    Signals,
    Typed,
    ToMonitor,
    FromMonitor,
    Shown,
    Messages,
}

/// How urgently the monitor was asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Stop {
    No,
    InOrder,
    AtOnce,
}

/// A running monitor and everything that goes in and out of it.
pub struct Supervisor {
    /// The process.
    pub monitor: Monitor,
    /// Its report.
    pub status: StatusReader,
    /// Requests to stop.
    pub signals: Signals,
    /// What is typed, if that does not go straight to the monitor.
    pub keyboard: Option<Keyboard>,
    /// What is shown and kept, if the console is ours.
    pub screen: Option<Screen>,
    /// The container, if the domain has one.
    pub container: Option<Side>,
    /// What the monitor says, if that does not go straight to standard error.
    pub messages: Option<Messages>,
    /// The domain's entry, which is removed when the monitor has ended.
    pub entry: Option<OwnEntry>,
    /// Standard error is a terminal in raw mode.
    pub raw: bool,
    /// Time that the domain has after a press of its power button.
    pub stop_timeout: Duration,
    /// What the monitor may take beyond that, and after its last word.
    pub grace: Duration,
}

/// What runs, on which platform, and whether that protects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The domain.
    Domain(Platform, bool),
    /// The process of its container.
    Container(Platform, bool),
}

/// How it went.
pub struct Ended {
    /// How the domain ended.
    pub outcome: Outcome,
    /// Whether the monitor came to its own end and cleaned up.
    pub in_order: bool,
    /// Whether the screen shows a line without an end.
    pub line_is_open: bool,
}

/// What changes while the loop runs.
struct Progress {
    platform: Option<(Platform, bool)>,
    /// Whether the container runs.
    contained: bool,
    outcome: Option<Outcome>,
    stop: Stop,
    sweep_at: Option<Instant>,
    repeat_at: Option<Instant>,
    kill_at: Option<Instant>,
    killed: bool,
}

impl Supervisor {
    /// Waits until the monitor has ended. `running` is called when the domain runs, and when its container does.
    pub fn run(mut self, mut running: impl FnMut(Reached)) -> Ended {
        let mut progress = Progress {
            platform: None,
            contained: false,
            outcome: None,
            stop: Stop::No,
            sweep_at: Instant::now().checked_add(SWEEP),
            repeat_at: None,
            kill_at: None,
            killed: false,
        };
        let exit = loop {
            let ready = self.wait(progress.next_deadline());
            for &source in &ready {
                self.serve(source, &mut progress, &mut running);
            }
            self.on_time(&mut progress);
            if ready.contains(&Source::Monitor) {
                break self.monitor.wait();
            }
        };
        self.status.read(|event| progress.note(event, self.grace, &mut running));
        self.keep_the_rest();
        let in_order = progress.outcome.is_some() && exit.as_ref().is_ok_and(|exit| exit.signal().is_none());
        let outcome = match progress.outcome.take() {
            Some(outcome) => outcome,
            None => progress.without_a_word(exit, self.status.fault()),
        };
        // Before anything waits for whoever reads what is shown.
        if let Some(entry) = self.entry.take() {
            if progress.sweep_at.is_some() {
                entry.sweep();
            }
            entry.end(&outcome);
        }
        self.show_the_rest();
        if let Some(lost) = self.screen.as_ref().and_then(Screen::lost) {
            say(Tone::Warning, &format!("{lost} bytes of console output were lost"), self.raw);
        }
        let line_is_open = self.screen.as_ref().is_some_and(Screen::line_is_open)
            || self.container.as_ref().is_some_and(|container| container.process.streams.line_is_open());
        Ended { outcome, in_order, line_is_open }
    }

    /// Waits for the first thing to happen, until `deadline`.
    fn wait(&self, deadline: Option<Instant>) -> Vec<Source> {
        let stdin = io::stdin();
        let mut waits: Vec<(Source, BorrowedFd<'_>, PollFlags)> = vec![
            (Source::Signals, self.signals.as_fd(), PollFlags::IN),
            (Source::Monitor, self.monitor.pidfd.as_fd(), PollFlags::IN),
        ];
        if self.status.is_open() {
            waits.push((Source::Status, self.status.as_fd(), PollFlags::IN));
        }
        if let Some(keyboard) = &self.keyboard {
            if keyboard.listens() {
                waits.push((Source::Typed, stdin.as_fd(), PollFlags::IN));
            }
            if let Some(pipe) = keyboard.waits_for() {
                waits.push((Source::ToMonitor, pipe, PollFlags::OUT));
            }
        }
        if let Some(screen) = &self.screen {
            if let Some(target) = screen.shows_on() {
                waits.push((Source::Shown, target, PollFlags::OUT));
            }
            if let Some(pipe) = screen.waits_for() {
                waits.push((Source::FromMonitor, pipe, PollFlags::IN));
            }
        }
        if let Some(pipe) = self.messages.as_ref().and_then(Messages::waits_for) {
            waits.push((Source::Messages, pipe, PollFlags::IN));
        }
        if let Some(container) = &self.container {
            waits.push((Source::Answer, container.process.answers(), PollFlags::IN));
            let streams = container.process.streams.waits();
            waits.extend(
                streams.into_iter().map(|(happened, fd, flags)| (Source::Stream(happened), fd, flags)),
            );
        }
        wait_for(&waits, deadline)
    }

    fn serve(&mut self, source: Source, progress: &mut Progress, running: &mut impl FnMut(Reached)) {
        match source {
            // Waited for when everything else is served.
            Source::Monitor => {}
            Source::Status => {
                let ran = progress.platform.is_some();
                self.container.iter_mut().for_each(|container| container.process.hush());
                self.status.read(|event| progress.note(event, self.grace, running));
                if let (false, Some((platform, protected))) = (ran, progress.platform) {
                    self.note_running(platform, protected);
                }
                if let Some(container) = &mut self.container {
                    if progress.contained { container.runs() } else { container.process.wait_aloud() }
                }
            }
            Source::Signals => {
                for signal in self.signals.take() {
                    let wish =
                        self.container.as_mut().map_or(Wish::End, |container| container.signal(signal));
                    self.mind(wish, progress);
                }
            }
            Source::Stream(happened) => {
                self.container.iter_mut().for_each(|container| container.process.serve(happened))
            }
            Source::Answer => {
                let wish = self.container.as_mut().map_or(Wish::Nothing, Side::take_answers);
                self.mind(wish, progress);
            }
            Source::Typed => {
                if self.keyboard.as_mut().is_some_and(Keyboard::read) {
                    self.ask(Stop::AtOnce, progress);
                }
            }
            Source::ToMonitor => self.keyboard.iter_mut().for_each(Keyboard::write),
            Source::FromMonitor => {
                let result = self.screen.as_mut().map_or(Ok(()), Screen::read);
                self.mind_the_log(result);
            }
            Source::Shown => self.show(),
            Source::Messages => {
                self.messages.as_mut().map(Messages::read);
            }
        }
    }

    /// What a domain in the foreground says on standard error, one in the background keeps.
    fn note_running(&mut self, platform: Platform, protected: bool) {
        if let (Some(messages), Some(entry)) = (&mut self.messages, &self.entry) {
            let manifest = self.container.as_ref().map(Side::digest);
            messages.note(&running(&entry.entry().id, platform, protected, manifest));
        }
    }

    /// Shows a piece of what waits to be shown.
    fn show(&mut self) {
        if let Some(Err(error)) = self.screen.as_mut().map(Screen::write) {
            let message = format!("cannot write console output; it is dropped from here on: {error}");
            say(Tone::Warning, &message, self.raw);
        }
    }

    fn mind_the_log(&self, result: io::Result<()>) {
        if let Err(error) = result {
            not_kept(&error, self.raw);
        }
    }

    /// Does what a signal asks for, unless it was for the container.
    fn mind(&self, wish: Wish, progress: &mut Progress) {
        match wish {
            Wish::Nothing => {}
            Wish::End if progress.stop == Stop::No => self.ask(Stop::InOrder, progress),
            Wish::End => self.ask(Stop::AtOnce, progress),
        }
    }

    /// Asks the monitor to stop.
    fn ask(&self, stop: Stop, progress: &mut Progress) {
        self.monitor.signal(Signal::TERM);
        let now = Instant::now();
        let own_time = if stop == Stop::AtOnce { Duration::ZERO } else { self.stop_timeout };
        progress.kill_by(now.checked_add(own_time.saturating_add(self.grace)));
        if stop == Stop::AtOnce {
            progress.repeat_at = now.checked_add(REPEAT);
        }
        progress.stop = stop;
    }

    /// Does what is due.
    fn on_time(&self, progress: &mut Progress) {
        let now = Instant::now();
        if progress.sweep_at.take_if(|at| *at <= now).is_some() {
            self.entry.iter().for_each(OwnEntry::sweep);
        }
        if progress.repeat_at.is_some_and(|at| at <= now) {
            self.ask(Stop::AtOnce, progress);
        }
        if progress.kill_at.is_some_and(|at| at <= now) {
            self.monitor.signal(Signal::KILL);
            (progress.kill_at, progress.repeat_at, progress.killed) = (None, None, true);
        }
    }

    /// Takes what a monitor that has ended left in its pipes.
    fn keep_the_rest(&mut self) {
        // The second call goes on where an error of the log ended the first.
        for _ in 0..2 {
            let result = self.screen.as_mut().map_or(Ok(()), Screen::read_rest);
            self.mind_the_log(result);
        }
        while self.messages.as_mut().is_some_and(Messages::read) {}
        self.container.iter_mut().for_each(|container| container.process.take_the_rest());
    }

    /// Shows what waits to be shown, unless someone who does not read it makes us wait and a signal ends that.
    fn show_the_rest(&mut self) {
        loop {
            let mut waits = vec![(Source::Signals, self.signals.as_fd(), PollFlags::IN)];
            if let Some(stdout) = self.screen.as_ref().and_then(Screen::shows_on) {
                waits.push((Source::Shown, stdout, PollFlags::OUT));
            }
            if let Some(container) = &self.container {
                let streams = container.process.streams.pending().into_iter();
                waits.extend(streams.map(|(happened, fd, flags)| (Source::Stream(happened), fd, flags)));
            }
            if waits.len() == 1 {
                return;
            }
            for source in wait_for(&waits, None) {
                match source {
                    Source::Shown => self.show(),
                    Source::Stream(happened) => {
                        self.container.iter_mut().for_each(|container| container.process.serve(happened));
                    }
                    Source::Signals => return,
                    _ => {}
                }
            }
        }
    }
}

/// Says that there is no (more) log, which is no reason to end a domain.
pub fn not_kept(error: &io::Error, raw: bool) {
    say(Tone::Warning, &format!("cannot keep what `cofferdam logs` shows: {error}"), raw);
}

/// A log in the entry of a domain, unless the host refuses it.
pub fn log(entry: &OwnedFd, log: Log, raw: bool) -> Option<LogWriter> {
    LogWriter::new(entry, log).inspect_err(|error| not_kept(error, raw)).ok()
}

impl Progress {
    fn note(&mut self, event: Event, grace: Duration, running: &mut impl FnMut(Reached)) {
        match event {
            Event::Running { platform, protected } => {
                if self.platform.replace((platform, protected)).is_none() {
                    running(Reached::Domain(platform, protected));
                }
            }
            Event::Step { step } => {
                let runs = step == Step::Running.to_string();
                if let (true, false, Some((platform, protected))) = (runs, self.contained, self.platform) {
                    self.contained = true;
                    running(Reached::Container(platform, protected));
                }
            }
            Event::Stopped(outcome) => {
                self.outcome.get_or_insert(outcome);
                self.kill_by(Instant::now().checked_add(grace));
            }
        }
    }

    /// Kills the monitor at `at` if nothing was to kill it earlier.
    fn kill_by(&mut self, at: Option<Instant>) {
        if !self.killed {
            self.kill_at = self.kill_at.into_iter().chain(at).min();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.sweep_at.into_iter().chain(self.repeat_at).chain(self.kill_at).min()
    }

    /// The outcome of a monitor that ended without telling one.
    fn without_a_word(&self, exit: io::Result<ExitStatus>, fault: Option<&str>) -> Outcome {
        let signal = exit.as_ref().ok().and_then(ExitStatus::signal);
        if self.stop != Stop::No && self.platform.is_none() && signal == Some(Signal::TERM.as_raw()) {
            // It came before the monitor minded it, when nothing was started.
            return self.outcome(ExitReason::Stopped, "stopped by a signal before it ran".to_owned());
        }
        let how = match exit {
            _ if self.killed => "the monitor did not stop in time and was killed".to_owned(),
            Ok(exit) => match (exit.signal(), exit.code()) {
                (Some(signal), _) if signal == Signal::KILL.as_raw() => {
                    format!(
                        "the monitor was killed by signal {signal}, as by the kernel when memory is short"
                    )
                }
                (Some(signal), _) => format!("the monitor was killed by signal {signal}"),
                (None, Some(FORBIDDEN_CALL)) => {
                    "the monitor made a system call that its seccomp policy forbids; its messages name it"
                        .to_owned()
                }
                (None, code) => format!(
                    "the monitor exited with status {} without saying how the domain ended",
                    code.unwrap_or_default()
                ),
            },
            Err(error) => format!("the monitor was lost: {error}"),
        };
        let message = match fault {
            Some(fault) => format!("{how}; its report cannot be read: {fault}"),
            None => how,
        };
        self.outcome(ExitReason::MonitorError, message)
    }

    fn outcome(&self, exit_reason: ExitReason, message: String) -> Outcome {
        Outcome {
            platform: self.platform.map(|(platform, _)| platform),
            protected: self.platform.is_some_and(|(_, protected)| protected),
            identity: Default::default(),
            container: None,
            exit_reason,
            exit_code: None,
            message,
            phases: Phases::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Launch;
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    const RUNNING: &str = r#"echo '{"event":"running","platform":"plain","protected":false}' > $status"#;

    /// For monitors that do not end by themselves, and for those that do, on however busy a machine.
    const LITTLE: Duration = Duration::from_millis(100);
    const AMPLE: Duration = Duration::from_secs(300);

    /// Supervises a script that does not end by itself, with `grace`, and asks it to
    /// stop `at_once` times, and `ask` times once it runs.
    fn supervise(lines: &str, grace: Duration, at_once: usize, ask: usize) -> Ended {
        let folder = tempfile::tempdir().unwrap();
        let (text, script) = (folder.path().join("text"), folder.path().join("vmm"));
        std::fs::write(
            &text,
            format!("#!/bin/sh\nstatus=/proc/self/fd/${{4#fd:}}\n{lines}\nexec sleep 600\n"),
        )
        .unwrap();
        // A file that is open for writing, in a child of another test too, cannot be executed.
        assert!(Command::new("cp").args([&text, &script]).status().unwrap().success());
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (monitor, pipes) = Monitor::start(Launch {
            program: Some(&script),
            config: b"{}",
            id: "d",
            start_time_us: 0,
            api: UnixListener::bind(folder.path().join("api")).unwrap(),
            entry: File::open(folder.path()).unwrap().as_fd(),
            inherited: &[File::open("/dev/null").unwrap().as_fd()],
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::inherit(),
        })
        .unwrap();
        let (signals, pipe) = Signals::none();
        rustix::io::write(&pipe, &[15, 15][..at_once]).unwrap();
        let status = StatusReader::new(pipes.status);
        let (keyboard, screen, stop_timeout) = (None, None, Duration::from_millis(1));
        let (container, messages, entry, raw) = (None, None, None, false);
        let supervisor = Supervisor {
            monitor,
            status,
            signals,
            keyboard,
            screen,
            container,
            messages,
            entry,
            raw,
            stop_timeout,
            grace,
        };
        supervisor.run(|_| {
            rustix::io::write(&pipe, &[15, 15][..ask]).unwrap();
        })
    }

    #[test]
    fn a_monitor_that_does_not_stop_is_killed() {
        for asked in [1, 2] {
            let ended = supervise(&format!("trap '' TERM\n{RUNNING}"), LITTLE, 0, asked);
            assert_eq!(ended.outcome.message, "the monitor did not stop in time and was killed");
            assert_eq!(ended.outcome.exit_reason, ExitReason::MonitorError);
            assert!(!ended.in_order);
        }
    }

    #[test]
    fn a_monitor_that_stays_after_its_last_word_is_killed() {
        let stopped = r#"echo '{"event":"stopped","platform":null,"protected":false,"exit_reason":"panic","exit_code":null,"message":"m","phases":{}}' > $status"#;
        let ended = supervise(stopped, LITTLE, 0, 0);
        assert_eq!(ended.outcome.exit_reason, ExitReason::Panic);
        assert!(!ended.in_order);
    }

    #[test]
    fn a_request_that_comes_before_the_monitor_minds_it_is_no_error() {
        let ended = supervise("", AMPLE, 1, 0);
        assert_eq!(ended.outcome.exit_reason, ExitReason::Stopped);
        assert_eq!(ended.outcome.message, "stopped by a signal before it ran");
        assert!(!ended.in_order, "what is left is cleaned up");

        let ended = supervise(RUNNING, AMPLE, 0, 1);
        assert_eq!(ended.outcome.exit_reason, ExitReason::MonitorError);
        assert_eq!(ended.outcome.message, "the monitor was killed by signal 15");
    }
}
