//! Where the things under test lie.

use std::env;
use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

/// The shipped binary `name`: that of `make build`, or the one in the folder `$COFFERDAM_BIN`.
fn shipped(name: &str) -> PathBuf {
    match env::var_os("COFFERDAM_BIN") {
        Some(folder) => Path::new(&folder).join(name),
        None => built("x86_64-unknown-linux-musl", name, "make build"),
    }
}

fn built(target: &str, name: &str, how: &str) -> PathBuf {
    let target_dir = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target_dir.join(target).join("release").join(name);
    assert!(path.exists(), "{} is missing: run `{how}` first", path.display());
    path
}

/// The `cofferdam` command, as shipped.
pub fn cofferdam() -> PathBuf {
    shipped("cofferdam")
}

/// The run directory of the domains that tests start: not that of the machine, which others use.
pub fn run_dir() -> PathBuf {
    env::temp_dir().join(format!("cofferdam-tests-{}", rustix::process::geteuid().as_raw()))
}

/// The monitor, as shipped.
pub fn monitor() -> PathBuf {
    shipped("cofferdam-vmm")
}

/// The jailer, as shipped.
pub fn jailer() -> PathBuf {
    shipped("cofferdam-jailer")
}

/// The helper program that Linux guests run.
pub fn test_guest() -> PathBuf {
    built("x86_64-unknown-linux-musl", "test-guest", "make build")
}

/// A payload guest.
pub fn payload(name: &str) -> PathBuf {
    built("x86_64-unknown-none", name, "make payloads")
}

/// What Linux guests run to measure their devices.
pub fn bench_guest() -> PathBuf {
    built("x86_64-unknown-linux-musl", "bench-guest", "make build")
}

/// A program that the monitor or the jailer is held against: the least that can do a part of its work.
pub fn reference(name: &str) -> PathBuf {
    built("x86_64-unknown-linux-musl", name, "make bench")
}
