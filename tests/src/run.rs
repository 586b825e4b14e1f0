//! `cofferdam run`, from arguments to outcome.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cofferdam_api::status::Outcome;
use rustix::process::{Pid, Signal, kill_process};

use crate::place;

/// How long anything may take before a test gives up. Generous: the rig is an emulator on a shared machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// A `cofferdam run --json` to be.
pub struct Run {
    wrapper: Vec<OsString>,
    arguments: Vec<OsString>,
}

impl Run {
    /// Runs `kernel`, which the monitor loads itself. (Some machines interpret the first stage, and take seconds to hash
    /// a payload.)
    pub fn new(kernel: impl AsRef<Path>) -> Self {
        Self::verified(kernel).with("boot", "direct")
    }

    /// Runs `kernel` by the default way: from an image that is composed in memory, loaded by the first stage.
    pub fn verified(kernel: impl AsRef<Path>) -> Self {
        Self::bare().with("kernel", kernel.as_ref())
    }

    /// Runs the image in a file.
    pub fn image(path: impl AsRef<Path>) -> Self {
        Self::bare().with("image", path.as_ref())
    }

    fn bare() -> Self {
        Self { wrapper: Vec::new(), arguments: ["run".into(), "--json".into()].into() }
    }

    /// Has `wrapper` start the command: a program and its arguments, to which those of the command are added.
    pub fn wrapped(mut self, wrapper: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.wrapper.extend(wrapper.into_iter().map(Into::into));
        self
    }

    /// Adds `--NAME VALUE`.
    pub fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.arguments.push(format!("--{name}").into());
        self.arguments.push(value.as_ref().into());
        self
    }

    /// Adds `--NAME`.
    pub fn flag(mut self, name: &str) -> Self {
        self.arguments.push(format!("--{name}").into());
        self
    }

    /// Runs it to its end, without input.
    pub fn finish(self) -> Finished {
        let mut running = self.start();
        drop(running.stdin());
        running.finish()
    }

    /// Starts it.
    pub fn start(self) -> Running {
        let mut words = self.wrapper.into_iter().chain([place::cofferdam().into()]).chain(self.arguments);
        let mut child = Command::new(words.next().expect("there is the command at least"))
            .args(words)
            .env("COFFERDAM_RUN_DIR", place::run_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cofferdam starts");
        let stdout = Collector::start(child.stdout.take().expect("stdout is piped"));
        let stderr = Collector::start(child.stderr.take().expect("stderr is piped"));
        Running { stdin: child.stdin.take(), child, stdout, stderr }
    }
}

/// A `cofferdam run` that runs. Dropped before its end, it is killed.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Collector,
    stderr: Collector,
}

impl Running {
    /// The console's input.
    pub fn stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("stdin is taken once")
    }

    /// Waits until the console has shown `text`.
    pub fn wait_for(&self, text: &str) {
        if !self.stdout.wait_for(text.as_bytes()) {
            panic!(
                "no {text:?} on the console:\n{}\nand on stderr:\n{}",
                self.stdout.text(),
                self.stderr.text()
            );
        }
    }

    /// Waits until stderr has shown `text`.
    pub fn wait_for_message(&self, text: &str) {
        assert!(self.stderr.wait_for(text.as_bytes()), "no {text:?} on stderr:\n{}", self.stderr.text());
    }

    /// Process id of `cofferdam`.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Process id of the monitor that it started.
    pub fn monitor_pid(&self) -> Pid {
        self.monitor().expect("the monitor is a child of cofferdam")
    }

    /// Process id of the monitor, if it has been started and has not ended.
    pub fn monitor(&self) -> Option<Pid> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = std::fs::read_to_string(path).ok()?;
        Pid::from_raw(children.split_whitespace().next()?.parse().expect("a number"))
    }

    /// Sends a signal to `cofferdam`.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("cofferdam is there");
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Finished {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("cofferdam can be waited for") {
                break status;
            }
            if Instant::now() > end {
                let (out, err) = (self.stdout.text(), self.stderr.text());
                panic!("cofferdam does not end; console:\n{out}\nstderr:\n{err}");
            }
            thread::sleep(Duration::from_millis(5));
        };
        Finished { status, stdout: self.stdout.finish(), stderr: self.stderr.finish() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is left of a `cofferdam run`.
#[derive(Debug)]
pub struct Finished {
    /// How the process ended.
    pub status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Finished {
    /// The exit status.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("killed: {self}"))
    }

    /// The last line of stdout, which is the outcome.
    pub fn outcome(&self) -> Outcome {
        let (_, line) = self.split();
        serde_json::from_slice(line)
            .unwrap_or_else(|error| panic!("the last line is no outcome: {error}: {self}"))
    }

    /// What the guest printed.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(self.split().0).into_owned()
    }

    /// What `cofferdam` said on stderr.
    pub fn messages(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    fn split(&self) -> (&[u8], &[u8]) {
        let text = self.stdout.strip_suffix(b"\n").unwrap_or(&self.stdout);
        let start = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        text.split_at(start)
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stdout = String::from_utf8_lossy(&self.stdout);
        write!(f, "{}\nstdout:\n{stdout}\nstderr:\n{}", self.status, self.messages())
    }
}

/// Collects what comes from a pipe, while the test looks at it.
struct Collector {
    shared: Arc<(Mutex<Collected>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Collector {
    fn start(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Collected::default()), Condvar::new()));
        let thread = thread::spawn({
            let shared = shared.clone();
            move || {
                let mut buffer = [0; 4096];
                loop {
                    let length = from.read(&mut buffer).unwrap_or(0);
                    let mut collected = shared.0.lock().expect("no panic under the lock");
                    collected.bytes.extend_from_slice(&buffer[..length]);
                    collected.ended = length == 0;
                    shared.1.notify_all();
                    if length == 0 {
                        return;
                    }
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    fn wait_for(&self, text: &[u8]) -> bool {
        let found = |c: &Collected| c.bytes.windows(text.len()).any(|window| window == text);
        let guard = self.shared.0.lock().expect("no panic under the lock");
        let (guard, _) = self
            .shared
            .1
            .wait_timeout_while(guard, PATIENCE, |c| !c.ended && !found(c))
            .expect("no panic under the lock");
        found(&guard)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().expect("no panic under the lock").bytes).into_owned()
    }

    fn finish(&mut self) -> Vec<u8> {
        let thread = self.thread.take().expect("finished once");
        thread.join().expect("the collector ends");
        std::mem::take(&mut self.shared.0.lock().expect("no panic under the lock").bytes)
    }
}

/// Writes all of `bytes`; the other side is there.
pub fn send(mut to: impl Write, bytes: &[u8]) {
    to.write_all(bytes).expect("the other side reads");
    to.flush().expect("the other side reads");
}
