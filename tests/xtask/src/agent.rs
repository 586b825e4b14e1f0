//! The rig's side inside the outer machine: runs one command and sends what it
//! writes to the caller.
//!
//! The outer machine's init (`rig-init`) starts this program in a chroot of
//! the caller's file system, with the serial port as its stdin and stdout. When
//! the command ends, whatever it left running is killed, as a machine's
//! shutdown would: the run is over when the command is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;

use rustix::process::{Pid, Signal};

use crate::frame::{self, Kind};

/// The name of the serial port, by which the agent knows that it is in a rig.
pub const PORT_NAME: &str = "cofferdam.rig";
const PORT_NAME_FILE: &str = "/sys/class/virtio-ports/vport0p1/name";

/// How a 9p share is mounted: every read and write goes to the caller's kernel,
/// so both sides see the same; `mmap` adds shared mappings.
const SHARE_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=524288,cache=mmap";

/// Exit statuses of a command that did not start, as of a shell.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Takes one command from stdin, runs it, and reports to stdout.
pub fn run() -> io::Result<()> {
    // The clean-up at the end kills every other process of the machine.
    let name = fs::read_to_string(PORT_NAME_FILE).unwrap_or_default();
    if name.trim() != PORT_NAME {
        return Err(io::Error::other("only the rig's outer machine runs `xtask agent`"));
    }
    let mut port = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut command = receive(&mut port)?;
    let port = Mutex::new(port);
    let code = match command.spawn() {
        Ok(mut child) => {
            let pipes = (child.stdout.take(), child.stderr.take());
            thread::scope(|scope| {
                scope.spawn(|| pump(&port, Kind::Output, pipes.0));
                scope.spawn(|| pump(&port, Kind::Errors, pipes.1));
                let status = child.wait();
                kill_everything_else();
                status.map(exit_code)
            })?
        }
        Err(error) => {
            let program = command.get_program().to_string_lossy().into_owned();
            send(&port, Kind::Errors, format!("rig: cannot run {program}: {error}\n").as_bytes())?;
            if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE }
        }
    };
    rustix::fs::sync();
    send(&port, Kind::Exit, &[code])
}

/// Reads the caller's order up to Run; mounts the shares as they come.
fn receive(port: &mut File) -> io::Result<Command> {
    let mut payload = Vec::new();
    let mut words = Vec::new();
    let mut directory = b"/".to_vec();
    let mut variables = Vec::new();
    loop {
        match frame::read(port, &mut payload)? {
            Kind::Share => mount(&payload)?,
            Kind::Argument => words.push(payload.clone()),
            Kind::Environment => variables.push(payload.clone()),
            Kind::Directory => directory.clone_from(&payload),
            Kind::Run => break,
            kind => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{kind:?} from the caller")));
            }
        }
    }
    let mut words = words.iter().map(|word| OsStr::from_bytes(word));
    let program = words.next().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no command"))?;
    let mut command = Command::new(program);
    command.args(words).current_dir(OsStr::from_bytes(&directory)).env_clear();
    for (name, value) in variables.iter().filter_map(|variable| split(variable, b'=')) {
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// `bytes` before and after the first `separator`.
fn split(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == separator)?;
    Some((bytes.get(..at)?, bytes.get(at + 1..)?))
}

fn mount(share: &[u8]) -> io::Result<()> {
    let (tag, path) = split(share, 0).ok_or_else(|| io::Error::other("share without a path"))?;
    let (tag, path) = (OsStr::from_bytes(tag), OsStr::from_bytes(path));
    let status =
        Command::new("mount").args(["-i", "-t", "9p", "-o", SHARE_OPTIONS]).arg(tag).arg(path).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("cannot mount the share {}", path.display())));
    }
    Ok(())
}

/// Sends what comes out of `pipe` until all its writers are gone, or the caller is.
fn pump(port: &Mutex<File>, kind: Kind, pipe: Option<impl Read>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = vec![0; 64 << 10];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if send(port, kind, buffer.get(..length).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn send(port: &Mutex<File>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut port = port.lock().map_err(|_| io::Error::other("a sender died"))?;
    frame::write(&mut *port, kind, payload)
}

/// Kills every process but this one and init, so that the pipes are at their
/// end and no file is being written.
fn kill_everything_else() {
    // kill(-1): the group of "process 1" is every process (kill(2)). There may
    // be none left, which is no failure.
    let _ = rustix::process::kill_process_group(Pid::INIT, Signal::KILL);
}

/// The status as a shell gives it: 128 and the signal's number after a signal.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_refuses_to_run_elsewhere() {
        assert!(
            !std::path::Path::new(PORT_NAME_FILE).exists() || std::env::var_os("COFFERDAM_RIG").is_some()
        );
        if !std::path::Path::new(PORT_NAME_FILE).exists() {
            assert!(run().unwrap_err().to_string().contains("only the rig"));
        }
    }

    #[test]
    fn statuses_are_a_shells() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_code(ExitStatus::from_raw(11 | 0x80)), 139);
    }

    #[test]
    fn splitting_keeps_later_separators() {
        assert_eq!(split(b"A=b=c", b'='), Some((&b"A"[..], &b"b=c"[..])));
        assert_eq!(split(b"A=", b'='), Some((&b"A"[..], &b""[..])));
        assert_eq!(split(b"A", b'='), None);
    }
}
