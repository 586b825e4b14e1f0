//! The namespaces of the jail: mount, PID, IPC, UTS, network, cgroup and user.
//!
//! For a caller who is not root the user namespace is what allows the others, so it is the first. For root it
//! is the last, in which only the jail's own user exists; the others belong to the host's, so that nothing the
//! jailed could gain in theirs would count there.
//!
//! A process that was forked into a PID namespace is its first, and the kernel kills all others in it when
//! that one ends. The cgroup namespace is made last, when the process is in the cgroup that is to be its root.

use std::ffi::c_int;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, getegid, geteuid};
use rustix::system::sethostname;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// Why the process is not in a namespace of its own.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A call failed.
    #[error("namespaces: {call} {path}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The fork into them failed.
    #[error("namespaces: clone3: {0}")]
    Fork(io::Error),
    /// The same, for a caller who is not root.
    #[error(
        "namespaces: clone3: {0}: this host lets nobody but root have user namespaces (see \
         /proc/sys/user/max_user_namespaces and kernel.unprivileged_userns_clone): run the jailer as root"
    )]
    User(io::Error),
    /// The user namespace could not be made.
    #[error("namespaces: unshare CLONE_NEWUSER: {0}")]
    EnterUser(io::Error),
    /// The cgroup namespace could not be made.
    #[error("namespaces: unshare CLONE_NEWCGROUP: {0}")]
    Cgroup(io::Error),
}

/// What to fork into.
fn flags(own_network: bool, rootless: bool) -> c_int {
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if own_network {
        flags |= libc::CLONE_NEWNET;
    }
    if rootless {
        flags |= libc::CLONE_NEWUSER;
    }
    flags
}

/// Forks into new namespaces.
pub fn fork(own_network: bool, rootless: bool) -> Result<sys::Side, NamespaceError> {
    sys::fork(flags(own_network, rootless)).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSPC) if rootless => NamespaceError::User(error),
        _ => NamespaceError::Fork(error),
    })
}

/// Enters a user namespace of its own, and says whether this host has them.
pub fn enter_user() -> Result<bool, NamespaceError> {
    match sys::unshare(libc::CLONE_NEWUSER) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSPC | libc::EPERM)) => {
            Ok(false)
        }
        Err(error) => Err(NamespaceError::EnterUser(error)),
    }
}

/// Says who the one user and the one group are that `pid` has in its user namespace: the same as on the host
/// or, if the caller is not root, the caller under another name.
pub fn map_ids(pid: Pid, uid: u32, gid: u32) -> Result<(), NamespaceError> {
    let directory = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let (own_uid, own_gid) = (geteuid(), getegid());
    let rootless = !own_uid.is_root();
    let (outer_uid, outer_gid) = if rootless { (own_uid.as_raw(), own_gid.as_raw()) } else { (uid, gid) };
    // The kernel wants this before it lets an unprivileged one map groups.
    let setgroups = rootless.then(|| ("setgroups", "deny".to_owned()));
    for (name, text) in setgroups
        .into_iter()
        .chain([("gid_map", format!("{gid} {outer_gid} 1")), ("uid_map", format!("{uid} {outer_uid} 1"))])
    {
        let path = directory.join(name);
        fs::write(&path, text).map_err(failed("write", &path))?;
    }
    Ok(())
}

/// The rest, from inside: the cgroup namespace, the host name, and a network namespace that there was before.
pub fn complete(id: &str, network: Option<&Path>) -> Result<(), NamespaceError> {
    if let Some(path) = network {
        let file: OwnedFd =
            open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open", path))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(failed("setns", path))?;
    }
    sys::unshare(libc::CLONE_NEWCGROUP).map_err(NamespaceError::Cgroup)?;
    sethostname(id.as_bytes()).map_err(failed("sethostname", Path::new(id)))
}

fn failed<E: Into<io::Error>>(call: &'static str, path: &Path) -> impl FnOnce(E) -> NamespaceError {
    let path = path.to_owned();
    move |error| NamespaceError::Call { call, path, error: error.into() }
}
