//! Boots the rig and looks at what comes back. These tests need the assets
//! (`cargo xtask assets`) and take some seconds each, so they run on demand:
//! `cargo test -p xtask --test rig -- --ignored`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn rig(options: &[&str], script: &str, arguments: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("rig").args(options).args(["--", "sh", "-c", script, "sh"]).args(arguments);
    command.output().unwrap()
}

/// Every byte value, in an order that no text conversion would leave alone.
fn binary(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index.wrapping_mul(index) >> 3) as u8).collect()
}

#[test]
#[ignore = "boots the rig"]
fn output_status_and_files_come_back() {
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let (out, err) = (binary(1 << 20), binary(300_001));
    fs::write(directory.path().join("out"), &out).unwrap();
    fs::write(directory.path().join("err"), &err).unwrap();
    // The background process must not hold up the end.
    let script = r#"cd "$1" && cat out; cat err >&2; cp out copy; sleep 1000 & exit 7"#;
    let output = rig(&[], script, &[directory.path()]);
    assert_eq!(output.status.code(), Some(7));
    assert!(output.stdout == out, "stdout differs: {} bytes", output.stdout.len());
    assert!(output.stderr == err, "stderr differs: {}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::read(directory.path().join("copy")).unwrap() == out);
}

#[test]
#[ignore = "boots the rig"]
fn the_machine_has_kvm_and_the_callers_surroundings() {
    let script = r#"test -w /dev/kvm && cat /sys/module/kvm_amd/parameters/npt && pwd && echo "$A" && cat /proc/self/mounts |
        grep -c ' /run tmpfs' && touch "$1" && kill -9 $$"#;
    // Not below the checkout, which may itself lie in a directory that is passed through.
    let outside = Path::new("/written-in-the-rig");
    let output = rig(&["-e", "A=it's \"$1\""], script, &[outside]);
    let text = String::from_utf8_lossy(&output.stdout);
    let directory = std::env::current_dir().unwrap();
    assert_eq!(text, format!("Y\n{}\nit's \"$1\"\n1\n", directory.display()));
    assert_eq!(output.status.code(), Some(137));
    assert!(!outside.exists(), "only the directories passed through are written to");
}

#[test]
#[ignore = "boots the rig"]
fn a_run_that_takes_too_long_is_ended_and_says_so() {
    let output = rig(&["--timeout", "1"], "sleep 1000", &[]);
    assert_eq!(output.status.code(), Some(124));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no end after 1 s"));
}
