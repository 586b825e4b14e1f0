//! The devices of the jail. Its `/dev` is a file system of its own, which nobody outside sees and which ends
//! with the jail.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, chownat, mknodat, stat};
use rustix::io::Errno;

use crate::arguments::Bind;

/// A device that a monitor may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// /dev/kvm: virtual machines
    Kvm,
    /// /dev/sev: the secure processor of AMD
    Sev,
}

/// Why a device is missing in the jail.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A call failed.
    #[error("devices: {call} {path}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: Errno,
    },
    /// It is something else on this host.
    #[error("devices: {path} is not a character device")]
    NoDevice {
        /// Its path on the host.
        path: PathBuf,
    },
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Sev => "sev",
        }
    }

    fn path(self) -> PathBuf {
        PathBuf::from("/dev").join(self.name())
    }

    /// Its path in the jail, relative to the root.
    pub fn inside(self) -> PathBuf {
        PathBuf::from("dev").join(self.name())
    }

    /// Makes a node of it in the jail's `/dev`, that only its user may open.
    pub fn make_node(self, dev: BorrowedFd<'_>, uid: Uid, gid: Gid) -> Result<(), DeviceError> {
        let path = self.path();
        let on_host =
            stat(&path).map_err(|error| DeviceError::Call { call: "stat", path: path.clone(), error })?;
        if FileType::from_raw_mode(on_host.st_mode) != FileType::CharacterDevice {
            return Err(DeviceError::NoDevice { path });
        }
        let call = |call| move |error| DeviceError::Call { call, path: self.inside(), error };
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(dev, self.name(), FileType::CharacterDevice, mode, on_host.st_rdev).map_err(call("mknod"))?;
        chownat(dev, self.name(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(call("chown"))
    }

    /// The host's own node, for a jail whose maker may make none.
    pub fn as_bind(self) -> Bind {
        Bind { host: self.path(), inside: self.inside(), writable: true }
    }
}
