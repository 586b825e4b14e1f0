//! The life of the process that becomes the monitor: from a fork in new namespaces to the program, step by step
//! towards fewer rights. Nothing here is undone when a step fails: the process ends, and all goes with it.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Uid};
use rustix::io::{read, retry_on_intr, write};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::arguments::Arguments;
use crate::chroot::{self, ChrootError, View};
use crate::directory::Place;
use crate::landlock::{self, LandlockError};
use crate::limits::{self, LimitError};
use crate::namespaces::{self, NamespaceError};
use crate::privileges::{self, PrivilegeError};
use crate::{supervisor, sys};

/// Why the program does not run.
#[derive(Debug, thiserror::Error)]
pub enum InsideError {
    /// Namespaces.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// Mounts and devices.
    #[error(transparent)]
    Chroot(#[from] ChrootError),
    /// Resource limits.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// User and capabilities.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// Landlock.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// The tie to the supervisor.
    #[error("supervisor: {call}: {error}")]
    Supervisor {
        /// What was tried.
        call: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// The supervisor was killed.
    #[error("supervisor: it ended before its time")]
    Orphan,
    /// An inherited descriptor.
    #[error("exec: descriptor {fd}: {error}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// The program cannot be executed.
    #[error("exec: execveat {program}: {error}{}", hint(error))]
    Exec {
        /// Its path.
        program: String,
        /// What the kernel said.
        error: std::io::Error,
    },
}

fn hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => ": it has to be a static binary, there is no loader or interpreter in the jail",
        Some(libc::EACCES) => ": the user of --uid has to be allowed to execute it",
        _ => "",
    }
}

/// What the process reports when it is in a user namespace and has no ids there yet. No error begins so.
pub const ASK_FOR_IDS: u8 = 1;

/// What the process needs to know.
pub struct Plan<'a> {
    /// The command line.
    pub arguments: &'a Arguments,
    /// Where the jail is.
    pub place: &'a Place,
    /// The program.
    pub program: OwnedFd,
    /// Arguments of the program.
    pub command: Vec<CString>,
    /// Whether this is done in a user namespace by somebody who is not root.
    pub rootless: bool,
    /// Inherited descriptors to pass on.
    pub kept: &'a [RawFd],
    /// What the standard streams become, if not the caller's.
    pub null: Option<&'a OwnedFd>,
    /// A byte comes when all is ready outside, and another when the ids are; its end is the end of the supervisor.
    pub go: OwnedFd,
    /// Perhaps [`ASK_FOR_IDS`]; then closed by a successful exec, or an error's text.
    pub report: OwnedFd,
}

/// Becomes the program. If that fails, says why to the supervisor.
pub fn run(plan: &Plan<'_>) -> ! {
    let Err(error) = become_program(plan);
    let _ = write(&plan.report, error.to_string().as_bytes());
    sys::exit(crate::FAILURE)
}

fn become_program(plan: &Plan<'_>) -> Result<Infallible, InsideError> {
    let arguments = plan.arguments;
    die_with_supervisor()?;
    if retry_on_intr(|| read(&plan.go, &mut [0; 1])) != Ok(1) {
        return Err(InsideError::Orphan);
    }
    let (uid, gid) = (Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid));
    namespaces::complete(&arguments.id, arguments.netns.as_deref())?;
    chroot::enter(&View {
        root: &plan.place.root(),
        binds: &arguments.binds,
        devices: &arguments.devices,
        owner: (!plan.rootless).then_some((uid, gid)),
    })?;
    limits::apply(&arguments.limits)?;
    // As root this is done only now: all the steps before need rights in the host's own.
    if !plan.rootless && namespaces::enter_user()? {
        let asked = write(&plan.report, &[ASK_FOR_IDS]);
        if asked.is_err() || retry_on_intr(|| read(&plan.go, &mut [0; 1])) != Ok(1) {
            return Err(InsideError::Orphan);
        }
    }
    privileges::drop_all(uid, gid, !plan.rootless)?;
    // The change of user has undone it.
    die_with_supervisor()?;
    check_supervisor(&plan.go)?;
    landlock::restrict(&plan.program)?;
    if let Some(null) = plan.null {
        supervisor::to_null(null)
            .map_err(|error| InsideError::Supervisor { call: "dup2", error: error.into() })?;
    }
    for &fd in plan.kept {
        sys::set_close_on_exec(fd, false).map_err(|error| InsideError::Descriptor { fd, error })?;
    }
    let error = sys::execute(plan.program.as_fd(), &plan.command);
    Err(InsideError::Exec { program: arguments.exec_file.display().to_string(), error })
}

fn die_with_supervisor() -> Result<(), InsideError> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| InsideError::Supervisor { call: "prctl PR_SET_PDEATHSIG", error: error.into() })
}

/// The supervisor may have ended just before we asked to hear of it.
fn check_supervisor(go: &OwnedFd) -> Result<(), InsideError> {
    let mut fds = [PollFd::new(go, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match retry_on_intr(|| poll(&mut fds, Some(&now))) {
        Ok(0) => Ok(()),
        Ok(_) => Err(InsideError::Orphan),
        Err(error) => Err(InsideError::Supervisor { call: "poll", error: error.into() }),
    }
}

/// The program's arguments, which begin as those from Firecracker's jailer do.
pub fn command(
    arguments: &Arguments,
    name: &OsStr,
    start_time_us: u64,
) -> Result<Vec<CString>, std::ffi::NulError> {
    let start_time_us = start_time_us.to_string();
    let own =
        [name, "--id".as_ref(), arguments.id.as_ref(), "--start-time-us".as_ref(), start_time_us.as_ref()];
    let given = arguments.arguments.iter().map(|argument| argument.as_os_str());
    own.into_iter().chain(given).map(|word| CString::new(word.as_bytes())).collect()
}
