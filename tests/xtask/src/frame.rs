//! What is said over the rig's serial port between the caller's side
//! ([`crate::rig`]) and the agent in the outer machine ([`crate::agent`]).
//!
//! ```text
//! frame := kind (1 byte), length (4 bytes, little-endian), payload
//!
//! caller                              agent
//!   Share, Argument, Environment,
//!   Directory, in any order
//!   Run                        --->
//!                              <---   Output, Errors, as they come
//!                              <---   Exit, last
//! ```
//!
//! One port carries everything, so Exit cannot overtake output.

use std::io::{self, Read, Write};

/// Largest payload, bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory that is mounted read-write at its own path: 9p tag, NUL, path.
    Share = 1,
    /// The program, or its next argument.
    Argument = 2,
    /// An environment variable: name, `=`, value.
    Environment = 3,
    /// The working directory.
    Directory = 4,
    /// Nothing: the command is complete.
    Run = 5,
    /// A piece of the command's stdout.
    Output = 6,
    /// A piece of the command's stderr.
    Errors = 7,
    /// The command's exit status, one byte.
    Exit = 8,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Share,
        Self::Argument,
        Self::Environment,
        Self::Directory,
        Self::Run,
        Self::Output,
        Self::Errors,
        Self::Exit,
    ];
}

/// Writes one frame. A payload over [`MAX_PAYLOAD`] is an error.
pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        let reason = format!("a {kind:?} of {} bytes; at most {MAX_PAYLOAD} can be passed", payload.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one frame; its payload replaces what is in `payload`.
pub fn read(from: &mut impl Read, payload: &mut Vec<u8>) -> io::Result<Kind> {
    let mut header = [0; 5];
    from.read_exact(&mut header)?;
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    let Some(kind) =
        Kind::ALL.into_iter().find(|known| *known as u8 == kind).filter(|_| length <= MAX_PAYLOAD)
    else {
        let reason = format!("frame of kind {kind} with {length} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    };
    payload.resize(length, 0);
    from.read_exact(payload)?;
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_read_back() {
        let mut port = Vec::new();
        for kind in Kind::ALL {
            write(&mut port, kind, &[kind as u8; 3]).unwrap();
        }
        write(&mut port, Kind::Run, &[]).unwrap();
        let (mut port, mut payload) = (port.as_slice(), Vec::new());
        for kind in Kind::ALL {
            assert_eq!(read(&mut port, &mut payload).unwrap(), kind);
            assert_eq!(payload, [kind as u8; 3]);
        }
        assert_eq!(read(&mut port, &mut payload).unwrap(), Kind::Run);
        assert!(payload.is_empty());
        assert_eq!(read(&mut port, &mut payload).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn bad_frames_are_errors() {
        let mut payload = Vec::new();
        for bad in [[0, 0, 0, 0, 0], [9, 0, 0, 0, 0], [6, 1, 0, 0x10, 0], [6, 0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(
                read(&mut bad.as_slice(), &mut payload).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
        let cut = [6, 2, 0, 0, 0, b'x'];
        assert_eq!(read(&mut cut.as_slice(), &mut payload).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(write(&mut Vec::new(), Kind::Argument, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }
}
