//! A process in a container that this command stands for: its streams, the signals and sizes of a terminal that are
//! passed on to it, and the line that says that it is not there yet.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Instant;

use cofferdam_container_manifest::Signal;
use rustix::stdio::stdin;
use rustix::termios::tcgetwinsize;

use crate::container::requests::{Request, Requests};
use crate::say::{Tone, say};
use crate::signals::ENDS;
use crate::streams::{Happened, Note, Streams, Which};
use crate::supervise::not_kept;
use crate::terminal::RawTerminal;
use crate::waiting::Waiting;

/// The signals that are caught for a container, as manifests name them.
const CAUGHT: [(libc::c_int, Signal); 7] = [
    (libc::SIGTERM, Signal::Term),
    (libc::SIGINT, Signal::Int),
    (libc::SIGHUP, Signal::Hup),
    (libc::SIGQUIT, Signal::Quit),
    (libc::SIGUSR1, Signal::Usr1),
    (libc::SIGUSR2, Signal::Usr2),
    (libc::SIGWINCH, Signal::Winch),
];

/// A process.
pub struct Attached {
    /// Its standard streams.
    pub streams: Streams,
    requests: Requests,
    /// Whether it has a terminal, and ours is one.
    terminal: bool,
    raw: Option<RawTerminal>,
    waiting: Option<Waiting>,
    start: Instant,
}

impl Attached {
    /// The process `id` of a container whose API is at `api`; without an id its own. `terminal` tells whether it has a
    /// terminal, and our standard input is one.
    pub fn new(streams: Streams, api: PathBuf, id: Option<String>, terminal: bool) -> io::Result<Self> {
        let requests = Requests::new(api, id)?;
        Ok(Self { streams, requests, terminal, raw: None, waiting: None, start: Instant::now() })
    }

    /// Shows a line on a terminal until the process has its streams, or until [`hush`](Self::hush).
    pub fn wait_aloud(&mut self) {
        if !self.streams.connected() {
            self.waiting = Some(Waiting::since(self.start, "starting the container"));
        }
    }

    /// Takes that line away: something else is to be said.
    pub fn hush(&mut self) {
        self.waiting = None;
    }

    /// Says something that went wrong.
    pub fn warn(&mut self, message: &str) {
        self.hush();
        say(Tone::Warning, message, self.raw.is_some());
    }

    /// Sends the process a signal.
    pub fn kill(&mut self, signal: Signal) {
        self.requests.ask(Request::Kill(signal));
    }

    /// Readable when a signal was refused.
    pub fn answers(&self) -> BorrowedFd<'_> {
        self.requests.answers()
    }

    /// Says which signals were refused, and returns them.
    pub fn refused(&mut self) -> Vec<Signal> {
        let refused = self.requests.refused();
        for (signal, error) in &refused {
            self.warn(&format!("the container does not get the signal {signal}: {error}"));
        }
        refused.into_iter().map(|(signal, _)| signal).collect()
    }

    /// Width and height of our terminal, in characters, if the process has it.
    pub fn size(&self) -> Option<(u16, u16)> {
        let size = if self.terminal { tcgetwinsize(stdin()).ok()? } else { return None };
        Some((size.ws_col, size.ws_row))
    }

    /// Gives its terminal the size of ours.
    pub fn resize(&mut self) {
        if let Some((columns, rows)) = self.size() {
            self.requests.ask(Request::Resize { columns, rows });
        }
    }

    /// Serves a stream.
    pub fn serve(&mut self, happened: Happened) {
        if let Some(note) = self.streams.serve(happened) {
            self.mind(note);
        }
    }

    /// Takes what there is, and will not be more.
    pub fn take_the_rest(&mut self) {
        self.hush();
        for note in self.streams.take_the_rest() {
            self.mind(note);
        }
        // Whatever is said next is said by us.
        self.raw = None;
    }

    fn mind(&mut self, note: Note) {
        match note {
            Note::Connected => {
                self.hush();
                if self.terminal {
                    // Until now Ctrl-C was for us.
                    match RawTerminal::enter() {
                        Ok(raw) => self.raw = Some(raw),
                        Err(error) => self.warn(&format!("cannot set up the terminal: {error}")),
                    }
                }
            }
            Note::Unwritable(which, error) => {
                let stream = match which {
                    Which::Stdin => "standard input",
                    Which::Stdout => "standard output",
                    Which::Stderr => "standard error",
                };
                self.warn(&format!("{stream}: {error}; the container's is closed"));
            }
            Note::NotKept(error) => not_kept(&error, self.raw.is_some()),
        }
    }
}

/// The numbers of the signals that are caught for a container.
pub fn caught() -> [libc::c_int; CAUGHT.len()] {
    CAUGHT.map(|(number, _)| number)
}

/// The signal of a number that is caught, as manifests name it.
pub fn from_number(number: libc::c_int) -> Option<Signal> {
    CAUGHT.iter().find(|(caught, _)| *caught == number).map(|(_, signal)| *signal)
}

/// Whether a signal asks for an end.
pub fn asks_for_an_end(signal: Signal) -> bool {
    CAUGHT.iter().any(|(number, caught)| *caught == signal && ENDS.contains(number))
}
