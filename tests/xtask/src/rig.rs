//! The caller's side of the rig: starts the outer machine, passes it a command
//! and takes what the command writes.
//!
//! Inside, the command sees the caller's file system below a throw-away
//! overlay, as root; `/dev`, `/proc`, `/sys`, `/run` and `/dev/shm` are the
//! outer machine's own. `/tmp`, `/var/tmp` and the directories of
//! [`Request::shares`] are passed through: what is written there is written
//! outside. The command's stdin is empty.
//!
//! On the directories passed through, Unix sockets, file locks, O_DIRECT and
//! shared mappings work; O_TMPFILE and fallocate do not, locks do not reach
//! outside, and small writes are slow. So `TMPDIR` is `/run/tmp`, in memory.
//! Changes that are made outside while the rig runs are seen at once there,
//! but not reliably elsewhere.
//!
//! The emulator dies with the thread that called [`run`]. Its messages go to a
//! file in `/tmp`, which the command can read as they come ([`LOG`]).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::assets::{Assets, SnpAssets};
use crate::frame::{self, Kind};
use crate::machine::{Machine, SecureProcessor};
use crate::tool;

/// Directories that are always passed through.
const SHARED: [&str; 2] = ["/tmp", "/var/tmp"];

/// The variable that tells the command where the emulator's messages come, those of its secure processor among them.
pub const LOG: &str = "COFFERDAM_EMULATOR_LOG";
/// The variable that tells it where the certificates of the secure processor lie, if there is one: `ark.pem`, `ask.pem`
/// and `vcek.pem`.
pub const CERTIFICATES: &str = "COFFERDAM_SNP_CERTIFICATES";

/// What to run, and in what machine.
#[derive(Clone, Debug)]
pub struct Request {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// The program's environment, in full.
    pub environment: Vec<(OsString, OsString)>,
    /// Directories to pass through read-write, besides `/tmp` and `/var/tmp`.
    pub shares: Vec<PathBuf>,
    /// Memory of the outer machine, MiB.
    pub memory: u32,
    /// Its number of CPUs.
    pub cpus: u8,
    /// How long the whole run may take.
    pub timeout: Duration,
    /// Where the outer machine's console goes; a nameless file if not given.
    pub console: Option<PathBuf>,
    /// Where the emulator's messages are kept.
    pub log: Option<PathBuf>,
    /// Makes it a host with SEV-SNP.
    pub snp: Option<Snp>,
}

/// An outer machine with SEV-SNP.
#[derive(Clone, Debug)]
pub struct Snp {
    /// What it is made of.
    pub assets: SnpAssets,
    /// How much the emulator tells of it ([`SecureProcessor::trace`]).
    pub trace: u8,
}

impl Request {
    /// Runs `command` in a machine of 2 CPUs and 4 GiB, with the caller's [`default_environment`].
    pub fn new(command: Vec<OsString>, timeout: Duration) -> Self {
        Self {
            command,
            environment: default_environment(),
            shares: Vec::new(),
            memory: 4096,
            cpus: 2,
            timeout,
            console: None,
            log: None,
            snp: None,
        }
    }
}

/// Memory of an outer machine with SEV-SNP, MiB. The reverse map table lies at 2304 MiB, to which RAM reaches in a machine
/// of less than 2816 MiB, and covers the first 16 GiB.
const SNP_MEMORY: RangeInclusive<u32> = 3072..=12288;

/// Why there is no exit status of the command.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// The machine's parts could not be fetched or started.
    #[error(transparent)]
    Setup(#[from] crate::Error),
    /// The command did not end in time.
    #[error("no end after {} s; --timeout SECONDS gives it longer\n{errors}{console}", timeout.as_secs())]
    Timeout {
        /// The time it had.
        timeout: Duration,
        /// What the emulator wrote to stderr.
        errors: String,
        /// The end of the outer machine's console.
        console: String,
    },
    /// The outer machine or its emulator ended before the command.
    #[error("the outer machine ended without a result (emulator: {status})\n{errors}{console}")]
    Died {
        /// The emulator's exit status.
        status: ExitStatus,
        /// What the emulator wrote to stderr.
        errors: String,
        /// The end of the outer machine's console.
        console: String,
    },
    /// Talking to the outer machine, or passing on its output, failed.
    #[error("{action}: {source}\n{console}")]
    Stream {
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
        /// The end of the outer machine's console.
        console: String,
    },
}

/// Runs the command of `request` in an outer machine made of `assets`; what it
/// writes goes to `output` and `errors` as it comes. Returns its exit status,
/// 128 and the signal's number if a signal ended it.
pub fn run(
    assets: &Assets,
    request: &Request,
    output: &mut impl Write,
    errors: &mut impl Write,
) -> Result<u8, RigError> {
    if request.snp.is_some() && !SNP_MEMORY.contains(&request.memory) {
        let reason = format!("its memory must be {} to {} MiB", SNP_MEMORY.start(), SNP_MEMORY.end());
        return Err(crate::Error::Unavailable { what: "a machine with SEV-SNP".into(), reason }.into());
    }
    let messages = tempfile::Builder::new().prefix("cofferdam-emulator-").tempfile_in(SHARED[0]);
    let messages = messages.map_err(crate::Error::file("create a file in", SHARED[0]))?;
    let result = run_with(assets, request, &messages, output, errors);
    if let Some(path) = &request.log {
        std::fs::copy(messages.path(), path).map_err(crate::Error::file("write", path))?;
    }
    result
}

fn run_with(
    assets: &Assets,
    request: &Request,
    messages: &NamedTempFile,
    output: &mut impl Write,
    errors: &mut impl Write,
) -> Result<u8, RigError> {
    let deadline = Instant::now() + request.timeout;
    let shares = shares(&request.shares)?;
    let machine = machine(assets, request, &shares);
    let mut outer = Outer::start(assets, &machine, request, messages)?;
    let mut request = request.clone();
    request.environment.push((LOG.into(), messages.path().into()));
    if let Some(snp) = &request.snp {
        request.environment.push((CERTIFICATES.into(), snp.assets.certificates.clone().into()));
    }
    if let Err(error) = outer.order(&request, &shares) {
        return Err(match error.kind() {
            io::ErrorKind::WouldBlock => outer.timeout(request.timeout),
            io::ErrorKind::BrokenPipe => outer.died(),
            _ => outer.stream_error("sending the command", error),
        });
    }
    let mut payload = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(outer.timeout(request.timeout));
        }
        let read =
            outer.port.set_read_timeout(Some(left)).and_then(|()| frame::read(&mut outer.port, &mut payload));
        let written = match read {
            Ok(Kind::Output) => output.write_all(&payload).and_then(|()| output.flush()),
            Ok(Kind::Errors) => errors.write_all(&payload).and_then(|()| errors.flush()),
            Ok(Kind::Exit) => return Ok(payload.first().copied().unwrap_or(u8::MAX)),
            Ok(kind) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{kind:?} from the agent"))),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Err(outer.timeout(request.timeout)),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => return Err(outer.died()),
                _ => Err(error),
            },
        };
        written.map_err(|source| outer.stream_error("passing on the command's output", source))?;
    }
}

/// The outer machine of `request`.
fn machine(assets: &Assets, request: &Request, shares: &[(String, PathBuf)]) -> Machine {
    let plain = Machine {
        kernel: assets.rig_kernel.clone(),
        initrd: assets.rig_initrd.clone(),
        firmware: assets.firmware.clone(),
        memory: request.memory,
        cpus: request.cpus,
        shares: shares.to_owned(),
        secure_processor: None,
    };
    let Some(Snp { assets, trace }) = &request.snp else { return plain };
    let key = assets.certificates.join("vcek-key.pem");
    Machine {
        kernel: assets.kernel.clone(),
        initrd: assets.initrd.clone(),
        secure_processor: Some(SecureProcessor { key, trace: *trace }),
        ..plain
    }
}

/// The directories to pass through, each once, with symbolic links resolved,
/// and a 9p tag for each.
fn shares(more: &[PathBuf]) -> Result<Vec<(String, PathBuf)>, crate::Error> {
    let mut paths = Vec::new();
    for path in SHARED.map(PathBuf::from).iter().filter(|path| path.is_dir()).chain(more) {
        let path = path.canonicalize().map_err(crate::Error::file("share", path))?;
        if !path.is_dir() {
            return Err(crate::Error::file("share", path)(io::ErrorKind::NotADirectory.into()));
        }
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    // A directory is mounted after those above it.
    paths.sort();
    Ok(paths.into_iter().enumerate().map(|(index, path)| (format!("share{}", index + 1), path)).collect())
}

/// A running outer machine; dropping it ends it.
struct Outer {
    emulator: Child,
    port: UnixStream,
    console: File,
    errors: File,
}

impl Drop for Outer {
    fn drop(&mut self) {
        // Either fails only if the emulator is gone already.
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}

impl Outer {
    fn start(
        assets: &Assets,
        machine: &Machine,
        request: &Request,
        messages: &NamedTempFile,
    ) -> Result<Self, crate::Error> {
        let console = match &request.console {
            Some(path) => File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(path)
                .map_err(crate::Error::file("create", path))?,
            None => tool::scratch()?,
        };
        let duplicate = |file: &File| file.try_clone().map_err(crate::Error::file("duplicate", "log file"));
        let errors = duplicate(messages.as_file())?;
        let (port, theirs) = UnixStream::pair().map_err(crate::Error::file("create", "socket pair"))?;
        // setpriv makes the emulator die with this thread, however that dies.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&assets.qemu)
            .args(machine.options())
            .stdin(OwnedFd::from(theirs))
            .stdout(duplicate(&console)?)
            .stderr(duplicate(&errors)?);
        let emulator =
            command.spawn().map_err(|source| crate::Error::Start { program: "setpriv".into(), source })?;
        Ok(Self { emulator, port, console, errors })
    }

    /// Sends the command, first the path of this program for the agent.
    fn order(&mut self, request: &Request, shares: &[(String, PathBuf)]) -> io::Result<()> {
        let port = &mut self.port;
        port.set_write_timeout(Some(request.timeout))?;
        let agent = std::env::current_exe()?;
        port.write_all(&[agent.as_os_str().as_bytes(), b"\n"].concat())?;
        for (tag, path) in shares {
            frame::write(port, Kind::Share, &[tag.as_bytes(), b"\0", path.as_os_str().as_bytes()].concat())?;
        }
        for word in &request.command {
            frame::write(port, Kind::Argument, word.as_bytes())?;
        }
        for (name, value) in &request.environment {
            frame::write(port, Kind::Environment, &[name.as_bytes(), b"=", value.as_bytes()].concat())?;
        }
        frame::write(port, Kind::Directory, std::env::current_dir()?.as_os_str().as_bytes())?;
        frame::write(port, Kind::Run, &[])
    }

    fn timeout(&mut self, timeout: Duration) -> RigError {
        RigError::Timeout { timeout, errors: self.emulator_errors(), console: self.console_tail() }
    }

    fn died(&mut self) -> RigError {
        // It has closed the port, so it is ending; if not, it is made to.
        let _ = self.port.shutdown(Shutdown::Both);
        let _ = self.emulator.kill();
        let errors = self.emulator_errors();
        match self.emulator.wait() {
            Ok(status) => RigError::Died { status, errors, console: self.console_tail() },
            Err(source) => self.stream_error("waiting for the emulator", source),
        }
    }

    fn stream_error(&mut self, action: &'static str, source: io::Error) -> RigError {
        RigError::Stream { action, source, console: self.console_tail() }
    }

    /// What the emulator said, apart from the many features of the CPU model
    /// that it lacks.
    fn emulator_errors(&mut self) -> String {
        let text = tool::tail(&mut self.errors);
        let telling = text.lines().filter(|line| !line.contains("TCG doesn't support requested feature"));
        telling.flat_map(|line| [line, "\n"]).collect()
    }

    fn console_tail(&mut self) -> String {
        let text = tool::tail(&mut self.console);
        if text.trim().is_empty() {
            return "(the outer machine's console is empty)".into();
        }
        format!("--- end of the outer machine's console ---\n{}", text.trim_end())
    }
}

/// The environment of a command by default: what finds programs and what cargo
/// and Rust programs read, plus `COFFERDAM_RIG=1` and a `TMPDIR` in memory.
pub fn default_environment() -> Vec<(OsString, OsString)> {
    let passes = |name: &OsStr| {
        let name = name.to_string_lossy();
        // Cargo sets these for xtask itself.
        let of_xtask = ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.starts_with(prefix));
        let prefixes = ["CARGO", "RUST", "COFFERDAM"];
        let known =
            name == "PATH" || name == "HOME" || prefixes.iter().any(|prefix| name.starts_with(prefix));
        known && !of_xtask
    };
    let mut variables: Vec<_> = std::env::vars_os().filter(|(name, _)| passes(name)).collect();
    variables.push(("COFFERDAM_RIG".into(), "1".into()));
    variables.push(("TMPDIR".into(), "/run/tmp".into()));
    variables
}

/// Whether this process runs inside a rig.
pub fn inside() -> bool {
    std::env::var_os("COFFERDAM_RIG").is_some()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn shares_come_once_parents_first_and_must_be_directories() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap();
        fs::create_dir(path.join("below")).unwrap();
        std::os::unix::fs::symlink(path.join("below"), path.join("link")).unwrap();
        let found = shares(&[path.join("link"), path.clone(), path.join("below")]).unwrap();
        let at = |wanted: &PathBuf| found.iter().filter(|(_, path)| path == wanted).count();
        assert_eq!((at(&path), at(&path.join("below"))), (1, 1));
        assert!(found.is_sorted_by_key(|(_, path)| path.clone()));
        fs::write(path.join("file"), "").unwrap();
        assert!(shares(&[path.join("file")]).unwrap_err().to_string().contains("file"));
        assert!(shares(&[path.join("nothing")]).is_err());
    }
}
