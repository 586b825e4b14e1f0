//! The commands that look after domains which run: two at once, in foreground and background, and what is left when
//! their processes are killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_tests::{host, place};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);

/// A run directory of its own. Domains that are left in it at the end are killed.
struct Host {
    folder: TempDir,
}

impl Host {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(place::cofferdam());
        command.args(words).env("COFFERDAM_RUN_DIR", self.run_dir()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn ask(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Standard output of a command that has to succeed.
    fn done(&self, words: &[&str]) -> String {
        let output = self.ask(words);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {}", stderr(&output));
        stdout(&output)
    }

    /// Standard error of a command that has to end with `code`.
    fn refused(&self, words: &[&str], code: i32) -> String {
        let output = self.ask(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}{}", stdout(&output), stderr(&output));
        stderr(&output)
    }

    fn run(&self, payload: &str, id: &str, more: &[&str]) -> Command {
        let kernel = place::payload(payload).display().to_string();
        // Some machines interpret the first stage, and take seconds to hash a payload.
        let words = ["run", "--boot", "direct", "--memory", "64M", "--kernel", &kernel, "--id", id];
        let time: &[&str] = if more.contains(&"--stop-timeout") { &[] } else { &["--stop-timeout", "300ms"] };
        self.command(&[&words[..], time, more].concat())
    }

    /// Starts a domain in the background.
    fn detach(&self, payload: &str, id: &str, more: &[&str]) {
        let output = self.run(payload, id, &[&["--detach"], more].concat()).output().unwrap();
        assert_eq!(stdout(&output), format!("{id}\n"), "{}", stderr(&output));
        assert!(stderr(&output).contains("runs on platform plain: not protected"), "{}", stderr(&output));
    }

    /// Starts a domain in the foreground, and waits until it runs.
    fn foreground(&self, payload: &str, id: &str, more: &[&str]) -> Child {
        let mut child = self.run(payload, id, more).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.contains("not protected"), "{line}");
        // What comes later is nobody's, but it can be written.
        thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        child
    }

    /// The domains that live. A monitor may not answer in the time that `ps` gives it, on a busy machine.
    fn ps(&self) -> Vec<Value> {
        let mut domains = Vec::<Value>::new();
        eventually("every monitor answers", || {
            domains = serde_json::from_str(&self.done(&["ps", "--json"])).unwrap();
            domains.iter().all(|domain| !domain["state"].is_null())
        });
        domains
    }

    fn ids(&self) -> Vec<String> {
        self.ps().iter().map(|domain| domain["id"].as_str().unwrap().to_owned()).collect()
    }

    fn monitor(&self, id: &str) -> Pid {
        let domains = self.ps();
        let domain = domains.iter().find(|domain| domain["id"] == id).expect("it runs");
        Pid::from_raw(domain["pid"].as_i64().unwrap().try_into().unwrap()).unwrap()
    }

    /// Names of the entries that there are, live or not.
    fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.run_dir()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for id in self.entries() {
            let _ = self.command(&["stop", &id, "--timeout", "0"]).output();
        }
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The process that started `child`.
fn parent(child: Pid) -> Pid {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.as_raw_nonzero())).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    Pid::from_raw(after_name.split(' ').nth(1).unwrap().parse().unwrap()).unwrap()
}

#[test]
fn two_domains_are_listed_inspected_held_and_stopped() {
    let host = Host::new();
    assert!(host.ps().is_empty());
    assert_eq!(host.done(&["ps"]).lines().count(), 1);
    assert!(!host.run_dir().exists(), "looking makes nothing");
    host.detach("spin", "two", &["--cpus", "2"]);
    let mut one = host.foreground("spin", "one", &[]);

    let table = host.done(&["ps"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let head = "ID STATE PLATFORM PROTECTION PID UPTIME VCPUS MEMORY CONTAINER";
    assert_eq!(rows[0].join(" "), head);
    assert_eq!(rows[1][..5], ["one", "running", "plain", "not", "protected"]);
    assert_eq!((rows[2][0], &rows[2][7..]), ("two", &["2", "64", "MiB", "-"][..]));
    assert!(!table.contains('\x1b'));
    let domains = host.ps();
    assert_eq!((&domains[1]["vcpu_count"], &domains[1]["mem_size_mib"]), (&json!(2), &json!(64)));
    assert_eq!((&domains[0]["protected"], &domains[0]["state"]), (&json!(false), &json!("Running")));
    assert!(test_kill_process(host.monitor("two")).is_ok());

    let seen: Value = serde_json::from_str(&host.done(&["inspect", "two"])).unwrap();
    assert_eq!((&seen["status"]["state"], &seen["status"]["protected"]), (&json!("Running"), &json!(false)));
    let machine = &seen["config"]["machine-config"];
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(64)));
    assert_eq!(seen["pid"], domains[1]["pid"]);
    assert!(PathBuf::from(seen["api_socket"].as_str().unwrap()).exists());

    for _ in 0..2 {
        assert_eq!(host.done(&["pause", "two"]), "domain two is paused on platform plain: not protected\n");
    }
    let states: Vec<Value> = host.ps().iter().map(|domain| domain["state"].clone()).collect();
    assert_eq!(states, [json!("Running"), json!("Paused")]);
    assert_eq!(host.done(&["resume", "two"]), "domain two is running on platform plain: not protected\n");

    let waiting = host.command(&["wait", "two"]).spawn().unwrap();
    let hard = "stopped hard: the guest did not power off within";
    assert!(host.done(&["stop", "two"]).starts_with(&format!("domain two: {hard} 300 ms")));
    let waited = waiting.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(143));
    assert!(
        stdout(&waited).starts_with(&format!("domain two, not protected: {hard}")),
        "{}",
        stdout(&waited)
    );
    assert_eq!(host.entries(), ["one"]);
    assert!(host.done(&["stop", "one", "--timeout", "50ms"]).contains("within 50 ms"));
    assert_eq!(one.wait().unwrap().code(), Some(143));
    assert_eq!(host.entries(), [""; 0]);
}

#[test]
fn a_stop_with_no_time_is_hard_at_once() {
    let host = Host::new();
    host.detach("spin", "d", &["--stop-timeout", "1000m"]);
    assert_eq!(host.done(&["stop", "d", "--timeout", "0"]), "domain d: stopped hard on request\n");
    assert_eq!(host.entries(), [""; 0]);
    assert_eq!(host.ask(&["wait", "d"]).status.code(), Some(143), "how it ended is kept");
}

#[test]
fn logs_are_what_the_console_printed() {
    let host = Host::new();
    host.detach("chatter", "back", &["--cmdline", "lines=2000"]);
    let front = host.foreground("chatter", "front", &["--cmdline", "lines=2000"]);
    let followed = host.ask(&["logs", "--follow", "front"]);
    let shown = front.wait_with_output().unwrap();
    assert_eq!(shown.status.code(), Some(42));
    // One who came late, when all was over or just then, is told so.
    if followed.status.success() {
        assert!(followed.stdout == shown.stdout, "{}", stdout(&followed));
    } else {
        let told = stderr(&followed);
        assert!(told.contains("there is no domain") || told.contains("domain front has ended"), "{told}");
    }
    host.ask(&["wait", "back"]);

    host.detach("chatter", "endless", &[]);
    eventually("it has printed", || host.done(&["logs", "endless"]).contains("line 100\n"));
    assert!(host.done(&["logs", "endless"]).starts_with("line 1\nline 2\n"));
    let monitor = host.done(&["logs", "--monitor", "endless"]);
    assert_eq!(monitor, "domain endless runs on platform plain: not protected\n");
    let mut following = host.command(&["logs", "-f", "endless"]).spawn().unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "line 1");
    host.done(&["stop", "endless"]);
    let last = lines.map(Result::unwrap).last();
    assert!(last.is_some() && following.wait().unwrap().success(), "it ends with its domain");
}

#[test]
fn a_console_elsewhere_is_not_kept_and_no_log_is_there() {
    let host = Host::new();
    host.detach("spin", "quiet", &["--console", "none"]);
    let mut front = host.foreground("spin", "front", &[]);
    assert!(host.refused(&["logs", "quiet"], 125).contains("it is not on stdio"));
    assert!(host.refused(&["logs", "--monitor", "front"], 125).contains("it runs in the foreground"));
    host.done(&["stop", "front"]);
    front.wait().unwrap();
}

#[test]
fn a_domain_in_the_background_ends_like_others() {
    let host = Host::new();
    let foreground = stdout(&host.run("hello", "f", &["--json"]).output().unwrap());
    let fields = |text: &str| -> Vec<String> {
        let outcome: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(outcome["protected"], json!(false));
        outcome.as_object().unwrap().keys().cloned().collect()
    };
    for (payload, code) in [("hello", 42), ("panic", 121), ("triple-fault", 122)] {
        host.detach(payload, "d", &[]);
        // Early or late.
        for _ in 0..2 {
            let waited = host.ask(&["wait", "--json", "d"]);
            assert_eq!(waited.status.code(), Some(code), "{payload}: {}", stderr(&waited));
            assert_eq!(fields(&stdout(&waited)), fields(&foreground), "{payload}");
        }
        assert_eq!(host.entries(), [""; 0]);
    }
}

#[test]
fn a_start_in_the_background_that_fails_is_told() {
    let host = Host::new();
    let failed = host.run("hello", "d", &["--detach", "--drive", "path=/nowhere"]).output().unwrap();
    assert_eq!((failed.status.code(), stdout(&failed)), (Some(125), String::new()));
    assert!(stderr(&failed).contains("/nowhere"), "{}", stderr(&failed));
    let refused = host.run("hello", "d", &["--detach", "--cpus", "99"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(125));
    assert!(stderr(&refused).contains("--cpus: 99 is not between"), "{}", stderr(&refused));
    assert_eq!(host.entries(), [""; 0]);
}

#[test]
fn an_id_is_used_once_at_a_time() {
    let host = Host::new();
    let starts: Vec<Child> =
        (0..8).map(|_| host.run("spin", "same", &["--detach"]).spawn().unwrap()).collect();
    let outputs: Vec<Output> = starts.into_iter().map(|start| start.wait_with_output().unwrap()).collect();
    let (ran, refused): (Vec<&Output>, Vec<&Output>) =
        outputs.iter().partition(|output| output.status.code() == Some(0));
    assert_eq!(ran.len(), 1);
    for output in refused {
        assert_eq!(output.status.code(), Some(125));
        assert!(
            stderr(output).contains("--id: a domain \"same\" is there already, in "),
            "{}",
            stderr(output)
        );
    }
    assert_eq!(host.ids(), ["same"]);
    host.done(&["stop", "same"]);
    host.detach("spin", "same", &[]);
}

#[test]
fn what_is_not_there_or_no_id_is_refused_by_every_command() {
    let host = Host::new();
    host.detach("spin", "here", &[]);
    for command in ["inspect", "logs", "stop", "pause", "resume", "wait"] {
        let message = host.refused(&[command, "there"], 125);
        assert!(message.contains("there is no domain \"there\" in "), "{command}: {message}");
        assert!(message.ends_with("; there is here\n"), "{command}: {message}");
        for id in ["a/b", "..", ".", "", &"x".repeat(65), "a b"] {
            let message = host.refused(&[command, id], 125);
            assert!(message.starts_with("cofferdam: ID: "), "{command} {id:?}: {message}");
        }
        assert!(host.refused(&[command], 125).contains("<ID>"));
    }
    for id in ["a/b", ".."] {
        let output = host.run("hello", id, &[]).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert!(stderr(&output).contains("--id: "), "{}", stderr(&output));
    }
}

#[test]
fn a_run_directory_that_others_can_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    fs::create_dir(host.run_dir()).unwrap();
    fs::set_permissions(host.run_dir(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(host.refused(&["ps"], 125).contains("chmod 700"));
    let output = host.run("hello", "d", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("its mode is 755"), "{}", stderr(&output));
}

/// Whichever process is killed, nothing is shown that does not live, and what it left is removed.
#[test]
fn kill_9_leaves_nothing_that_is_shown() {
    let host = Host::new();
    let monitor_id = || host.monitor("d");

    host.detach("spin", "d", &[]);
    let waiting = host.command(&["wait", "d"]).spawn().unwrap();
    kill_process(monitor_id(), Signal::KILL).unwrap();
    eventually("the command removes the entry", || host.entries().is_empty());
    assert_eq!(waiting.wait_with_output().unwrap().status.code(), Some(124));
    let late = host.ask(&["wait", "d"]);
    assert_eq!(late.status.code(), Some(124));
    assert!(stdout(&late).contains("signal 9"), "{}", stdout(&late));

    // Without its command the domain stops in order, and is there for so long: here until a signal stops it hard.
    host.detach("spin", "d", &["--stop-timeout", "60m"]);
    let monitor = monitor_id();
    let command = parent(monitor);
    kill_process(command, Signal::KILL).unwrap();
    assert_eq!(host.ids(), ["d"]);
    assert!(stderr(&host.run("hello", "d", &[]).output().unwrap()).contains("is there already"));
    eventually("the monitor ends", || kill_process(monitor, Signal::TERM).is_err());
    assert_eq!(host.entries(), [""; 0], "the monitor has removed it");
    assert_eq!(host.ids(), [""; 0]);

    // Both, and the next start takes the place.
    for next_is_a_start in [false, true] {
        host.detach("spin", "d", &[]);
        host.detach("spin", "other", &[]);
        let monitor = monitor_id();
        for process in [parent(monitor), monitor] {
            kill_process(process, Signal::KILL).unwrap();
        }
        eventually("the monitor ends", || test_kill_process(monitor).is_err());
        if next_is_a_start {
            host.detach("spin", "d", &[]);
            host.done(&["stop", "d"]);
        } else {
            assert!(host.refused(&["stop", "d"], 125).contains("; there is other"));
        }
        assert_eq!(host.entries(), ["other"]);
        host.done(&["stop", "other"]);
    }
}

/// A run removes what others have left, too.
#[test]
fn a_start_sweeps() {
    let host = Host::new();
    host.detach("spin", "left", &[]);
    let monitor = host.monitor("left");
    for process in [parent(monitor), monitor] {
        kill_process(process, Signal::KILL).unwrap();
    }
    eventually("the monitor ends", || test_kill_process(monitor).is_err());
    host.detach("spin", "next", &[]);
    eventually("it is removed", || host.entries() == ["next"]);
}

#[test]
fn a_monitor_that_does_not_answer_is_told_in_time() {
    let host = Host::new();
    host.detach("spin", "stuck", &[]);
    let monitor = host.monitor("stuck");
    kill_process(monitor, Signal::STOP).unwrap();
    let table = host.done(&["ps"]);
    assert!(table.contains("no answer  -         not protected"), "{table}");
    assert!(host.refused(&["inspect", "stuck"], 124).contains("domain stuck: no answer within 10000 ms"));
    kill_process(monitor, Signal::CONT).unwrap();
    assert_eq!(host.ps()[0]["state"], "Running");
}

#[test]
fn fifty_starts_leave_no_entry() {
    let host = Host::new();
    let starts: Vec<String> = (0..50).map(|_| host::unique_id()).collect();
    for ids in starts.chunks(5) {
        let runs: Vec<Child> = ids.iter().map(|id| host.run("hello", id, &[]).spawn().unwrap()).collect();
        for run in runs {
            assert_eq!(run.wait_with_output().unwrap().status.code(), Some(42));
        }
        assert_eq!(host.entries(), [""; 0]);
    }
    assert_eq!(host.ids(), [""; 0]);
}
