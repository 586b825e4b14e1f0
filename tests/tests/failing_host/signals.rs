//! Signals at any moment of a domain's short life, to the command and to its monitor: in the end nothing runs, nothing
//! lies around, nothing is locked, and whoever is left says what happened.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_tests::host::{process_with, unique_id};
use cofferdam_tests::{Finished, Run, Running};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::payload;

/// From before the monitor runs to after the guest's end.
const MOMENTS: u32 = 18;
const STEP: Duration = Duration::from_micros(2500);
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// A folder with a drive, for one domain after the other.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::File::create(folder.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A domain that writes to the drive, listens on a socket and ends by itself after some milliseconds.
    fn run(&self) -> Run {
        payload("hello")
            .with("drive", format!("path={}", self.path("disk").display()))
            .with("vsock", self.path("v.sock"))
            .with("stop-timeout", "50ms")
            // Signals that whoever runs the tests ignores, as nohup(1) does, would stay ignored.
            .wrapped(["env", "--default-signal", &format!("TMPDIR={}", self.path("tmp").display())])
    }

    /// Sends `signal` to what `whom` finds, each time a step later, and checks what is left.
    fn rounds(&self, signal: Signal, whom: impl Fn(&Running) -> Option<Pid>, check: impl Fn(&Finished)) {
        for moment in 0..MOMENTS {
            let id = unique_id();
            let running = self.run().with("id", &id).start();
            thread::sleep(STEP * moment);
            if let Some(pid) = whom(&running) {
                // Who is gone already gets no signal.
                let _ = kill_process(pid, signal);
            }
            check(&running.finish());
            self.is_clean(&id);
        }
    }

    /// Nothing of domain `id` is left, and another one gets everything that it had.
    fn is_clean(&self, id: &str) {
        let end = Instant::now() + PATIENCE;
        while let Some(process) = process_with(id) {
            assert!(Instant::now() < end, "{} is still there", process.display());
            thread::sleep(Duration::from_millis(1));
        }
        let mut names: Vec<_> =
            fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["disk", "tmp"]);
        assert_eq!(fs::read_dir(self.path("tmp")).unwrap().count(), 0);
        let next = self.run().finish();
        assert_eq!(next.code(), 42, "{next}");
    }
}

fn command(running: &Running) -> Option<Pid> {
    Some(running.pid())
}

fn monitor(running: &Running) -> Option<Pid> {
    running.monitor()
}

/// The exit code and the line of JSON say the same thing, one of those that can be.
fn said(done: &Finished, may_be: &[(i32, ExitReason)]) {
    let outcome = done.outcome();
    assert!(may_be.contains(&(done.code(), outcome.exit_reason)), "{done}");
    assert_eq!(i32::from(outcome.process_exit_code()), done.code(), "{done}");
}

const ENDED: (i32, ExitReason) = (42, ExitReason::PowerOff);
const STOPPED: (i32, ExitReason) = (143, ExitReason::Stopped);
const LOST: (i32, ExitReason) = (124, ExitReason::MonitorError);

#[test]
fn a_stop_signal_to_the_command() {
    let place = Place::new();
    for signal in [Signal::TERM, Signal::INT] {
        place.rounds(signal, command, |done| {
            // Before it minds signals it has started nothing, and they just end it.
            if std::os::unix::process::ExitStatusExt::signal(&done.status) != Some(signal.as_raw()) {
                said(done, &[ENDED, STOPPED]);
            }
        });
    }
}

#[test]
fn a_kill_of_the_command() {
    Place::new().rounds(Signal::KILL, command, |_| {});
}

#[test]
fn a_stop_signal_to_the_monitor() {
    let place = Place::new();
    for signal in [Signal::TERM, Signal::INT] {
        place.rounds(signal, monitor, |done| {
            said(done, &[ENDED, STOPPED, LOST]);
            if done.code() == LOST.0 {
                let words = format!("killed by signal {}", signal.as_raw());
                assert!(done.outcome().message.contains(&words), "{done}");
            }
        });
    }
}

#[test]
fn a_kill_of_the_monitor() {
    Place::new().rounds(Signal::KILL, monitor, |done| {
        said(done, &[ENDED, LOST]);
        let killed = done.outcome().message.contains("killed by signal 9");
        assert_eq!(killed, done.code() == LOST.0, "{done}");
    });
}
