//! Starts a process of the container's.
#![allow(unsafe_code)] // fork and execve

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::thread;

use cofferdam_container_manifest::Process;
use cofferdam_container_protocol::step::Reason;
use rustix::fs::{Mode, OFlags, fchown, open};
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, WaitId, WaitIdOptions, chdir, ioctl_tiocsctty, pidfd_open, setsid, umask, waitid,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::failure::{Failure, Reasoned};
use crate::identity::Identity;
use crate::space::Space;

/// A program, and who runs it in what circumstances.
#[derive(Debug)]
pub struct Program {
    /// Files to try, as `execvp` of POSIX does.
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    identity: Identity,
}

impl Program {
    /// A program with these arguments, the first of which names it; all else is as the manifest says of the container's
    /// process, with `env` as its environment for this start. None: it is not of a valid manifest.
    pub fn new(process: &Process, args: &[String], env: &[String]) -> Option<Self> {
        let words = |words: &[String]| {
            words.iter().map(|word| CString::new(&**word).ok()).collect::<Option<Vec<_>>>()
        };
        Some(Self {
            candidates: words(&candidates(args.first()?, &process.env))?,
            args: words(args)?,
            env: words(env)?,
            cwd: CString::new(&*process.cwd).ok()?,
            identity: Identity::new(process)?,
        })
    }
}

/// The files that `program` may be: itself if it has a slash, else in the folders of `PATH`, as `env` gives it.
fn candidates(program: &str, env: &[String]) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let folders = path.split(':').filter(|_| !path.is_empty());
    // An empty folder is the working directory.
    folders.map(|folder| format!("{}/{program}", if folder.is_empty() { "." } else { folder })).collect()
}

/// The standard streams of a process to be.
#[derive(Debug)]
pub enum Streams {
    /// Three of them; those that nobody grants are `/dev/null`.
    Pipes {
        /// What it reads.
        stdin: OwnedFd,
        /// What it writes.
        stdout: OwnedFd,
        /// What it writes of errors.
        stderr: OwnedFd,
    },
    /// One terminal.
    Terminal,
}

/// A process.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub process: OwnedFd,
    /// The other side of its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Starts a program.
///
/// # Errors
/// If it cannot be run so.
pub fn spawn(space: &Space, program: &Program, streams: Streams) -> Result<Started, Failure> {
    // A thread of its own, for it cannot come back from the namespaces.
    let start = || {
        space.enter().because(Reason::KernelRefused)?;
        start(program, streams)
    };
    thread::scope(|scope| scope.spawn(start).join()).unwrap_or(Err(Failure::new(Reason::InitFailed)))
}

fn start(program: &Program, streams: Streams) -> Result<Started, Failure> {
    let Identity { uid, gid, .. } = program.identity;
    let (stdio, terminal) = match streams {
        Streams::Pipes { stdin, stdout, stderr } => ([stdin, stdout, stderr], None),
        Streams::Terminal => {
            let (theirs, ours) = open_terminal().because(Reason::KernelRefused)?;
            (theirs, Some(ours))
        }
    };
    for stream in &stdio {
        // So that it can open its streams by their names in /dev. /dev/null stays whose it is.
        if terminal.is_some() || is_pipe(stream) {
            let gid = terminal.is_none().then_some(gid);
            fchown(stream, Some(uid), gid).because(Reason::KernelRefused)?;
        }
    }
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).because(Reason::KernelRefused)?;
    let child = Child {
        program,
        args: pointers(&program.args),
        env: pointers(&program.env),
        stdio: stdio.each_ref(),
        terminal: terminal.is_some(),
        errors: writer.as_raw_fd(),
    };
    // SAFETY: the child calls nothing that allocates or takes a lock until it runs another program or ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child.run();
    }
    drop(writer);
    let pid = Pid::from_raw(pid).ok_or(Failure::new(Reason::OutOfMemory))?;
    let process = pidfd_open(pid, PidfdFlags::empty()).because(Reason::KernelRefused)?;
    let mut told = Vec::new();
    File::from(reader).read_to_end(&mut told).because(Reason::KernelRefused)?;
    match told.split_first() {
        None => Ok(Started { process, terminal }),
        Some((phase, errno)) => {
            // Nobody else would bury it, and its namespace cannot end before.
            let _ = retry_on_intr(|| waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED));
            let errno = errno.first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes));
            Err(failure(*phase, Errno::from_raw_os_error(errno)))
        }
    }
}

/// A new terminal of the container's: the process's side, three times, and ours.
fn open_terminal() -> rustix::io::Result<([OwnedFd; 3], OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    unlockpt(&ours)?;
    let peer = || ioctl_tiocgptpeer(&ours, flags);
    Ok(([peer()?, peer()?, peer()?], ours))
}

fn is_pipe(stream: &OwnedFd) -> bool {
    rustix::fs::fstat(stream).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo())
}

/// `/dev/null`, as a stream that nobody grants.
///
/// # Errors
/// If the kernel has none.
pub fn null() -> Result<OwnedFd, Failure> {
    open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).because(Reason::KernelRefused)
}

fn pointers(words: &[CString]) -> Vec<*const libc::c_char> {
    words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
}

/// What a child does before it runs its program, for the message about a failure.
const SESSION: u8 = 1;
const IDENTITY: u8 = 2;
const DIRECTORY: u8 = 3;
const EXECUTE: u8 = 4;

fn failure(phase: u8, errno: Errno) -> Failure {
    let reason = match (phase, errno) {
        (_, Errno::NOMEM) => Reason::OutOfMemory,
        (SESSION, _) => Reason::KernelRefused,
        (IDENTITY, _) => Reason::IdentityRefused,
        (DIRECTORY, _) => Reason::PathRefused,
        (_, Errno::NOENT | Errno::NOTDIR) => Reason::ProgramNotFound,
        _ => Reason::ProgramNotRunnable,
    };
    Failure { cause: Some(errno), ..Failure::new(reason) }
}

/// What the child needs, all of it made before it is born.
struct Child<'a> {
    program: &'a Program,
    args: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    stdio: [&'a OwnedFd; 3],
    terminal: bool,
    errors: RawFd,
}

impl Child<'_> {
    fn run(&self) -> ! {
        let (phase, errno) = match self.prepare() {
            Ok(()) => (EXECUTE, self.execute()),
            Err(failed) => failed,
        };
        let [a, b, c, d] = errno.raw_os_error().to_le_bytes();
        let message = [phase, a, b, c, d];
        // SAFETY: the memory is there; then this process ends.
        unsafe {
            libc::write(self.errors, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }

    fn prepare(&self) -> Result<(), (u8, Errno)> {
        let at = |phase| move |errno| (phase, errno);
        let [stdin, stdout, stderr] = self.stdio;
        let streams = dup2_stdin(stdin).and_then(|()| dup2_stdout(stdout)).and_then(|()| dup2_stderr(stderr));
        streams.and_then(|()| setsid()).map_err(at(SESSION))?;
        if self.terminal {
            ioctl_tiocsctty(stdin).map_err(at(SESSION))?;
        }
        default_signals();
        umask(Mode::from_raw_mode(0o022));
        self.program.identity.assume().map_err(at(IDENTITY))?;
        chdir(&*self.program.cwd).map_err(at(DIRECTORY))?;
        self.program.identity.forbid().map_err(at(IDENTITY))
    }

    /// Runs the first of the candidates that is there; returns why there is none.
    fn execute(&self) -> Errno {
        let mut result = Errno::NOENT;
        for candidate in &self.program.candidates {
            // SAFETY: strings and lists end with zeroes, and live as long as this process is this program.
            unsafe { libc::execve(candidate.as_ptr(), self.args.as_ptr(), self.env.as_ptr()) };
            match Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO) {
                Errno::NOENT | Errno::NOTDIR => {}
                // Another one may be better.
                Errno::ACCESS => result = Errno::ACCESS,
                errno => return errno,
            }
        }
        result
    }
}

/// All signals do what they do by default, and none is held back. Rust programs ignore one.
fn default_signals() {
    // SAFETY: the set is made before it is read; no handler is installed.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_searched_for_in_path_only_without_a_slash() {
        let env = |path: &str| vec!["A=1".to_owned(), format!("PATH={path}"), "PATHS=/no".to_owned()];
        assert_eq!(candidates("/bin/sh", &env("/a")), ["/bin/sh"]);
        assert_eq!(candidates("./sh", &env("/a")), ["./sh"]);
        assert_eq!(candidates("sh", &env("/a:/b/c")), ["/a/sh", "/b/c/sh"]);
        assert_eq!(candidates("sh", &env("/a::b")), ["/a/sh", "./sh", "b/sh"]);
        assert!(candidates("sh", &env("")).is_empty());
        assert!(candidates("sh", &[]).is_empty());
    }

    #[test]
    fn failures_have_their_reasons() {
        assert_eq!(failure(IDENTITY, Errno::PERM).reason, Reason::IdentityRefused);
        assert_eq!(failure(DIRECTORY, Errno::ACCESS).reason, Reason::PathRefused);
        assert_eq!(failure(EXECUTE, Errno::NOENT).reason, Reason::ProgramNotFound);
        assert_eq!(failure(EXECUTE, Errno::ACCESS).reason, Reason::ProgramNotRunnable);
        assert_eq!(failure(EXECUTE, Errno::NOMEM).reason, Reason::OutOfMemory);
    }
}
