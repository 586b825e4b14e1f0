//! Which system calls the seccomp policies allow and no test needs.
//!
//! The payload tier runs once more, with each monitor under strace(1); then every rule of `resources/seccomp` that is for
//! the shipped build has to have let some call pass, or to say in its comment why no test makes one ([`EXCUSE`]). Tests
//! of the jailer are left out: a jailed monitor cannot be traced from outside the jail, and makes the same calls.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::Error;
use crate::tool::{self, progress};

/// Where the policies are, one file per kind of thread.
const POLICIES: &str = "resources/seccomp";
const KINDS: [&str; 3] = ["vmm", "vcpu", "api"];
/// Where `make build` leaves the shipped binaries.
const SHIPPED: &str = "target/x86_64-unknown-linux-musl/release";
/// Where the tests are, and those that are left out.
const TESTS: &str = "tests/tests";
const LEFT_OUT: [&str; 3] = ["domain", "jailer", "snp"];
/// Tests that cannot be traced: strace needs descriptors of its own, and hangs if the monitor is killed while it
/// begins; the jailer starts no script.
const NOT_TRACED: [&str; 3] = ["any_limit_on_descriptors", "signals::", "a_jailed_monitor"];
/// What the comment of a rule that no test needs begins with, after the build that it is for.
const EXCUSE: &str = "Not in tests: ";

/// A rule of a policy, in seccompiler's JSON.
#[derive(Debug, Deserialize)]
struct Rule {
    syscall: String,
    #[serde(default)]
    args: Vec<Condition>,
    #[serde(default)]
    comment: String,
}

#[derive(Debug, Deserialize)]
struct Condition {
    index: usize,
    #[serde(rename = "type")]
    width: Width,
    op: Operator,
    val: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Width {
    Dword,
    Qword,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Operator {
    Eq,
    MaskedEq(u64),
}

#[derive(Debug, Deserialize)]
struct Policy {
    filter: Vec<Rule>,
}

/// A system call: its name and its arguments.
type Call = (String, Vec<u64>);

impl Rule {
    /// Whether the shipped build has it: see `vmm/build.rs`.
    fn is_shipped(&self) -> bool {
        !self.comment.starts_with("glibc: ") && !self.comment.starts_with("debug: ")
    }

    fn is_excused(&self) -> bool {
        self.comment.strip_prefix("musl: ").unwrap_or(&self.comment).starts_with(EXCUSE)
    }

    fn allows(&self, (name, arguments): &Call) -> bool {
        *name == self.syscall && self.args.iter().all(|condition| condition.holds(arguments))
    }
}

impl Condition {
    fn holds(&self, arguments: &[u64]) -> bool {
        let Some(&argument) = arguments.get(self.index) else { return false };
        let argument = match self.width {
            Width::Dword => argument & u64::from(u32::MAX),
            Width::Qword => argument,
        };
        match self.op {
            Operator::Eq => argument == self.val,
            Operator::MaskedEq(mask) => argument & mask == self.val,
        }
    }
}

/// Runs the tests and looks. False if a test failed, or a rule is neither needed nor excused; that is said on stderr.
pub fn unused() -> Result<bool, Error> {
    let folder = tempfile::tempdir().map_err(Error::file("create", std::env::temp_dir()))?;
    let traces = folder.path().join("traces");
    fs::create_dir(&traces).map_err(Error::file("create", &traces))?;
    let binaries = traced_binaries(folder.path(), &traces)?;
    progress("running the payload tier with each monitor under strace");
    let passed = run_tests(&binaries)?;
    let calls = calls(&traces)?;
    let mut good = passed;
    for kind in KINDS {
        let rules = rules(Path::new(POLICIES), kind)?;
        let made = calls.get(kind).cloned().unwrap_or_default();
        let (needed, others): (Vec<&Rule>, Vec<&Rule>) =
            rules.iter().partition(|rule| made.iter().any(|call| rule.allows(call)));
        let (excused, unused): (Vec<&Rule>, Vec<&Rule>) = others.iter().partition(|rule| rule.is_excused());
        let (needed_count, excused_count) = (needed.len(), excused.len());
        progress(format_args!("{kind}: tests need {needed_count} rules, {excused_count} say why none does"));
        for rule in needed.iter().filter(|rule| rule.is_excused()) {
            progress(format_args!("{kind}: {}: a test needed it this time: {}", rule.syscall, rule.comment));
        }
        for rule in &unused {
            eprintln!("xtask: {kind}: no test needs this rule: {}: {}", rule.syscall, rule.comment);
        }
        good &= unused.is_empty();
    }
    if !passed {
        eprintln!("xtask: tests failed, so what they need is not known");
    }
    Ok(good)
}

/// A folder of binaries for the tests, in which the monitor is a script that traces the real one.
fn traced_binaries(folder: &Path, traces: &Path) -> Result<PathBuf, Error> {
    let binaries = folder.join("bin");
    fs::create_dir(&binaries).map_err(Error::file("create", &binaries))?;
    let shipped = fs::canonicalize(SHIPPED).map_err(Error::file("find", SHIPPED))?;
    let command = shipped.join("cofferdam");
    fs::copy(&command, binaries.join("cofferdam")).map_err(Error::file("copy", &command))?;
    // The tracer is a grandchild, so that the monitor is still the child of whoever started it.
    let script = format!(
        "#!/bin/sh\nexec strace -D -f -Y -X raw -e raw=all -o {}/$$.$PPID {} \"$@\"\n",
        tool::quote(traces.as_os_str()),
        tool::quote(shipped.join("cofferdam-vmm").as_os_str())
    );
    let path = binaries.join("cofferdam-vmm");
    fs::write(&path, script).map_err(Error::file("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(Error::file("chmod", &path))?;
    Ok(binaries)
}

/// Runs the payload tier on `binaries`; whether it passed.
fn run_tests(binaries: &Path) -> Result<bool, Error> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "-p", "cofferdam-tests", "--features", "payload", "--no-fail-fast"]);
    for entry in fs::read_dir(TESTS).map_err(Error::file("read", TESTS))? {
        let path = entry.map_err(Error::file("read", TESTS))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !LEFT_OUT.contains(&name.as_str()) {
            cargo.args(["--test", &name]);
        }
    }
    cargo.arg("--");
    for name in NOT_TRACED {
        cargo.args(["--skip", name]);
    }
    let status = cargo.env("COFFERDAM_BIN", binaries).status();
    status
        .map(|status| status.success())
        .map_err(|source| Error::Start { program: "cargo".to_owned(), source })
}

/// The rules of the shipped build in the policy for threads of `kind`.
fn rules(policies: &Path, kind: &str) -> Result<Vec<Rule>, Error> {
    let path = policies.join(kind).with_extension("json");
    let malformed = |reason: String| Error::Malformed { path: path.clone(), reason };
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    let mut policies: BTreeMap<String, Policy> =
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    let policy = policies.remove(kind).ok_or_else(|| malformed(format!("has no policy {kind:?}")))?;
    Ok(policy.filter.into_iter().filter(Rule::is_shipped).collect())
}

/// The calls that threads made under their policies, by the kind of thread.
fn calls(traces: &Path) -> Result<BTreeMap<&'static str, HashSet<Call>>, Error> {
    let mut calls = BTreeMap::<_, HashSet<Call>>::new();
    for entry in fs::read_dir(traces).map_err(Error::file("read", traces))? {
        let path = entry.map_err(Error::file("read", traces))?.path();
        let file = File::open(&path).map_err(Error::file("open", &path))?;
        let mut filtered = HashSet::new();
        for line in BufReader::new(file).split(b'\n') {
            let line = line.map_err(Error::file("read", &path))?;
            let Some(line) = Line::parse(&String::from_utf8_lossy(&line)) else { continue };
            if line.call.0 == "seccomp" {
                filtered.insert(line.thread);
            } else if filtered.contains(&line.thread) {
                calls.entry(line.kind).or_default().insert(line.call);
            }
        }
    }
    Ok(calls)
}

/// A line of strace that begins a call.
#[derive(Debug, PartialEq)]
struct Line {
    thread: u32,
    kind: &'static str,
    call: Call,
}

impl Line {
    /// Of `PID<NAME> CALL(ARGUMENT, …) = …`, or with ` <unfinished ...>` in place of the end.
    fn parse(text: &str) -> Option<Self> {
        let (thread, rest) = text.split_once('<')?;
        let (name, rest) = rest.split_once("> ")?;
        let (call, rest) = rest.trim_start().split_once('(')?;
        if !call.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return None;
        }
        let arguments = rest.split_once(')').map_or(rest, |(arguments, _)| arguments);
        let arguments = arguments.split(" <unfinished").next()?.split(", ");
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        };
        let kind = match name {
            "api" => "api",
            name if name.starts_with("vcpu") => "vcpu",
            _ => "vmm",
        };
        let arguments = arguments.filter_map(number).collect();
        Some(Self { thread: thread.trim().parse().ok()?, kind, call: (call.to_owned(), arguments) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &[u64]) -> Call {
        (name.to_owned(), arguments.to_vec())
    }

    #[test]
    fn lines_that_begin_a_call_are_read() {
        let line = |thread, kind, call| Some(Line { thread, kind, call });
        for (text, expected) in [
            ("5420<api> fcntl(0, 0x1, 0) = 0", line(5420, "api", call("fcntl", &[0, 1, 0]))),
            (
                "7<vcpu12> ioctl(0xd, 0xae80, 0 <unfinished ...>",
                line(7, "vcpu", call("ioctl", &[13, 0xae80, 0])),
            ),
            ("7<cofferdam-vmm>   getpid() = 0x7", line(7, "vmm", call("getpid", &[]))),
            ("7<vcpu0> <... ioctl resumed>) = 0", None),
            ("7<api> +++ exited with 0 +++", None),
            ("7<api> --- SIGSYS {si_signo=SIGSYS} ---", None),
            ("", None),
        ] {
            assert_eq!(Line::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_rule_allows_what_meets_its_conditions() {
        let rule = |text: &str| serde_json::from_str::<Rule>(text).unwrap();
        let run = rule(
            r#"{"syscall": "ioctl", "args": [{"index": 1, "type": "dword", "op": "eq", "val": 44672}], "comment": "debug: x"}"#,
        );
        assert!(run.allows(&call("ioctl", &[5, 0xae80])) && run.allows(&call("ioctl", &[5, 0x1_0000_ae80])));
        for other in [call("ioctl", &[5, 0xae81]), call("ioctl", &[5]), call("fcntl", &[5, 0xae80])] {
            assert!(!run.allows(&other), "{other:?}");
        }
        assert!(!run.is_shipped() && !run.is_excused());
        let map = rule(
            r#"{"syscall": "mmap", "args": [{"index": 2, "type": "qword", "op": {"masked_eq": 4}, "val": 0}], "comment": "musl: Not in tests: x"}"#,
        );
        assert!(map.allows(&call("mmap", &[0, 1, 3])) && !map.allows(&call("mmap", &[0, 1, 5])));
        assert!(map.is_shipped() && map.is_excused());
    }

    #[test]
    fn the_policies_can_be_read() {
        let policies = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(POLICIES);
        for kind in KINDS {
            assert!(rules(&policies, kind).unwrap().len() > 10, "{kind}");
        }
    }
}
