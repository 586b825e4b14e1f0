//! A running monitor and its guest's console, on which lines `bench NAME VALUE`
//! matter and all else is kept for the case that something fails.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// How long a guest may be silent.
const PATIENCE: Duration = Duration::from_secs(240);

/// A monitor that runs. Dropped before its end, it is killed.
pub struct Console {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    /// What has come so far.
    seen: String,
}

impl Console {
    /// Starts a monitor.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take().ok_or("no stdin")?;
        let stdout = child.stdout.take().ok_or("no stdout")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Without a receiver the lines are of no interest.
            read_lines(stdout, |line| sender.send(line).is_ok());
        });
        Ok(Self { child, stdin, lines, seen: String::new() })
    }

    /// Types a line.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.stdin.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// The value of the next line `bench NAME VALUE`.
    pub fn wait_for(&mut self, name: &str) -> Result<f64> {
        loop {
            let line = match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(error) => return Err(self.failure(&format!("no {name:?}: {error}"))),
            };
            self.keep(&line);
            if let Some((found, value)) = parse(&line)
                && found == name
            {
                return Ok(value);
            }
        }
    }

    /// The monitor's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the monitor has ended. Returns the last line.
    pub fn end(mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.keep(&line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Err(self.failure("the monitor does not end")),
            }
        }
        let status = self.child.wait()?;
        if !status.success() {
            return Err(self.failure(&format!("the monitor ended with {status}")));
        }
        Ok(self.seen.lines().last().unwrap_or_default().to_owned())
    }

    fn keep(&mut self, line: &str) {
        self.seen.push_str(line);
        self.seen.push('\n');
    }

    fn failure(&self, what: &str) -> Box<dyn std::error::Error> {
        format!("{what}; the guest's console:\n{}", self.seen).into()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Either fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(stdout: ChildStdout, mut take: impl FnMut(String) -> bool) {
    for line in BufReader::new(stdout).split(b'\n') {
        let Ok(line) = line else { return };
        if !take(String::from_utf8_lossy(&line).into_owned()) {
            return;
        }
    }
}

/// Name and value of a line that matters.
fn parse(line: &str) -> Option<(&str, f64)> {
    let mut words = line.split_ascii_whitespace();
    let (mark, name, value) = (words.next()?, words.next()?, words.next()?);
    let value = value.parse().ok()?;
    (mark == "bench").then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Console {
        Console::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn lines_of_the_console_are_measurements_or_nothing() {
        assert_eq!(parse("bench random_read 12.5\r"), Some(("random_read", 12.5)));
        for other in ["", "bench", "bench x", "bench x y", "[ 0.1] bench x 1"] {
            assert!(parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn a_guest_is_asked_and_answers() {
        let mut console = shell("read name; echo noise; echo bench $name 7");
        console.send("x").unwrap();
        assert_eq!(console.wait_for("x").unwrap(), 7.0);
        console.end().unwrap();
    }

    #[test]
    fn a_guest_that_fails_is_shown() {
        let mut console = shell("echo oops");
        assert!(console.wait_for("x").unwrap_err().to_string().contains("oops"));
        let console = shell("echo oops; exit 3");
        assert!(console.end().unwrap_err().to_string().contains("oops"));
    }
}
