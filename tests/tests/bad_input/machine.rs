//! vCPUs and memory, and options that make no sense.

use cofferdam_tests::Run;

use crate::table::{Table, hello};

#[test]
fn numbers_out_of_range() {
    let mut table = Table::new();
    for (option, value, message) in [
        ("cpus", "0", "--cpus: 0 is not between 1 and 32"),
        ("cpus", "33", "--cpus: 33 is not between 1 and 32"),
        ("cpus", "256", "--cpus: 256 is not between 1 and 32"),
        ("cpus", "-1", "--cpus"),
        ("cpus", "two", "--cpus"),
        ("memory", "0M", "--memory: 0 MiB is not between 32 and 65536 MiB"),
        ("memory", "31M", "--memory: 31 MiB is not between 32 and 65536 MiB"),
        ("memory", "65G", "--memory: 66560 MiB is not between 32 and 65536 MiB"),
        ("memory", "65537M", "--memory: 65537 MiB is not between 32 and 65536 MiB"),
        ("memory", "33000K", "--memory: 33792000 bytes are not a whole number of MiB"),
        ("memory", "256", "\"256\" has no unit: write 256M for MiB, 256G for GiB"),
        ("memory", "99999999999999999999G", "--memory"),
        ("stop-timeout", "25000m", "--stop-timeout: 1500000000 ms is not between 0 and 86400000 ms"),
        ("platform", "sev", "--platform"),
        ("boot-protocol", "uefi", "--boot-protocol"),
        ("vmm", "/nonexistent/vmm", "cannot start the monitor /nonexistent/vmm: No such file"),
    ] {
        table.refuses(&format!("--{option} {value}"), hello().with(option, value), &[message]);
    }
    for (option, value) in [("cpus", "32"), ("memory", "32M"), ("memory", "64G")] {
        table.accepts(&format!("--{option} {value}"), hello().with(option, value), 42);
    }
    table.end();
}

#[test]
fn bad_names_and_paths() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut table = Table::new();
    let not_utf8 = OsStr::from_bytes(b"a\xff");
    table.refuses("kernel", Run::new(not_utf8), &["--kernel: the path \"a\\xFF\" is not UTF-8"]);
    table.refuses(
        "initrd",
        hello().with("initrd", not_utf8),
        &["--initrd: the path \"a\\xFF\" is not UTF-8"],
    );
    table.refuses("empty", hello().with("initrd", ""), &["--initrd"]);
    table.end();
}

#[test]
fn a_console_file_that_cannot_be_written() {
    let mut table = Table::new();
    let console =
        |table: &Table, name: &str| hello().with("console", format!("file={}", table.path(name).display()));
    let directory = table.directory("directory");
    let words = ["serial.serial_out_path: ", directory.to_str().unwrap(), "Is a directory"];
    table.refuses("a directory", console(&table, "directory"), &words);
    let words = ["serial.serial_out_path: ", "no/log", "No such file or directory"];
    table.refuses("in a missing directory", console(&table, "no/log"), &words);
    table.refuses("no path", hello().with("console", "file="), &["--console: is empty"]);
    table.refuses(
        "unknown",
        hello().with("console", "tty"),
        &["--console", "it is stdio, none or file=FILE"],
    );
    // What comes before the console is refused before its file is made.
    let words = ["vsock.uds_path: ", directory.to_str().unwrap()];
    table.refuses("not made in vain", console(&table, "log").with("vsock", &directory), &words);
    table.end();
}
