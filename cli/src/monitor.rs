//! The monitor as a child process.
//!
//! It gets its configuration in a memfd, serves its API on a socket and reports on a pipe, all inherited
//! by number. With them it gets its entry in the run directory, to be removed at its end if the command line is gone
//! by then, and the entry's lock, which it knows nothing of. It stands in a process group of its own: a Ctrl-C on a terminal
//! is for the command line, which passes it on as a request to stop.
//!
//! When the command line dies, kill -9 included, the kernel closes the reading
//! end of the report; the monitor sees that and stops its domain in order, as
//! it would for a signal. `PR_SET_PDEATHSIG` would be a second, worse way to
//! the same end: it is lost when the monitor changes its credentials, it
//! fires when the *thread* that started the monitor ends, and it comes too late
//! if the command line is gone before the monitor has asked for it.

use std::env;
use std::ffi::OsString;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The monitor's program.
const PROGRAM: &str = "cofferdam-vmm";

/// What a monitor is started with.
pub struct Launch<'a> {
    /// The program; `None` for the one beside this executable, else in PATH.
    pub program: Option<&'a Path>,
    /// The configuration, JSON.
    pub config: &'a [u8],
    /// Name of the domain.
    pub id: &'a str,
    /// When the command line began, microseconds of CLOCK_MONOTONIC.
    pub start_time_us: u64,
    /// Where its API is asked.
    pub api: UnixListener,
    /// Its entry in the run directory.
    pub entry: BorrowedFd<'a>,
    /// What it inherits beside that: the lock that it holds while it lives, and what its configuration names.
    pub inherited: &'a [BorrowedFd<'a>],
    /// Its standard input.
    pub stdin: Stdio,
    /// Its standard output.
    pub stdout: Stdio,
    /// Its standard error.
    pub stderr: Stdio,
}

/// A monitor that was started and not yet waited for.
pub struct Monitor {
    child: Child,
    /// Readable when the monitor has ended.
    pub pidfd: OwnedFd,
}

/// The ends of the pipes to a monitor that are kept here; none of them blocks.
pub struct Pipes {
    /// Its report.
    pub status: OwnedFd,
    /// Its standard input, if that is a pipe.
    pub stdin: Option<OwnedFd>,
    /// Its standard output, if that is a pipe.
    pub stdout: Option<OwnedFd>,
    /// Its standard error, if that is a pipe.
    pub stderr: Option<OwnedFd>,
}

impl Monitor {
    /// Starts a monitor. The error is a sentence for a person.
    pub fn start(launch: Launch<'_>) -> Result<(Self, Pipes), String> {
        let program = launch.program.map_or_else(default_program, |path| path.as_os_str().to_owned());
        Self::start_program(&program, launch)
            .map_err(|error| format!("cannot start the monitor {}: {error}", Path::new(&program).display()))
    }

    fn start_program(program: &OsString, launch: Launch<'_>) -> io::Result<(Self, Pipes)> {
        let config = config_file(launch.config)?;
        let (status, status_writer) = pipe_with(PipeFlags::CLOEXEC)?;
        set_nonblocking(&status)?;
        let own = [status_writer.as_fd(), launch.api.as_fd(), launch.entry];
        for inherited in own.iter().chain(launch.inherited) {
            fcntl_setfd(inherited, FdFlags::empty())?;
        }
        let mut child = Command::new(program)
            .arg("--config-file")
            .arg(format!("fd:{}", config.as_raw_fd()))
            .arg("--status-file")
            .arg(format!("fd:{}", status_writer.as_raw_fd()))
            .arg("--run-entry")
            .arg(format!("fd:{}", launch.entry.as_raw_fd()))
            .args(["--id", launch.id, "--level", "Warning", "--show-level"])
            .arg("--start-time-us")
            .arg(launch.start_time_us.to_string())
            .arg("--api-sock")
            .arg(format!("fd:{}", launch.api.as_raw_fd()))
            .stdin(launch.stdin)
            .stdout(launch.stdout)
            .stderr(launch.stderr)
            .process_group(0)
            .spawn()?;
        let monitor = pidfd(&child);
        let pipes = pipes(&mut child, status);
        match (monitor, pipes) {
            (Ok(pidfd), Ok(pipes)) => Ok((Self { child, pidfd }, pipes)),
            (Err(error), _) | (_, Err(error)) => {
                // Out of descriptors: a child that nobody can watch must not stay.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. One that has ended already takes none, which is no error.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Takes the exit status of a monitor that has ended.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// The program beside this executable; if there is none, the name that PATH is searched for.
fn default_program() -> OsString {
    let beside: Option<PathBuf> = env::current_exe().ok().map(|own| own.with_file_name(PROGRAM));
    beside.filter(|path| path.exists()).map_or_else(|| PROGRAM.into(), PathBuf::into_os_string)
}

/// A file without a name that holds `json`, and that a child inherits.
fn config_file(json: &[u8]) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(memfd_create("cofferdam-config", MemfdFlags::empty())?);
    file.write_all(json)?;
    file.rewind()?;
    Ok(file.into())
}

fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn pipes(child: &mut Child, status: OwnedFd) -> io::Result<Pipes> {
    let stdin = child.stdin.take().map(OwnedFd::from);
    let stdout = child.stdout.take().map(OwnedFd::from);
    let stderr = child.stderr.take().map(OwnedFd::from);
    for pipe in stdin.iter().chain(&stdout).chain(&stderr) {
        set_nonblocking(pipe)?;
    }
    Ok(Pipes { status, stdin, stdout, stderr })
}

fn set_nonblocking(pipe: &OwnedFd) -> io::Result<()> {
    Ok(fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?)
}
