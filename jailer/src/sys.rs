//! System calls that have no safe wrapper in the crates we use.
#![allow(unsafe_code)] // raw system calls, and a process that becomes two
//!
//! The jailer has one thread, so a child may go on with everything that its parent had, the heap included.

use std::ffi::{CString, c_int, c_long, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::Pid;

/// Which side of a fork this is.
pub enum Side {
    /// The new process.
    Child,
    /// The old one: the new one's id, and a descriptor of it.
    Parent(Pid, OwnedFd),
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// fork(2) into the new namespaces that `namespaces` (`CLONE_NEW…`) says.
pub fn fork(namespaces: c_int) -> io::Result<Side> {
    let mut pidfd: c_int = -1;
    let arguments = CloneArgs {
        flags: u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned()),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM and with no stack of its own this is a fork: the child gets a copy of this
    // process, whose only thread this is, and goes on here.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArgs>()) };
    match pid {
        0 => Ok(Side::Child),
        -1 => Err(io::Error::last_os_error()),
        pid => {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
            // SAFETY: the kernel has made this descriptor for us.
            Ok(Side::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
    }
}

/// Ends this process without running anything of its parent's.
pub fn exit(code: u8) -> ! {
    // SAFETY: does not return, and touches no memory.
    unsafe { libc::_exit(c_int::from(code)) }
}

/// Executes the program that `file` is, with an empty environment. Returns only an error.
pub fn execute(file: BorrowedFd<'_>, arguments: &[CString]) -> io::Error {
    let mut argv: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    argv.push(ptr::null());
    let environment = [ptr::null::<libc::c_char>()];
    // SAFETY: both lists end with a null, and their strings live through the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Closes all descriptors from `first` to `last`, both included.
pub fn close_range(first: RawFd, last: Option<RawFd>) -> io::Result<()> {
    let last = last.map_or(c_uint::MAX, i32::cast_unsigned);
    // SAFETY: called before the jailer has descriptors of its own, or on those that it has inherited and
    // never wraps in an owning type.
    check(unsafe { libc::syscall(libc::SYS_close_range, first.cast_unsigned(), last, 0) })
}

/// Says whether the inherited descriptor `fd` is closed on exec; fails if it is not open.
pub fn set_close_on_exec(fd: RawFd, close: bool) -> io::Result<()> {
    // SAFETY: changes a flag of a descriptor, and fails on a number that is none.
    let done = unsafe { libc::fcntl(fd, libc::F_SETFD, if close { libc::FD_CLOEXEC } else { 0 }) };
    check(c_long::from(done))
}

/// Attributes of the mount `mount` and, if `recursive`, of those beneath it that are set (`MOUNT_ATTR_…`).
pub fn restrict_mount(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attr = MountAttr { set: attributes, clear: 0, propagation: 0, user_namespace: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: path and structure live through the call, and the structure's size is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
}

/// The version of the Landlock interface, if the kernel has it and it is switched on.
pub fn landlock_version() -> Option<usize> {
    const CREATE_RULESET_VERSION: c_uint = 1;
    // SAFETY: with this flag the kernel takes no structure.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0_usize, CREATE_RULESET_VERSION)
    };
    usize::try_from(version).ok().filter(|version| *version > 0)
}

/// A set of rules that handles these rights; bits that the kernel does not know are an error.
pub fn landlock_ruleset(files: u64, network: u64, scopes: u64) -> io::Result<OwnedFd> {
    let attributes = [files, network, scopes];
    // Old kernels take a longer structure if what they do not know of is zero.
    // SAFETY: the array has the layout of `struct landlock_ruleset_attr`, and lives through the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, attributes.as_ptr(), size_of_val(&attributes), 0)
    };
    check(fd)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Allows `rights` to the file or the tree of files `beneath`.
pub fn landlock_allow(rules: BorrowedFd<'_>, beneath: BorrowedFd<'_>, rights: u64) -> io::Result<()> {
    const RULE_PATH_BENEATH: c_int = 1;
    #[repr(C, packed)]
    struct PathBeneath {
        rights: u64,
        parent: RawFd,
    }
    let rule = PathBeneath { rights, parent: beneath.as_raw_fd() };
    // SAFETY: the structure is the one of this kind of rule, and lives through the call.
    check(unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), RULE_PATH_BENEATH, &raw const rule, 0)
    })
}

/// Puts this process, and all that come of it, under the rules.
pub fn landlock_restrict(rules: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no memory.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) })
}

/// Moves this process to new namespaces (`CLONE_NEW…`).
pub fn unshare(namespaces: c_int) -> io::Result<()> {
    // SAFETY: descriptors and memory stay shared with nobody, as they are.
    check(c_long::from(unsafe { libc::unshare(namespaces) }))
}

/// Blocks those of `signals` that are not ignored, as nohup(1) would have it, and returns them as a descriptor.
pub fn take_signals(signals: &[c_int]) -> io::Result<OwnedFd> {
    // SAFETY: an all-zero set is valid, and is made empty all the same.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a signal set.
    unsafe { libc::sigemptyset(&raw mut set) };
    for &signal in signals.iter().filter(|signal| !is_ignored(**signal)) {
        // SAFETY: `set` is a signal set.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` lives through the call, and the old mask is not wanted.
    check(c_long::from(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) }))?;
    // SAFETY: `set` lives through the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    check(c_long::from(fd))?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn is_ignored(signal: c_int) -> bool {
    // SAFETY: a sigaction of zeros is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action this only writes the present one to `action`.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// The next signal in the descriptor of [`take_signals`], and whether a process sent it (and not the terminal).
pub fn next_signal(fd: BorrowedFd<'_>) -> Option<(c_int, bool)> {
    let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
    let length = rustix::io::read(fd, &mut buffer).ok()?;
    if length != buffer.len() {
        return None;
    }
    // SAFETY: the kernel has filled the whole structure, which is plain data.
    let info: libc::signalfd_siginfo = unsafe { ptr::read_unaligned(buffer.as_ptr().cast()) };
    Some((c_int::try_from(info.ssi_signo).ok()?, info.ssi_code <= 0))
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
