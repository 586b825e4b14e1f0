//! The container's root file system, in a mount namespace of its own.
//!
//! ```text
//! /                overlay: the layers (EROFS, read-only), above them what the container writes
//! /proc, /sys      what the kernel says; nothing can be set
//! /dev             null, zero, full, random, urandom, tty; read-only
//! /dev/pts         terminals
//! /dev/shm         memory
//! mounts           of the manifest, in its order
//! ```
//!
//! No device node that a layer has, or that the container makes, is one: `nodev`, everywhere but in `/dev`.

use std::fs::{DirBuilder, create_dir};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};

use cofferdam_container_manifest::{Manifest, Mount};
use cofferdam_container_protocol::step::{Object, Reason};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, fstat, makedev, mknodat, openat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_move,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot};

use crate::failure::{Failure, Reasoned, index};
use crate::paths;
use crate::verity::Verified;

/// Where the root file system is put together, and what it is made of.
const ROOT: &str = "/container";
const LAYERS: &str = "/layers";
const WRITTEN: &str = "/written";

/// How ext4 is mounted. Nothing that was not written is read ahead, or written by and by; and the order in which blocks reach
/// the disk does not matter, for nobody reads them after the end.
const EXT4: &std::ffi::CStr = c"noinit_itable,inode_readahead_blks=0,nobarrier";

/// Character devices of `/dev`: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// What could be set in `/proc`, as far as the kernel has it.
const SETTINGS: [&str; 5] = ["sys", "sysrq-trigger", "irq", "bus", "fs"];
/// Group of terminals.
const TTY: &str = "5";

const NO_PROGRAMS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
const DATA: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// What the root file system is made of.
pub struct Parts<'a> {
    /// What is to be where.
    pub manifest: &'a Manifest,
    /// Layers, then data volumes.
    pub devices: &'a [Verified],
    /// Node of the scratch device.
    pub scratch: Option<&'a str>,
}

/// Puts it together, and makes it the root of this process, in a mount namespace that is this process's own.
///
/// # Errors
/// If something cannot be mounted, or a path is none.
pub fn enter(parts: &Parts) -> Result<(), Failure> {
    let root = overlay(parts)?;
    let dev = pseudo_file_systems(&root)?;
    let mut volumes = parts.devices.iter().filter(|device| matches!(device.object, Object::Volume(_)));
    for (at, mount) in parts.manifest.mounts.iter().enumerate() {
        let object = Object::Mount(index(at));
        let volume = if matches!(mount, Mount::Data(_)) { volumes.next() } else { None };
        attach(&root, at, mount, volume).map_err(|failure| failure.of(object))?;
    }
    paths::make_folder(&root, &parts.manifest.process.cwd).because(Reason::PathRefused)?;
    restrict(&dev, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC)?;
    if parts.manifest.process.read_only_root {
        restrict(&root, MountFlags::RDONLY | MountFlags::NODEV)?;
    }
    leave(parts.manifest.layers.len()).because(Reason::MountFailed)
}

/// The overlay.
fn overlay(parts: &Parts) -> Result<OwnedFd, Failure> {
    let mut lower = String::new();
    let layers = parts.devices.iter().filter(|device| matches!(device.object, Object::Layer(_)));
    make(LAYERS)?;
    for (at, layer) in layers.enumerate() {
        let place = format!("{LAYERS}/{at}");
        make(&place)?;
        let flags = MountFlags::RDONLY | MountFlags::NODEV;
        let mounted = mount(layer.device.node(), &*place, "erofs", flags, None).because(Reason::MountFailed);
        mounted.map_err(|failure| failure.of(layer.object))?;
        // The highest first.
        lower = if at == 0 { place } else { format!("{place}:{lower}") };
    }
    make(WRITTEN)?;
    match parts.scratch {
        Some(node) => mount(node, WRITTEN, "ext4", MountFlags::NODEV, EXT4),
        None => mount("tmpfs", WRITTEN, "tmpfs", MountFlags::NODEV, c"mode=755"),
    }
    .because(Reason::MountFailed)?;
    let (upper, work) = (format!("{WRITTEN}/upper"), format!("{WRITTEN}/work"));
    // The root folder is that of the highest layer.
    let highest = lower.split(':').next().unwrap_or_default();
    let like = std::fs::metadata(highest).because(Reason::MountFailed)?;
    DirBuilder::new().mode(like.mode()).create(&upper).because(Reason::MountFailed)?;
    chown(&upper, Some(like.uid()), Some(like.gid())).because(Reason::MountFailed)?;
    rustix::fs::chmod(&*upper, Mode::from_raw_mode(like.mode())).because(Reason::MountFailed)?;
    make(&work)?;
    make(ROOT)?;
    let options = std::ffi::CString::new(format!("lowerdir={lower},upperdir={upper},workdir={work}"));
    let options = options.map_err(|_| Failure::new(Reason::MountFailed))?;
    mount("overlay", ROOT, "overlay", MountFlags::NODEV, &*options).because(Reason::MountFailed)?;
    paths::folder(ROOT).because(Reason::MountFailed)
}

/// A folder of this program's own, in its initial file system.
fn make(path: &str) -> Result<(), Failure> {
    create_dir(path).because(Reason::MountFailed)
}

/// `/proc`, `/sys` and `/dev`, which is returned, to be made read-only.
fn pseudo_file_systems(root: &OwnedFd) -> Result<OwnedFd, Failure> {
    let of = |at: u16| move |failure: Failure| failure.of(Object::FileSystem(at));
    let proc = file_system("proc", &[], NO_PROGRAMS).and_then(|proc| {
        place(root, "/proc", &proc)?;
        SETTINGS.iter().try_for_each(|name| freeze(&proc, name))?;
        Ok(())
    });
    proc.map_err(of(0))?;
    let sys = file_system("sysfs", &[], NO_PROGRAMS.union(MountAttrFlags::MOUNT_ATTR_RDONLY));
    sys.and_then(|sys| place(root, "/sys", &sys)).map_err(of(1))?;
    let options = [("mode", "755"), ("size", "65536")];
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
    let dev = file_system("tmpfs", &options, flags).map_err(of(2))?;
    place(root, "/dev", &dev).map_err(of(2))?;
    fill(&dev).because(Reason::MountFailed).map_err(of(2))?;
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", TTY)];
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
    file_system("devpts", &options, flags).and_then(|pts| place(root, "/dev/pts", &pts)).map_err(of(3))?;
    let shm = file_system("tmpfs", &[("mode", "1777")], NO_PROGRAMS);
    shm.and_then(|shm| place(root, "/dev/shm", &shm)).map_err(of(4))?;
    Ok(dev)
}

fn fill(dev: &OwnedFd) -> rustix::io::Result<()> {
    for (name, major, minor) in DEVICES {
        // The umask of a kernel's first process is 022.
        mknodat(dev, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))?;
        rustix::fs::chmodat(dev, name, Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty())?;
    }
    LINKS.iter().try_for_each(|(name, target)| symlinkat(*target, dev, *name))
}

/// A new file system, mounted nowhere yet.
fn file_system(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> Result<OwnedFd, Failure> {
    let made = || {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (name, value) in options {
            match *value {
                "" => fsconfig_set_flag(&context, *name)?,
                value => fsconfig_set_string(&context, *name, value)?,
            }
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
    };
    made().because(Reason::MountFailed)
}

/// Mounts it on `path`, which is made if it is missing.
fn place(root: &OwnedFd, path: &str, mounted: &OwnedFd) -> Result<(), Failure> {
    let folder = paths::make_folder(root, path).because(Reason::PathRefused)?;
    onto(mounted, &folder).because(Reason::MountFailed)
}

fn onto(mounted: &OwnedFd, folder: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mounted, "", folder, "", flags)
}

/// Gives this mount of a file system, which there is in a place already, just these flags.
fn restrict(mounted: &OwnedFd, flags: MountFlags) -> Result<(), Failure> {
    let path = format!("/proc/self/fd/{}", mounted.as_raw_fd());
    mount_remount(&*path, MountFlags::BIND | flags, "").because(Reason::MountFailed)
}

/// Makes a part of `/proc` read-only, if it is there.
fn freeze(proc: &OwnedFd, name: &str) -> Result<(), Failure> {
    let part = match openat(proc, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        part => part.because(Reason::MountFailed)?,
    };
    let copy = copy(&part).because(Reason::MountFailed)?;
    onto(&copy, &part).because(Reason::MountFailed)?;
    restrict(&copy, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)
}

/// A further mount of a place.
fn copy(place: impl AsFd) -> rustix::io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(place, "", flags)
}

/// Makes a mount of the manifest.
fn attach(root: &OwnedFd, at: usize, mount: &Mount, volume: Option<&Verified>) -> Result<(), Failure> {
    let folder = paths::make_folder(root, mount.path()).because(Reason::PathRefused)?;
    let below = fstat(&folder).because(Reason::MountFailed)?;
    let mounted = match (mount, volume) {
        (Mount::Data(_), Some(volume)) => {
            let node = volume.device.node();
            let flags = DATA.union(MountAttrFlags::MOUNT_ATTR_RDONLY);
            file_system("erofs", &[("source", &node), ("ro", "")], flags)?
        }
        // Each data volume has its device.
        (Mount::Data(_), None) => return Err(Failure::new(Reason::Missing)),
        (Mount::Tmpfs(tmpfs), _) => {
            let (size, mode) = (tmpfs.size.to_string(), format!("{:o}", below.st_mode & 0o7777));
            let (uid, gid) = (below.st_uid.to_string(), below.st_gid.to_string());
            let options = [("size", &*size), ("mode", &mode), ("uid", &uid), ("gid", &gid)];
            file_system("tmpfs", &options, DATA)?
        }
        (Mount::Scratch(_), _) => {
            let path = format!("{WRITTEN}/volume{at}");
            make(&path)?;
            chown(&path, Some(below.st_uid), Some(below.st_gid)).because(Reason::MountFailed)?;
            rustix::fs::chmod(&*path, Mode::from_raw_mode(below.st_mode & 0o7777))
                .because(Reason::MountFailed)?;
            let volume = paths::folder(&path).and_then(copy).because(Reason::MountFailed)?;
            onto(&volume, &folder).because(Reason::MountFailed)?;
            return restrict(&volume, MountFlags::NOSUID | MountFlags::NODEV);
        }
    };
    onto(&mounted, &folder).because(Reason::MountFailed)
}

/// Leaves what the container need not see, and makes its root file system the root.
fn leave(layers: usize) -> rustix::io::Result<()> {
    chdir(ROOT)?;
    // What is mounted of them stays in use.
    for at in 0..layers {
        unmount(format!("{LAYERS}/{at}"), UnmountFlags::DETACH)?;
    }
    for path in [WRITTEN, "/sys", "/proc", "/dev"] {
        unmount(path, UnmountFlags::DETACH)?;
    }
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")
}
