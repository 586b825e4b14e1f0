//! Compiles the seccomp policies of `resources/seccomp` to the BPF programs that the monitor installs.
//!
//! A rule whose comment begins with `glibc:` or `musl:` is only for builds with that C library, one with `debug:` only
//! for those that are not release builds: the shipped monitor allows no more than it needs.

use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use seccompiler::{BpfProgram, TargetArch};
use serde_json::Value;

mod search;

/// The kinds of thread, each with a file of its name.
const KINDS: [&str; 3] = ["vmm", "vcpu", "api"];

/// What is built.
struct Build {
    architecture: TargetArch,
    environment: String,
    profile: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let build = Build {
        architecture: TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?,
        environment: env::var("CARGO_CFG_TARGET_ENV")?,
        profile: env::var("PROFILE")?,
    };
    let policies = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../resources/seccomp");
    let output = PathBuf::from(env::var("OUT_DIR")?);
    for kind in KINDS {
        let policy = policies.join(kind).with_extension("json");
        println!("cargo::rerun-if-changed={}", policy.display());
        let in_policy = |error| format!("{}: {error}", policy.display());
        let plain = compile(kind, &policy, &build).map_err(in_policy)?;
        let program = search::by_halves(&plain).map_err(in_policy)?;
        fs::write(output.join(kind).with_extension("rs"), source(&program)?)?;
        // What tests compare it with.
        fs::write(output.join(format!("{kind}.plain.rs")), source(&plain)?)?;
    }
    Ok(())
}

/// The program of the policy in `file`, which holds that of `kind` and no other.
fn compile(kind: &str, file: &Path, build: &Build) -> Result<BpfProgram, Box<dyn Error>> {
    let mut policies: Value = serde_json::from_reader(File::open(file)?)?;
    let rules =
        policies.get_mut(kind).and_then(|policy| policy.get_mut("filter")).and_then(Value::as_array_mut);
    rules.ok_or_else(|| format!("has no policy {kind:?} with a filter"))?.retain(|rule| is_for(rule, build));
    let mut programs = seccompiler::compile_from_json(policies.to_string().as_bytes(), build.architecture)?;
    let program = programs.remove(kind).ok_or_else(|| format!("has no policy {kind:?}"))?;
    match programs.into_keys().next() {
        Some(other) => Err(format!("has a policy {other:?}").into()),
        None => Ok(program),
    }
}

/// Whether the rule is for this build.
fn is_for(rule: &Value, build: &Build) -> bool {
    let comment = rule.get("comment").and_then(Value::as_str).unwrap_or_default();
    match comment.split_once(": ") {
        Some(("glibc", _)) => build.environment == "gnu",
        Some(("musl", _)) => build.environment == "musl",
        Some(("debug", _)) => build.profile == "debug",
        _ => true,
    }
}

/// The program as an expression of type `[sock_filter; N]`.
fn source(program: &BpfProgram) -> Result<String, Box<dyn Error>> {
    let mut source = String::from("[\n");
    for instruction in program {
        let seccompiler::sock_filter { code, jt, jf, k } = instruction;
        writeln!(source, "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")?;
    }
    source.push(']');
    Ok(source)
}
