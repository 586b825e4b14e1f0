//! The supervisor: what the caller has started. It makes the jail, and lives until it is gone.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Gid, Mode, OFlags, Uid, open};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, geteuid, pidfd_send_signal, setsid, waitid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::time::{ClockId, clock_gettime};

use crate::arguments::Arguments;
use crate::cgroup::{CgroupError, Cgroups};
use crate::directory::Place;
use crate::inside::{self, ASK_FOR_IDS, Plan};
use crate::keeper::{Charge, Keeper, KeeperError};
use crate::namespaces::{self, NamespaceError};
use crate::sys::{self, Side};

/// Why there was no jail, or why it did not end well.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A call failed.
    #[error("supervisor: {call}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The program cannot be had.
    #[error("--exec-file {path}: {error}")]
    Program {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Its path has no name that a directory could have.
    #[error("--exec-file {path}: it is no file")]
    NoFile {
        /// Its path.
        path: PathBuf,
    },
    /// The base of the jails.
    #[error("--chroot-base-dir {path}: {error}")]
    Base {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
    /// A descriptor that is to be passed on is not open.
    #[error("descriptor {fd}: {error}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What the kernel said.
        error: io::Error,
    },
    /// An argument of the program has a NUL in it.
    #[error("ARGS: {0}")]
    Argument(#[from] std::ffi::NulError),
    /// The process that was to become the monitor says why it did not.
    #[error("{0}")]
    Inside(String),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Namespaces.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// Directory and clean-up.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
}

/// CLOCK_MONOTONIC in microseconds.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let micros = now.tv_sec.saturating_mul(1_000_000).saturating_add(now.tv_nsec / 1000);
    u64::try_from(micros).unwrap_or(0)
}

/// Runs the program in its jail, and returns its exit status when the jail is gone.
pub fn run(arguments: &Arguments, start_time_us: u64) -> Result<u8, SupervisorError> {
    let kept = arguments.kept_descriptors();
    close_all_but(&kept)?;
    if !arguments.daemonize {
        return run_here(arguments, start_time_us, &kept, None);
    }
    let (started, starts) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("pipe"))?;
    match sys::fork(0).map_err(failed("clone3"))? {
        Side::Child => {
            drop(started);
            let code = setsid()
                .map_err(failed("setsid"))
                .and_then(|_| run_here(arguments, start_time_us, &kept, Some(starts)))
                .unwrap_or_else(|error| {
                    eprintln!("cofferdam-jailer: {error}");
                    crate::FAILURE
                });
            sys::exit(code)
        }
        Side::Parent(..) => {
            drop(starts);
            let ran = retry_on_intr(|| read(&started, &mut [0; 1])) == Ok(1);
            // If not, the child has said why.
            Ok(if ran { 0 } else { crate::FAILURE })
        }
    }
}

/// Closes what the caller has left open by mistake, before anything of ours is opened.
fn close_all_but(kept: &[RawFd]) -> Result<(), SupervisorError> {
    let mut first = 3;
    for &fd in kept {
        sys::set_close_on_exec(fd, true).map_err(|error| SupervisorError::Descriptor { fd, error })?;
        if first < fd {
            sys::close_range(first, Some(fd - 1)).map_err(failed("close_range"))?;
        }
        first = fd.saturating_add(1);
    }
    sys::close_range(first, None).map_err(failed("close_range"))
}

/// Runs the program and waits for it. `starts` is told when it runs, for `--daemonize`.
fn run_here(
    arguments: &Arguments,
    start_time_us: u64,
    kept: &[RawFd],
    starts: Option<OwnedFd>,
) -> Result<u8, SupervisorError> {
    let signals =
        sys::take_signals(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP]).map_err(failed("signalfd"))?;
    let rootless = !geteuid().is_root();
    let (program, name) = open_program(arguments)?;
    let command = inside::command(arguments, &name, start_time_us)?;
    let place = Place { base: base(arguments)?, program: name.clone(), id: arguments.id.clone() };
    let cgroups = Cgroups::plan(
        &arguments.cgroups,
        arguments.cgroup_version,
        arguments.parent_cgroup.as_deref(),
        &name.to_string_lossy(),
        &arguments.id,
    )?;
    let null = starts.as_ref().map(|_| open_null()).transpose()?;
    let owner = (!rootless).then_some((Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid)));
    let charge = Charge { place: place.clone(), cgroups, owner, inherited: kept, null: null.as_ref() };
    let keeper = Keeper::start(&charge)?;
    let (go, goes) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("pipe"))?;
    let (reports, report) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("pipe"))?;
    let plan =
        Plan { arguments, place: &place, program, command, rootless, kept, null: null.as_ref(), go, report };
    let result = start(plan, &keeper, goes, reports).and_then(|monitor| {
        let told = detach(kept, null.as_ref(), starts);
        let code = wait(&monitor, &signals);
        told.and(code)
    });
    let finished = keeper.finish();
    let code = result?;
    finished?;
    Ok(code)
}

/// Forks the process that becomes the monitor, and sees it through to exec. When that fails, it is dead.
fn start(
    plan: Plan<'_>,
    keeper: &Keeper,
    goes: OwnedFd,
    reports: OwnedFd,
) -> Result<OwnedFd, SupervisorError> {
    let arguments = plan.arguments;
    let rootless = plan.rootless;
    let (pid, monitor) = match namespaces::fork(arguments.netns.is_none(), rootless)? {
        Side::Child => {
            // Else its own copy would hide the supervisor's end.
            drop((goes, reports));
            inside::run(&plan)
        }
        Side::Parent(pid, monitor) => (pid, monitor),
    };
    // The other side's ends of the pipes go with it.
    drop(plan);
    let result = release(arguments, rootless, keeper, pid, &goes, reports);
    if result.is_err() {
        let _ = pidfd_send_signal(&monitor, Signal::KILL);
        reap(&monitor)?;
    }
    result.map(|()| monitor)
}

/// Does what has to be done from outside, lets the process go on, and waits until it is the program.
fn release(
    arguments: &Arguments,
    rootless: bool,
    keeper: &Keeper,
    pid: Pid,
    goes: &OwnedFd,
    reports: OwnedFd,
) -> Result<(), SupervisorError> {
    keeper.admit(pid)?;
    if rootless {
        namespaces::map_ids(pid, arguments.uid, arguments.gid)?;
    }
    // If it is gone, its report ends without a word.
    let _ = write(goes, b"1");
    let mut reports = fs::File::from(reports);
    let mut first = [0];
    let mut text = String::new();
    match reports.read(&mut first).map_err(failed("read"))? {
        0 => {}
        _ if first == [ASK_FOR_IDS] => {
            namespaces::map_ids(pid, arguments.uid, arguments.gid)?;
            let _ = write(goes, b"1");
        }
        _ => text.push(char::from(first[0])),
    }
    reports.read_to_string(&mut text).map_err(failed("read"))?;
    if text.is_empty() { Ok(()) } else { Err(SupervisorError::Inside(text)) }
}

/// Lets go of what is the program's alone, and in the background of the caller too.
fn detach(kept: &[RawFd], null: Option<&OwnedFd>, starts: Option<OwnedFd>) -> Result<(), SupervisorError> {
    for &fd in kept {
        sys::close_range(fd, Some(fd)).map_err(failed("close_range"))?;
    }
    if let Some(null) = null {
        to_null(null).map_err(failed("dup2"))?;
    }
    if let Some(starts) = starts {
        write(&starts, b"1").map_err(failed("write"))?;
    }
    Ok(())
}

/// Makes the standard streams lead nowhere.
pub fn to_null(null: &OwnedFd) -> Result<(), Errno> {
    dup2_stdin(null)?;
    dup2_stdout(null)?;
    dup2_stderr(null)
}

/// Waits for the program's end, and passes on the signals that ask for it. Those of a terminal reach it anyway.
fn wait(monitor: &OwnedFd, signals: &OwnedFd) -> Result<u8, SupervisorError> {
    loop {
        let mut fds = [PollFd::new(monitor, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, None)).map_err(failed("poll"))?;
        let [ended, _] = fds;
        while let Some((signal, by_a_process)) = sys::next_signal(signals.as_fd()) {
            if let Some(signal) = Signal::from_named_raw(signal).filter(|_| by_a_process) {
                let _ = pidfd_send_signal(monitor, signal);
            }
        }
        if !ended.revents().is_empty() {
            return Ok(exit_code(reap(monitor)?));
        }
    }
}

fn reap(monitor: &OwnedFd) -> Result<Option<WaitIdStatus>, SupervisorError> {
    retry_on_intr(|| waitid(WaitId::PidFd(monitor.as_fd()), WaitIdOptions::EXITED)).map_err(failed("waitid"))
}

/// The exit status of a process that ended so, as a shell would give it.
fn exit_code(status: Option<WaitIdStatus>) -> u8 {
    let code = status.and_then(|status| {
        status.exit_status().or_else(|| status.terminating_signal().map(|signal| signal.saturating_add(128)))
    });
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::FAILURE)
}

/// Opens the program, so that it is executed and nothing that takes its place. Its name is that of the file
/// itself, not of a link to it.
fn open_program(arguments: &Arguments) -> Result<(OwnedFd, OsString), SupervisorError> {
    let path = &arguments.exec_file;
    let bad = |error: io::Error| SupervisorError::Program { path: path.clone(), error };
    let real = path.canonicalize().map_err(bad)?;
    let program =
        open(&real, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|error| bad(error.into()))?;
    match real.file_name() {
        Some(name) if real.is_file() => Ok((program, name.to_owned())),
        _ => Err(SupervisorError::NoFile { path: path.clone() }),
    }
}

/// The absolute path of the base, without a link in it; the directory is made if need be.
fn base(arguments: &Arguments) -> Result<PathBuf, SupervisorError> {
    let path = &arguments.chroot_base_dir;
    let bad = |error: io::Error| SupervisorError::Base { path: path.clone(), error };
    fs::create_dir_all(path).map_err(bad)?;
    path.canonicalize().map_err(bad)
}

fn open_null() -> Result<OwnedFd, SupervisorError> {
    open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open /dev/null"))
}

fn failed<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> SupervisorError {
    move |error| SupervisorError::Call { call, error: error.into() }
}
