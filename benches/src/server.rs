//! Programs that serve HTTP on a Unix socket, from their start on, and what /proc says of them.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use cofferdam_tests::api::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::Result;

/// How long a server may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory in which servers make their sockets, one at a time: it is watched for that.
pub struct Sockets {
    directory: PathBuf,
    /// Readable when a file has been made. Closing it takes milliseconds, so there is one for many servers.
    watch: OwnedFd,
}

impl Sockets {
    /// Watches a directory.
    pub fn new(directory: &Path) -> Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, directory, WatchFlags::CREATE)?;
        Ok(Self { directory: directory.to_owned(), watch })
    }

    /// The path of the socket `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Connects to the server `child`, and takes no CPU from it while its socket is not there.
    fn connect(&self, name: &str, child: &mut Child) -> Result<Connection> {
        let socket = self.path(name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Connection::to(&socket) {
                Ok(connection) => return Ok(connection),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let mut fds = [PollFd::new(&self.watch, PollFlags::IN)];
                    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))?;
                    let _ = rustix::io::read(&self.watch, &mut [0; 4096]);
                }
                // It is bound, but does not listen yet.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => thread::yield_now(),
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = child.try_wait()? {
                return Err(format!("it has ended with {status}").into());
            }
            if Instant::now() > deadline {
                return Err(format!("nobody listens on {}", socket.display()).into());
            }
        }
    }
}

/// A server that runs, and a connection to it. Dropped before its end, it is killed.
pub struct Server {
    child: Child,
    connection: Connection,
    started: f64,
}

impl Server {
    /// Starts `command`, which makes the socket `name`, and connects as soon as that is possible.
    pub fn start(command: &mut Command, sockets: &Sockets, name: &str) -> Result<Self> {
        let _ = fs::remove_file(sockets.path(name));
        let started = now();
        let mut child = command.stdin(Stdio::null()).spawn()?;
        match sockets.connect(name, &mut child) {
            Ok(connection) => Ok(Self { child, connection, started }),
            Err(error) => {
                end(&mut child);
                Err(format!("{command:?}: {error}").into())
            }
        }
    }

    /// Asks for what has to be answered with `status`; returns the answer.
    pub fn ask(&mut self, request: &str, body: &str, status: u16) -> Result<Value> {
        self.connection.send(request, body);
        match self.connection.answer() {
            (found, answer) if found == status => Ok(answer),
            (found, answer) => Err(format!("{request}: {found} {answer}").into()),
        }
    }

    /// Milliseconds since before its start.
    pub fn age(&self) -> f64 {
        now() - self.started
    }

    /// A field of its /proc/PID/status, MiB.
    pub fn memory(&self, field: &str) -> Result<f64> {
        memory(self.child.id(), field)
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<ExitStatus> {
        let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        let patience = Timespec::try_from(PATIENCE)?;
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience))? {
            0 => Err("the server does not end".into()),
            _ => Ok(self.child.wait()?),
        }
    }

    /// Kills it, without waiting for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Either fails only if it has ended.
    let _ = child.kill();
    let _ = child.wait();
}

/// `CLOCK_MONOTONIC`, milliseconds.
pub fn now() -> f64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// A field of /proc/PID/status, MiB.
pub fn memory(pid: u32, field: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.ok_or_else(|| format!("no {field} in /proc/PID/status"))? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ends_before_it_listens_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = Sockets::new(directory.path()).unwrap();
        let error = Server::start(&mut Command::new("false"), &sockets, "socket").err().unwrap().to_string();
        assert!(error.contains("false") && error.contains("exit status: 1"), "{error}");
    }

    #[test]
    fn memory_is_that_of_the_process() {
        let own = std::process::id();
        assert!(memory(own, "VmRSS").unwrap() > 0.1);
        assert!(memory(own, "VmNothing").is_err());
    }
}
