//! The jail's view of files: its own root directory, what was bound into it, and `/dev`.
//!
//! All mounts are made in a mount namespace that only the jailed process is in, so they end with it. They are
//! made by descriptor: a place in the jail is opened part by part without following a link or leaving the
//! mount, so that nothing that somebody left in the root directory can send a mount, or a directory made for
//! one, elsewhere. The old root is then not hidden but gone: pivot_root(2) and an unmount, not chroot(2).

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fstat, mkdirat, open, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use crate::arguments::Bind;
use crate::devices::{Device, DeviceError};
use crate::sys;

/// `AT_RECURSIVE` of open_tree(2), for which rustix has no name.
const RECURSIVE: OpenTreeFlags = OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE.cast_unsigned());

/// Why the jail has not the files that it should have.
#[derive(Debug, thiserror::Error)]
pub enum ChrootError {
    /// A call failed.
    #[error("chroot: {call} {path}: {error}")]
    Call {
        /// What was tried.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// Somebody has put a link, or another mount, where something is to be bound.
    #[error("chroot: --bind to /{inside}: {part:?} in the jail is a symbolic link, a mount, or no directory")]
    Diverted {
        /// The path in the jail.
        inside: PathBuf,
        /// The part of it.
        part: PathBuf,
    },
    /// A directory is to be bound to a file, or the other way round.
    #[error("chroot: --bind {host} to /{inside}: one is a directory, the other is not")]
    Kind {
        /// The path on the host.
        host: PathBuf,
        /// The path in the jail.
        inside: PathBuf,
    },
    /// A device cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What is to be seen in the jail.
pub struct View<'a> {
    /// The root directory, on the host.
    pub root: &'a Path,
    /// What is bound into it.
    pub binds: &'a [Bind],
    /// What is in `/dev`.
    pub devices: &'a [Device],
    /// Whom the devices belong to; `None` if this process may make no device nodes.
    pub owner: Option<(Uid, Gid)>,
}

/// Makes the view and enters it. To be called in a new mount namespace.
pub fn enter(view: &View<'_>) -> Result<(), ChrootError> {
    let slash = Path::new("/");
    mount_change(slash, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("mount MS_PRIVATE", slash))?;
    let root = mount_root(view.root)?;
    let dev = mount_dev(&root, view)?;
    if view.owner.is_none() {
        view.devices.iter().try_for_each(|device| bind(&root, &dev, &device.as_bind()))?;
    }
    view.binds.iter().try_for_each(|spec| bind(&root, &dev, spec))?;
    sys::restrict_mount(dev.as_fd(), u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), false)
        .map_err(failed("mount_setattr", Path::new("/dev")))?;
    pivot(&root, view.root)
}

/// Makes a mount of the root directory, so that it can become the root. What an administrator has mounted
/// beneath it comes along.
fn mount_root(path: &Path) -> Result<OwnedFd, ChrootError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(path, flags, Mode::empty()).map_err(failed("open", path))?;
    let root = clone_tree(&directory, path)?;
    attach(&root, &directory, path)?;
    Ok(root)
}

/// Mounts an empty file system on `dev` and, if that is allowed, makes the device nodes.
fn mount_dev(root: &OwnedFd, view: &View<'_>) -> Result<OwnedFd, ChrootError> {
    let path = Path::new("dev");
    let target = place(root.as_fd(), path, path, true)?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen tmpfs", path))?;
    for (key, value) in [("mode", "0755"), ("size", "64k"), ("nr_inodes", "64")] {
        fsconfig_set_string(&context, key, value).map_err(failed("fsconfig", path))?;
    }
    fsconfig_create(&context).map_err(failed("fsconfig", path))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount", path))?;
    if let Some((uid, gid)) = view.owner {
        for device in view.devices {
            device.make_node(dev.as_fd(), uid, gid)?;
        }
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&dev, "", &target, "", flags).map_err(failed("move_mount", path))?;
    Ok(dev)
}

/// Shows a file or directory of the host in the jail.
fn bind(root: &OwnedFd, dev: &OwnedFd, spec: &Bind) -> Result<(), ChrootError> {
    let host = &spec.host;
    let source = open(host, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open", host))?;
    let is_directory = |file: &OwnedFd, path: &Path| -> Result<bool, ChrootError> {
        let found = fstat(file).map_err(failed("stat", path))?;
        Ok(FileType::from_raw_mode(found.st_mode) == FileType::Directory)
    };
    let directory = is_directory(&source, host)?;
    // /dev is a mount, and a place is looked for without crossing one.
    let target = match spec.inside.strip_prefix("dev") {
        Ok(beneath) => place(dev.as_fd(), beneath, &spec.inside, directory)?,
        Err(_) => place(root.as_fd(), &spec.inside, &spec.inside, directory)?,
    };
    if is_directory(&target, &spec.inside)? != directory {
        return Err(ChrootError::Kind { host: host.clone(), inside: spec.inside.clone() });
    }
    let tree = clone_tree(&source, host)?;
    if !spec.writable {
        sys::restrict_mount(tree.as_fd(), u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), true)
            .map_err(failed("mount_setattr", host))?;
    }
    attach(&tree, &target, &spec.inside)
}

/// A copy of the mounts at `source`, attached nowhere, from which nothing gains privileges or is executed.
fn clone_tree(source: &OwnedFd, path: &Path) -> Result<OwnedFd, ChrootError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | RECURSIVE;
    let tree = open_tree(source, "", flags).map_err(failed("open_tree", path))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    sys::restrict_mount(tree.as_fd(), u64::from(attributes.bits()), true)
        .map_err(failed("mount_setattr", path))?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, target: &OwnedFd, path: &Path) -> Result<(), ChrootError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags).map_err(failed("move_mount", path))
}

/// Opens `path` beneath `from`, making what is missing: directories, and in the end a directory or an empty file.
fn place(from: BorrowedFd<'_>, path: &Path, inside: &Path, directory: bool) -> Result<OwnedFd, ChrootError> {
    let mut parts = path.iter().peekable();
    let mut at = part(from, OsStr::new("."), inside, true)?;
    while let Some(name) = parts.next() {
        at = part(at.as_fd(), name, inside, directory || parts.peek().is_some())?;
    }
    Ok(at)
}

/// One step of [`place`].
fn part(at: BorrowedFd<'_>, name: &OsStr, inside: &Path, directory: bool) -> Result<OwnedFd, ChrootError> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // Whether the last part is a directory, as it has to be, is seen to by the caller.
    let open_it = || openat2(at, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
    let found = match open_it() {
        Err(Errno::NOENT) => {
            make(at, name, directory).map_err(failed("make the mount point", inside))?;
            open_it()
        }
        other => other,
    };
    match found {
        Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => {
            Err(ChrootError::Diverted { inside: inside.to_owned(), part: name.into() })
        }
        other => other.map_err(failed("open in the jail", inside)),
    }
}

fn make(at: BorrowedFd<'_>, name: &OsStr, directory: bool) -> Result<(), Errno> {
    if directory {
        return mkdirat(at, name, Mode::from_raw_mode(0o755));
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::from_raw_mode(0o444)).map(drop)
}

/// Makes `root` the root, and lets go of the old one, which lies beneath it for a moment.
fn pivot(root: &OwnedFd, path: &Path) -> Result<(), ChrootError> {
    fchdir(root).map_err(failed("fchdir", path))?;
    pivot_root(".", ".").map_err(failed("pivot_root", path))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("umount the old root", Path::new("/")))?;
    chdir("/").map_err(failed("chdir", Path::new("/")))
}

fn failed<E: Into<std::io::Error>>(call: &'static str, path: &Path) -> impl FnOnce(E) -> ChrootError {
    let path = path.to_owned();
    move |error| ChrootError::Call { call, path, error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::CWD;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn place_in(root: &Path, path: &str, directory: bool) -> Result<OwnedFd, ChrootError> {
        let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        place(root.as_fd(), Path::new(path), Path::new(path), directory)
    }

    #[test]
    fn places_are_made_and_found_again() {
        let root = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            place_in(root.path(), "a/b/file", false).unwrap();
            place_in(root.path(), "a/c", true).unwrap();
        }
        assert!(root.path().join("a/b/file").is_file());
        assert!(root.path().join("a/c").is_dir());
    }

    #[test]
    fn links_that_somebody_planted_are_refused() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("file"), "").unwrap();
        symlink(outside.path(), root.path().join("out")).unwrap();
        symlink(outside.path().join("file"), root.path().join("last")).unwrap();
        symlink("nowhere", root.path().join("dangling")).unwrap();
        fs::write(root.path().join("plain"), "").unwrap();
        for path in ["out/file", "out/new", "last", "dangling", "plain/x"] {
            for directory in [false, true] {
                let result = place_in(root.path(), path, directory);
                assert!(matches!(result, Err(ChrootError::Diverted { .. })), "{path}: {result:?}");
            }
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
