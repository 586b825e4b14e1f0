//! Landlock, where the kernel has it: a second barrier behind the mounts.
//!
//! The jailed may use what is in the jail, but execute nothing and make no device nodes; and, as far as the
//! kernel's version of the interface goes, make no TCP connection even in a network namespace that was given to it,
//! signal no process outside and reach no abstract Unix socket of one. The program itself, which lies outside,
//! may be read and executed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};

use crate::sys;

const EXECUTE: u64 = 1 << 0;
const READ_FILE: u64 = 1 << 2;
const MAKE_CHARACTER_DEVICE: u64 = 1 << 6;
const MAKE_BLOCK_DEVICE: u64 = 1 << 11;

/// Rights to files that version N of the interface (from 1 on) knows: how many, counted from bit 0.
const FILE_RIGHTS: [u32; 5] = [13, 14, 15, 15, 16];
/// Binding and connecting TCP sockets; from version 4.
const TCP: u64 = 0b11;
/// Abstract Unix sockets and signals; from version 6.
const SCOPES: u64 = 0b11;

/// Landlock is there but did not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("landlock: {call}: {error}")]
pub struct LandlockError {
    call: &'static str,
    error: std::io::Error,
}

/// Restricts this process, which is in the jail already and has `no_new_privs`, and what it becomes.
pub fn restrict(program: &OwnedFd) -> Result<(), LandlockError> {
    let Some(version) = sys::landlock_version() else { return Ok(()) };
    let files = file_rights(version);
    let network = if version >= 4 { TCP } else { 0 };
    let scopes = if version >= 6 { SCOPES } else { 0 };
    let rules = sys::landlock_ruleset(files, network, scopes).map_err(failed("landlock_create_ruleset"))?;
    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open /"))?;
    let of_the_jail = files & !(EXECUTE | MAKE_CHARACTER_DEVICE | MAKE_BLOCK_DEVICE);
    for (beneath, rights) in [(&root, of_the_jail), (program, EXECUTE | READ_FILE)] {
        sys::landlock_allow(rules.as_fd(), beneath.as_fd(), rights).map_err(failed("landlock_add_rule"))?;
    }
    sys::landlock_restrict(rules.as_fd()).map_err(failed("landlock_restrict_self"))
}

fn file_rights(version: usize) -> u64 {
    let known = FILE_RIGHTS.get(version.saturating_sub(1)).or(FILE_RIGHTS.last());
    known.map_or(0, |count| (1 << count) - 1)
}

fn failed<E: Into<std::io::Error>>(call: &'static str) -> impl FnOnce(E) -> LandlockError {
    move |error| LandlockError { call, error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, mknodat};
    use rustix::thread::set_no_new_privs;
    use std::process::Command;
    use std::{fs, io, thread};

    #[test]
    fn rights_are_those_of_the_version() {
        for (version, rights) in
            [(1, 0x1fff), (2, 0x3fff), (3, 0x7fff), (4, 0x7fff), (5, 0xffff), (7, 0xffff)]
        {
            assert_eq!(file_rights(version), rights, "{version}");
        }
    }

    /// The rules hold for a thread and what it starts, so a test can live with them.
    #[test]
    fn only_the_program_can_be_executed() {
        if sys::landlock_version().is_none() {
            println!("this kernel has no Landlock");
            return;
        }
        let run = |path: &str| Command::new(path).status().map(|status| status.success());
        thread::spawn(move || {
            let program = open("/bin/true", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            assert!(run("/bin/ls").is_ok());
            set_no_new_privs(true).unwrap();
            restrict(&program).unwrap();
            assert_eq!(run("/bin/ls").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("file"), "").unwrap();
            let node = directory.path().join("node");
            let made = mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR, 0);
            assert!(made.is_err(), "{made:?}");
        })
        .join()
        .unwrap();
    }
}
