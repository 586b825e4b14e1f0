//! The keeper: a process that makes the jail's directory and cgroups, and removes them.
//!
//! Three processes run for a jail: the supervisor, which is what the caller has started, the monitor, its
//! child, and the keeper, another child of it. The supervisor waits for the monitor; the keeper waits for the
//! supervisor. Whichever is killed, with whatever signal:
//!
//! - the monitor: the supervisor sees its end, tells the keeper, and waits until it has cleaned up;
//! - the supervisor: the kernel kills the monitor (`PR_SET_PDEATHSIG`), and the keeper, whose socket to the
//!   supervisor ends, does so too, waits for its end, and cleans up;
//! - the keeper: the supervisor sees that in the end, and cleans up itself.
//!
//! If all are killed at once, the kernel takes back mounts and namespaces, and the next jail of the same id
//! removes the rest before it begins ([`crate::directory`]). The keeper is forked before anything is made, and
//! makes it, so there is no moment at which something exists that nobody is going to remove.
//!
//! On the socket, a `SOCK_SEQPACKET`: the keeper answers an empty message or an error's text when the jail's
//! directory is there; the supervisor sends the monitor's process id, and the keeper answers likewise when it
//! is in its cgroups. Then it waits for the socket's end. Its exit status is 0 if it could remove all.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Gid, Uid};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, chdir, pidfd_open, pidfd_send_signal, setsid, waitid,
};

use crate::cgroup::{CgroupError, Cgroups};
use crate::directory::{Claim, DirectoryError, Place};
use crate::supervisor;
use crate::sys::{self, Side};

/// Longest message of an error.
const MAX_MESSAGE: usize = 8192;

/// What failed at the keeper or on the way to it.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// It could not be started or asked.
    #[error("keeper: {call}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// It says what went wrong.
    #[error("{0}")]
    Refused(String),
    /// It was killed.
    #[error("keeper: it ended before its time")]
    Gone,
    /// What it made could not be removed.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What the keeper keeps.
pub struct Charge<'a> {
    /// The jail's directory.
    pub place: Place,
    /// Its cgroups.
    pub cgroups: Cgroups,
    /// Whose the root directory is, unless the caller's.
    pub owner: Option<(Uid, Gid)>,
    /// The descriptors that are the monitor's alone.
    pub inherited: &'a [RawFd],
    /// What the keeper's standard streams become, if not the caller's.
    pub null: Option<&'a OwnedFd>,
}

/// The supervisor's side.
pub struct Keeper {
    socket: OwnedFd,
    process: OwnedFd,
    place: Place,
}

impl Keeper {
    /// Starts the keeper, which begins to make directory and cgroups.
    pub fn start(charge: &Charge<'_>) -> Result<Self, KeeperError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(failed("socketpair"))?;
        match sys::fork(0).map_err(failed("clone3"))? {
            Side::Child => {
                drop(ours);
                let result = keep(charge, &theirs);
                if let Err(error) = &result {
                    eprintln!("cofferdam-jailer: clean-up: {error}");
                }
                sys::exit(u8::from(result.is_err()))
            }
            Side::Parent(_, process) => {
                drop(theirs);
                Ok(Self { socket: ours, process, place: charge.place.clone() })
            }
        }
    }

    /// Waits until directory and cgroups are there, and puts the monitor into them and under the keeper's eyes.
    pub fn admit(&self, pid: Pid) -> Result<(), KeeperError> {
        self.answer()?;
        write(&self.socket, &pid.as_raw_nonzero().get().to_ne_bytes()).map_err(|_| KeeperError::Gone)?;
        self.answer()
    }

    /// Has everything removed. The monitor is dead, and the caller has waited for it.
    pub fn finish(self) -> Result<(), KeeperError> {
        drop(self.socket);
        let status = retry_on_intr(|| waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED))
            .map_err(failed("waitid"))?;
        match status {
            // It has said itself what it could not remove.
            Some(status) if status.exited() => Ok(()),
            _ => Ok(Claim::new(&self.place)?.release()?),
        }
    }

    fn answer(&self) -> Result<(), KeeperError> {
        let mut buffer = [0; MAX_MESSAGE];
        // An empty message cannot be told from the end, so each answer begins with a byte.
        match retry_on_intr(|| read(&self.socket, &mut buffer)) {
            Ok(0) | Err(_) => Err(KeeperError::Gone),
            Ok(1) => Ok(()),
            Ok(length) => {
                let text = buffer.get(1..length).unwrap_or_default();
                Err(KeeperError::Refused(String::from_utf8_lossy(text).into_owned()))
            }
        }
    }
}

/// The keeper's life.
fn keep(charge: &Charge<'_>, socket: &OwnedFd) -> Result<(), KeeperError> {
    // Out of reach of the terminal's signals; those to stop were blocked by the supervisor.
    setsid().map_err(failed("setsid"))?;
    chdir("/").map_err(failed("chdir"))?;
    for &fd in charge.inherited {
        sys::close_range(fd, Some(fd)).map_err(failed("close_range"))?;
    }
    if let Some(null) = charge.null {
        supervisor::to_null(null).map_err(failed("dup2"))?;
    }
    let mut claim = match Claim::new(&charge.place) {
        Ok(claim) => claim,
        Err(error) => return answer(socket, Err(&error.into())),
    };
    let furnished = claim
        .furnish(charge.cgroups.directories(), charge.owner)
        .map_err(KeeperError::from)
        .and_then(|()| Ok(charge.cgroups.create()?));
    answer(socket, furnished.as_ref().copied())?;
    let monitor = watch(charge, &claim, socket);
    if let Some(monitor) = monitor {
        let _ = pidfd_send_signal(&monitor, Signal::KILL);
        wait_until(monitor.as_fd(), PollFlags::IN)?;
    }
    Ok(claim.release()?)
}

/// Admits the monitor and waits for the end of the supervisor, or for its word. Returns the monitor.
fn watch(charge: &Charge<'_>, claim: &Claim, socket: &OwnedFd) -> Option<OwnedFd> {
    let mut buffer = [0; 4];
    if retry_on_intr(|| read(socket, &mut buffer)) != Ok(buffer.len()) {
        return None;
    }
    let pid = Pid::from_raw(i32::from_ne_bytes(buffer))?;
    // The supervisor has not waited for it, so the number is still its own.
    let admitted = pidfd_open(pid, PidfdFlags::empty()).map_err(failed("pidfd_open")).and_then(|monitor| {
        charge.cgroups.admit(pid)?;
        claim.note_process(pid)?;
        Ok(monitor)
    });
    let _ = answer(socket, admitted.as_ref().map(|_| ()));
    let _ = wait_until(socket.as_fd(), PollFlags::empty());
    admitted.ok()
}

fn answer(socket: &OwnedFd, result: Result<(), &KeeperError>) -> Result<(), KeeperError> {
    let text = result.err().map(ToString::to_string).unwrap_or_default();
    let message = [b"\0", text.as_bytes().get(..MAX_MESSAGE - 1).unwrap_or(text.as_bytes())].concat();
    // A supervisor that is gone is noticed when waiting for it.
    match write(socket, &message) {
        Ok(_) | Err(Errno::PIPE) => Ok(()),
        Err(error) => Err(failed("send")(error)),
    }
}

/// Waits for `event`, or for the other side's end.
fn wait_until(fd: BorrowedFd<'_>, event: PollFlags) -> Result<(), KeeperError> {
    let mut fds = [PollFd::from_borrowed_fd(fd, event)];
    retry_on_intr(|| poll(&mut fds, None)).map(drop).map_err(failed("poll"))
}

fn failed<E: Into<std::io::Error>>(call: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |error| KeeperError::Call { call, error: error.into() }
}
