//! The monitor's start and life against `floor`, with the payload `first`, whose
//! first instruction marks user space and whose next powers off.
//!
//! Both processes are started alike, with the time before their start at hand,
//! and both note `CLOCK_MONOTONIC` when the port write arrives. They take turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use cofferdam_tests::place;
use serde_json::Value;

use crate::api::domain;
use crate::report::{Better, Row, Subject};
use crate::server::{self, now};
use crate::{Result, in_turns, programs, progress};

/// Memory of the guest, MiB; `floor` has the same.
pub const MEMORY: u64 = 128;
/// What the monitor may take besides guest memory, MiB.
const MEMORY_LIMIT: f64 = 2.5;
/// How often the memory is looked at.
const MEMORY_SAMPLES: usize = 5;

const FIRST_INSTRUCTION: Subject =
    Subject { name: "start to first guest instruction", unit: "ms", better: Better::Lower, goal: Some(1.5) };
const WHOLE_LIFE: Subject =
    Subject { name: "whole process life", unit: "ms", better: Better::Lower, goal: None };
const PEAK_MEMORY: Subject =
    Subject { name: "peak memory without guest pages", unit: "MiB", better: Better::Lower, goal: Some(1.0) };

/// Milliseconds of one run.
pub struct Times {
    /// From the start to the guest's first port write.
    pub first_instruction: f64,
    whole_life: f64,
}

/// Runs both `rounds` times in turns.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    progress(format_args!("{rounds} starts of the monitor and of floor, in turns"));
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let status = directory.path().join("status");
    let monitor = monitor(directory.path(), "first", &status)?;
    let ours = || {
        // Phases since 0 are times of the clock.
        measure(monitor.command().arg("--start-time-us=0"), &status, &["phases", "user_space"])
    };
    let theirs = || {
        let mut command = Command::new(programs::reference("floor"));
        measure(command.arg(place::payload("first")).arg(&status), &status, &["user_space"])
    };
    let (ours, theirs) = in_turns(rounds, ours, theirs)?;
    let column = |times: &[Times], of: fn(&Times) -> f64| times.iter().map(of).collect::<Vec<_>>();
    let mut rows = vec![
        (FIRST_INSTRUCTION, (|times| times.first_instruction) as fn(&Times) -> f64),
        (WHOLE_LIFE, |times| times.whole_life),
    ]
    .into_iter()
    .map(|(subject, of)| subject.row(&column(&ours, of), &column(&theirs, of), "floor"))
    .collect::<Vec<_>>();
    rows.push(memory(directory.path())?);
    Ok(rows)
}

/// How the monitor is started.
pub struct Monitor {
    program: PathBuf,
    config: PathBuf,
    status: PathBuf,
}

impl Monitor {
    /// With the configuration in this file.
    pub fn new(config: PathBuf, status: &Path) -> Self {
        Self { program: programs::monitor(), config, status: status.to_owned() }
    }

    /// The command, to which more may be added.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // That a guest powered off is no news here.
        command.args(["--level", "error"]);
        command.arg("--config-file").arg(&self.config).arg("--status-file").arg(&self.status);
        command
    }
}

fn monitor(directory: &Path, payload: &str, status: &Path) -> Result<Monitor> {
    let config = directory.join(format!("{payload}.json"));
    fs::write(&config, domain(payload, MEMORY).to_string())?;
    Ok(Monitor::new(config, status))
}

/// Runs `command` to its end. `mark` leads to the microsecond of user space in the last line of its status file.
pub fn measure(command: &mut Command, status: &Path, mark: &[&str]) -> Result<Times> {
    let _ = fs::remove_file(status);
    command.stdin(Stdio::null());
    let start = now();
    let code = command.status()?;
    let end = now();
    let last = last_line(status)?;
    if !code.success() {
        return Err(format!("{command:?}: {code}: {last}").into());
    }
    Ok(Times { first_instruction: milliseconds(&last, mark)? - start, whole_life: end - start })
}

/// The last line of a status file.
pub fn last_line(status: &Path) -> Result<Value> {
    let text = fs::read_to_string(status)?;
    Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
}

/// The microseconds to which `path` leads in a line of a status file, as milliseconds.
pub fn milliseconds(line: &Value, path: &[&str]) -> Result<f64> {
    let value = path.iter().try_fold(line, |value, name| value.get(name)).and_then(Value::as_f64);
    Ok(value.ok_or_else(|| format!("the guest did not mark user space: no {path:?} in {line}"))? / 1e3)
}

/// The peak of what the monitor itself occupies while a guest runs: the peak of its resident set (`VmHWM`) without
/// the shared memory in it (`RssShmem`), which is guest memory alone. Pages of its program file count in full,
/// though all monitors of a host share them.
fn memory(directory: &Path) -> Result<Row> {
    progress("memory of a running monitor");
    let status = directory.join("memory-status");
    let monitor = monitor(directory, "spin", &status)?;
    let samples: Result<Vec<f64>> = (0..MEMORY_SAMPLES)
        .map(|_| {
            let _ = fs::remove_file(&status);
            let mut child = monitor.command().stdin(Stdio::null()).spawn()?;
            let sample = sample_memory(child.id(), &status);
            child.kill()?;
            child.wait()?;
            sample
        })
        .collect();
    Ok(PEAK_MEMORY.row(&samples?, &[MEMORY_LIMIT], "the limit"))
}

fn sample_memory(pid: u32, status: &Path) -> Result<f64> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !fs::read_to_string(status).is_ok_and(|text| text.contains("running")) {
        if Instant::now() > deadline {
            return Err("the monitor does not run its guest".into());
        }
        sleep(Duration::from_millis(10));
    }
    sleep(Duration::from_millis(100));
    Ok(server::memory(pid, "VmHWM")? - server::memory(pid, "RssShmem")?)
}
