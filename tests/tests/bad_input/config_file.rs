//! The monitor's own `--config-file`, without the command in front of it.

use std::fs;
use std::process::Command;

use cofferdam_api::status::Event;
use cofferdam_tests::place;

use crate::table::{Table, fault_of_outcome};

/// Gives the monitor `config`, and checks that it refuses it in a message with all `words`, and says on standard error
/// what it reports.
fn refuse(row: &str, config: &[u8], words: &[&str]) {
    let table = Table::new();
    let (file, status) = (table.file("config.json", config), table.path("status"));
    let run = |more: &[&str]| {
        let mut command = Command::new(place::monitor());
        command.arg("--config-file").arg(&file).args(more).current_dir(table.folder()).output().unwrap()
    };
    let reported = run(&["--status-file", status.to_str().unwrap()]);
    let report = fs::read_to_string(&status).unwrap();
    let Ok(Event::Stopped(outcome)) = serde_json::from_str(report.trim_end()) else {
        panic!("{row}: not one line that says stopped: {report}")
    };
    let told = run(&[]);
    let message = String::from_utf8(told.stderr).unwrap();
    for word in words {
        assert!(outcome.message.contains(word), "{row}: no {word:?}: {}", outcome.message);
        assert!(message.contains(word), "{row}: no {word:?}: {message}");
    }
    assert_eq!(fault_of_outcome(&outcome), None, "{row}: {outcome:?}");
    assert_eq!((reported.status.code(), told.status.code()), (Some(125), Some(125)), "{row}");
    assert!(reported.stdout.is_empty() && told.stdout.is_empty(), "{row}");
    let files: Vec<_> =
        fs::read_dir(table.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "{row}: {files:?}");
}

/// A configuration of the smallest payload, with `more` fields.
fn config(more: &str) -> String {
    let kernel = place::payload("hello");
    format!(r#"{{"boot-source": {{"kernel_image_path": {kernel:?}}}{more}}}"#)
}

#[test]
fn what_is_no_configuration() {
    let good = config("");
    for (row, text, words) in [
        ("empty", "", "EOF while parsing"),
        ("cut off", &good[..good.len() - 1], "EOF while parsing an object at line 1"),
        ("not JSON", "kernel = vmlinux", "expected value at line 1 column 1"),
        ("two objects", &format!("{good}\n{good}"), "trailing characters at line 2 column 1"),
        ("not UTF-8", "\"\u{fffd}", "line 1"),
        ("a list", "[]", "line 1"),
        ("no kernel", "{}", "missing field `boot-source`"),
        ("too large", &" ".repeat((1 << 20) + 1), "the configuration is 1048577 bytes long; at most 1048576"),
    ] {
        refuse(row, text.as_bytes(), &["--config-file ", "config.json: ", words]);
    }
}

#[test]
fn fields_that_are_unknown_or_have_bad_values() {
    for (more, words) in [
        (r#", "machine": {}"#, "unknown field `machine`"),
        (
            r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "turbo": true}"#,
            "unknown field `turbo`",
        ),
        (r#", "drives": [{"drive_id": "a", "path_on_host": "b", "ro": true}]"#, "unknown field `ro`"),
        (r#", "balloon": {"amount_mib": 5}"#, "balloon: not supported"),
        (r#", "vsock": null, "vsock": null"#, "duplicate field `vsock`"),
        (r#", "confidential": {"platform": "sev"}"#, "unknown variant `sev`"),
        (
            r#", "machine-config": {"vcpu_count": 0, "mem_size_mib": 64}"#,
            "machine-config.vcpu_count: 0 is not",
        ),
        (
            r#", "machine-config": {"vcpu_count": 33, "mem_size_mib": 64}"#,
            "machine-config.vcpu_count: 33 is not",
        ),
        (
            r#", "machine-config": {"vcpu_count": 256, "mem_size_mib": 64}"#,
            "machine-config.vcpu_count: 256 is not",
        ),
        (
            r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": 31}"#,
            "machine-config.mem_size_mib: 31 is not",
        ),
        (r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": -1}"#, "-1"),
        (r#", "stop_timeout_ms": 86400001"#, "stop_timeout_ms: 86400001 is not between"),
        (
            r#", "drives": [{"drive_id": "a", "path_on_host": "b", "block_size": 1024}]"#,
            "drives[0].block_size: 1024 is neither 512 nor 4096",
        ),
        (
            r#", "drives": [{"drive_id": "a", "path_on_host": "b"}, {"drive_id": "a", "path_on_host": "c"}]"#,
            "drives[1].drive_id: \"a\" is used twice",
        ),
        (r#", "serial": {"mode": "File"}"#, "serial.serial_out_path: is missing"),
        (r#", "serial": {"mode": "None", "serial_out_path": "log"}"#, "serial.serial_out_path: is given"),
    ] {
        refuse(more, config(more).as_bytes(), &[words]);
    }
}

#[test]
fn a_command_line_with_a_nul_or_too_long() {
    let kernel = place::payload("hello");
    let with = |line: &str| {
        format!(r#"{{"boot-source": {{"kernel_image_path": {kernel:?}, "boot_args": "{line}"}}}}"#)
    };
    let nul = with("quiet\\u0000rw");
    refuse("NUL", nul.as_bytes(), &["boot-source.boot_args: has a NUL byte at position 5"]);
    let long = with(&"x".repeat(2049));
    refuse(
        "2049 bytes",
        long.as_bytes(),
        &["boot-source.boot_args: 2049 bytes long; at most 2048 are possible"],
    );
}

#[test]
fn a_file_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    for (path, reason) in [(missing.as_path(), "No such file"), (folder.path(), "Is a directory")] {
        let output = Command::new(place::monitor()).arg("--config-file").arg(path).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{message}");
        let named = format!("--config-file {}: {reason}", path.display());
        assert!(message.contains(&named), "{named}: {message}");
    }
}
