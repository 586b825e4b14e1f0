//! Rows of bad input, and what every refusal has in common.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use cofferdam_api::status::{ExitReason, Outcome};
use cofferdam_tests::host::{process_with, unique_id};
use cofferdam_tests::{Finished, Run, place};
use rustix::process::geteuid;
use tempfile::TempDir;

/// A run of the smallest payload, which gives 42 if it is ever started.
pub fn hello() -> Run {
    Run::new(place::payload("hello"))
}

/// Files for the rows of a test, and the rows that went wrong.
pub struct Table {
    folder: TempDir,
    faults: Vec<String>,
}

impl Table {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), faults: Vec::new() }
    }

    /// The folder of the files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// Makes a file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Makes a file without content, which takes no room.
    pub fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// Makes a directory.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Makes a pipe.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o600.into(), 0).unwrap();
        path
    }

    /// A row: `run` must be refused in a message that has all `words`.
    pub fn refuses(&mut self, row: &str, run: Run, words: &[&str]) {
        let id = unique_id();
        let before = self.names();
        let done = run.with("id", &id).finish();
        let mut fault = fault_of(&done, words);
        if self.names() != before {
            fault = Some(format!("the folder had {before:?} and has {:?}", self.names()));
        }
        if let Some(process) = process_with(&id) {
            fault = Some(format!("process {} is still there", process.display()));
        }
        self.faults.extend(fault.map(|fault| format!("{row}: {fault}: {done}")));
    }

    /// A row that shows the other side of a limit: `run` must reach the guest and return its code.
    pub fn accepts(&mut self, row: &str, run: Run, code: i32) {
        let done = run.finish();
        if done.code() != code || done.outcome().exit_reason != ExitReason::PowerOff {
            self.faults.push(format!("{row}: not accepted: {done}"));
        }
    }

    /// Fails if a row did.
    pub fn end(self) {
        assert!(self.faults.is_empty(), "{} rows:\n{}", self.faults.len(), self.faults.join("\n"));
    }

    fn names(&self) -> BTreeSet<OsString> {
        fs::read_dir(self.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }
}

/// What is wrong with a refusal, if anything.
fn fault_of(done: &Finished, words: &[&str]) -> Option<String> {
    let outcome = done.outcome();
    if done.code() != 125 {
        return Some("the exit status is not 125".to_owned());
    }
    if !done.console().is_empty() {
        return Some("something is on the console".to_owned());
    }
    // The message is for scripts in the JSON, and for people on stderr.
    let unsaid =
        words.iter().find(|word| !outcome.message.contains(**word) || !done.messages().contains(**word));
    if let Some(word) = unsaid {
        return Some(format!("no {word:?} in the message"));
    }
    fault_of_outcome(&outcome)
}

/// What is wrong with the outcome of a refusal, but for its message.
pub fn fault_of_outcome(outcome: &Outcome) -> Option<String> {
    let Outcome { platform, protected, exit_reason, exit_code, phases, .. } = outcome;
    if (*exit_reason, *exit_code) != (ExitReason::Config, None) {
        return Some(format!("the reason is {exit_reason:?}, the exit code {exit_code:?}"));
    }
    if platform.is_some() || *protected || phases.contains_key("opened") {
        return Some("something was started".to_owned());
    }
    None
}

/// Takes root's privilege to open every file from what it starts; anybody else has none.
pub fn without_privilege() -> Vec<&'static str> {
    if geteuid().is_root() {
        vec!["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    } else {
        Vec::new()
    }
}
