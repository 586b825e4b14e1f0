//! A line on a terminal that says what takes long, and for how long already.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What takes less is not worth a line.
const PATIENCE: Duration = Duration::from_secs(1);

/// A line that is shown after a second, told the time each second, and gone when this is dropped. Without a terminal on
/// standard error there is none.
pub struct Waiting {
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Waiting {
    /// For what `words` say, which begins now.
    pub fn new(words: &'static str) -> Self {
        Self::since(Instant::now(), words)
    }

    /// For what `words` say, which began at `start`.
    pub fn since(start: Instant, words: &'static str) -> Self {
        if !io::stderr().is_terminal() {
            return Self { thread: None };
        }
        let (sender, stop) = channel::<()>();
        // Without a thread there is no line.
        let thread = thread::Builder::new().name("waiting".to_owned()).spawn(move || {
            let mut shown = false;
            while stop.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                show(&format!("\r\x1b[Kcofferdam: {words}: {} s", start.elapsed().as_secs()));
                shown = true;
            }
            if shown {
                show("\r\x1b[K");
            }
        });
        Self { thread: thread.ok().map(|thread| (sender, thread)) }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            // What is said next must not meet the line.
            let _ = thread.join();
        }
    }
}

fn show(text: &str) {
    let mut stderr = io::stderr().lock();
    // Who closed standard error does not want it.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
