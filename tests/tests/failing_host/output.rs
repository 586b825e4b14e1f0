//! Standard output that is closed, full, or read by nobody: the guest goes on, and its exit code comes through.

use std::io::Read;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cofferdam_tests::place;
use rustix::process::{Pid, Signal, kill_process};

/// The command, without `--json`, whose guest prints `lines` lines.
fn chatter(wrapper: &str, more: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", wrapper, "sh"]).arg(place::cofferdam());
    command.args(["run", "--memory", "32M", "--kernel"]).arg(place::payload("chatter"));
    command.env("COFFERDAM_RUN_DIR", place::run_dir());
    command.args(more).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn messages(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn closed_from_the_start() {
    for json in [&[][..], &["--json"]] {
        let words = [&["--cmdline", "lines=1000"], json].concat();
        let output = chatter(r#"exec "$@" >&-"#, &words).output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{}", messages(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_full_disk_is_told_once_with_a_count() {
    let output = chatter(r#"exec "$@" > /dev/full"#, &["--cmdline", "lines=1000"]).output().unwrap();
    let text = messages(&output);
    assert_eq!(output.status.code(), Some(42), "{text}");
    let lines = |word: &str| text.lines().filter(|line| line.contains(word)).count();
    assert_eq!(lines("cannot write console output; it is dropped from here on"), 1, "{text}");
    // 9 of one digit, 90 of two, and so on; five letters and the end of each line.
    let bytes: usize = (1..=1000).map(|line: u32| format!("line {line}\n").len()).sum();
    assert_eq!(lines(&format!("{bytes} bytes of console output were lost")), 1, "{text}");
    assert_eq!(text.lines().count(), 4, "start, loss, count, end: {text}");
}

#[test]
fn a_file_that_may_not_grow_is_no_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("console");
    std::fs::File::create(&file).unwrap().set_len((64 << 20) - 100).unwrap();
    for json in [&[][..], &["--json"]] {
        let words = [&["--cmdline", "lines=1000"], json].concat();
        let script = format!(r#"exec prlimit --fsize=67108864 "$@" >> {}"#, file.display());
        let output = chatter(&script, &words).output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{}", messages(&output));
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 64 << 20);
    }
}

#[test]
fn a_reader_that_goes_away() {
    for json in [&[][..], &["--json"]] {
        let words = [&["--cmdline", "lines=2000"], json].concat();
        let mut child = chatter(r#"exec "$@""#, &words).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 100]).unwrap();
        drop(stdout);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(42), "{}", messages(&output));
    }
}

/// The guest waits for its reader; a signal ends it nevertheless, in time.
#[test]
fn a_reader_that_does_not_read() {
    for json in [&[][..], &["--json"]] {
        let words = [&["--stop-timeout", "100ms"], json].concat();
        let mut child = chatter(r#"exec "$@""#, &words).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 100]).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let pid = Pid::from_child(&child);
        // A second one ends the wait for the reader of what is left.
        let end = Instant::now() + Duration::from_secs(240);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "it does not end");
            let _ = kill_process(pid, Signal::TERM);
            std::thread::sleep(Duration::from_secs(1));
        };
        assert_eq!(status.code(), Some(143));
    }
}
