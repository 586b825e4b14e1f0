//! The terminal as a console: every key goes to the guest, Ctrl-C too, except
//! for an escape: Ctrl-A x stops the domain, Ctrl-A Ctrl-A is one Ctrl-A.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The escape key.
const CTRL_A: u8 = 1;

/// A terminal on standard input in raw mode, until it is dropped.
pub struct RawTerminal {
    saved: Termios,
}

/// What standard input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// No terminal.
    File,
    /// A terminal that belongs to another job: reading it would stop this one.
    Background,
    /// A terminal.
    Terminal,
}

impl Input {
    /// Looks at standard input.
    pub fn look() -> Self {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Self::File;
        }
        // A terminal that is not the controlling one has no foreground job.
        let foreign = tcgetpgrp(&stdin).is_ok_and(|foreground| foreground != getpgrp());
        if foreign { Self::Background } else { Self::Terminal }
    }
}

impl RawTerminal {
    /// Puts the terminal on standard input in raw mode.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        if !io::stdout().is_terminal() {
            // Then the screen shows what others write, and they end lines with \n alone.
            raw.output_modes = saved.output_modes;
        }
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self { saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // If it is gone there is nothing to restore.
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.saved);
    }
}

/// Finds the escape key in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Passes `typed` on to `out` without the escapes; true if one of them
    /// asks for a stop. Before any other key, Ctrl-A is a key like others.
    pub fn filter(&mut self, typed: &[u8], mut out: impl FnMut(u8)) -> bool {
        let mut stop = false;
        for &byte in typed {
            match (self.pending, byte) {
                (false, CTRL_A) => self.pending = true,
                (false, _) => out(byte),
                (true, b'x') => {
                    self.pending = false;
                    stop = true;
                }
                (true, _) => {
                    self.pending = false;
                    out(CTRL_A);
                    if byte != CTRL_A {
                        out(byte);
                    }
                }
            }
        }
        stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut out, mut stop) = (Escape::default(), Vec::new(), false);
        for part in parts {
            stop |= escape.filter(part, |byte| out.push(byte));
        }
        (out, stop)
    }

    #[test]
    fn escapes() {
        assert_eq!(filter(&[b"ls\r\x03x"]), (b"ls\r\x03x".to_vec(), false));
        assert_eq!(filter(&[b"a\x01xb"]), (b"ab".to_vec(), true));
        assert_eq!(filter(&[b"a\x01", b"x"]), (b"a".to_vec(), true));
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01k\x01"]), (b"\x01k".to_vec(), false));
        assert_eq!(filter(&[b"\x01\x01\x01x"]), (b"\x01".to_vec(), true));
    }
}
