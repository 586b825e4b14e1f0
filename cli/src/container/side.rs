//! The container in a domain that `cofferdam run` supervises.
//!
//! A signal that asks for an end (TERM, INT, HUP, QUIT) is the container's, if its manifest allows it. If not, or if
//! nobody takes it, or with the second one, the domain is asked to stop, as one without a container is with the first.

use std::io;
use std::path::Path;

use cofferdam_container_manifest::Signal;

use crate::container::attached::{Attached, asks_for_an_end, from_number};
use crate::container::start::Start;
use crate::kept::Log;
use crate::run_dir::Entry;
use crate::streams::{Ends, Streams};
use crate::supervise::log;
use crate::terminal::Input;

/// What is to become of the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    Nothing,
    /// It is to end.
    End,
}

/// A container.
pub struct Side {
    /// Its process.
    pub process: Attached,
    allowed: Vec<Signal>,
    digest: [u8; 32],
    /// Whether a signal that asks for an end was passed on.
    asked: bool,
}

impl Side {
    /// Listens for the streams of `container` beside the vsock socket of its domain, which has `entry` in the run
    /// directory. The error is a sentence for a person.
    pub fn listen(container: &Start, vsock: &Path, entry: &Entry, background: bool) -> Result<Self, String> {
        let manifest = &container.bound.manifest;
        let input = if background { Input::Background } else { Input::look() };
        let ends = Ends {
            reads: input != Input::Background,
            shows: !background,
            terminal: manifest.process.terminal,
            stdout_log: log(&entry.dir, Log::Stdout, false),
            stderr_log: log(&entry.dir, Log::Stderr, false),
        };
        let terminal = manifest.process.terminal && input == Input::Terminal;
        let failed = |error: io::Error| format!("cannot listen for the container's streams: {error}");
        let streams = Streams::listen(vsock, container.ports(), ends).map_err(failed)?;
        Ok(Self {
            process: Attached::new(streams, entry.socket(), None, terminal).map_err(failed)?,
            allowed: manifest.host.signals.clone(),
            digest: container.bound.digest,
            asked: false,
        })
    }

    /// The digest of its manifest.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Passes a signal on, if it is the container's.
    pub fn signal(&mut self, number: libc::c_int) -> Wish {
        let Some(signal) = from_number(number) else { return Wish::Nothing };
        if signal == Signal::Winch {
            self.resize();
            return Wish::Nothing;
        }
        let ends = asks_for_an_end(signal);
        if ends && std::mem::replace(&mut self.asked, true) {
            return Wish::End;
        }
        if self.allowed.contains(&signal) {
            self.process.kill(signal);
            return Wish::Nothing;
        }
        if ends {
            return Wish::End;
        }
        self.process.warn(&format!("the manifest does not allow the signal {signal} (host.signals)"));
        Wish::Nothing
    }

    /// Looks at the answers to signals that were passed on.
    pub fn take_answers(&mut self) -> Wish {
        let ends = self.process.refused().into_iter().any(asks_for_an_end);
        if ends { Wish::End } else { Wish::Nothing }
    }

    /// Its process runs.
    pub fn runs(&mut self) {
        self.process.hush();
        self.resize();
    }

    fn resize(&mut self) {
        if self.allowed.contains(&Signal::Winch) {
            self.process.resize();
        }
    }
}
