//! A host's program names the guest's port before its connection is one: `CONNECT <port>\n`.

use std::io;
use std::os::fd::AsFd;

use rustix::net::{RecvFlags, recv};

use super::packet::PORT_ANY;

/// Longest line, bytes, its end included.
const MAX_LINE: usize = 32;
/// Ticks that a program has for its line.
const PATIENCE: u32 = 20;

/// A connected socket whose line has not been read completely.
pub struct Handshake<S> {
    /// The socket.
    pub stream: S,
    line: [u8; MAX_LINE],
    length: usize,
    waited: u32,
}

/// What a handshake has come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete yet.
    Incomplete,
    /// The guest's port.
    Port(u32),
    /// The program sent something else, too much, or its end.
    Failed,
}

impl<S: AsFd> Handshake<S> {
    /// A handshake on a non-blocking socket.
    pub fn new(stream: S) -> Self {
        Self { stream, line: [0; MAX_LINE], length: 0, waited: 0 }
    }

    /// Reads what there is of the line, and not one byte after it: that is for the guest.
    pub fn advance(&mut self) -> Progress {
        loop {
            let Some(room) = self.line.get_mut(self.length..).filter(|room| !room.is_empty()) else {
                return Progress::Failed;
            };
            match read_line_part(&self.stream, room) {
                Ok((0, _)) => return Progress::Failed,
                Ok((count, complete)) => {
                    self.length = self.length.saturating_add(count);
                    if complete {
                        let line = self.line.get(..self.length).and_then(parse);
                        return line.map_or(Progress::Failed, Progress::Port);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Incomplete,
                Err(_) => return Progress::Failed,
            }
        }
    }

    /// Time has passed: whether the program has had enough of it.
    pub fn tick(&mut self) -> bool {
        self.waited = self.waited.saturating_add(1);
        self.waited >= PATIENCE
    }
}

/// Reads up to the end of the line or of `into`: how many bytes, and whether the line's end is the last one.
fn read_line_part(stream: impl AsFd, into: &mut [u8]) -> io::Result<(usize, bool)> {
    let (seen, _) = recv(&stream, &mut *into, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    let end = into.iter().take(seen).position(|&byte| byte == b'\n');
    let wanted = end.map_or(seen, |end| end.saturating_add(1));
    let Some(into) = into.get_mut(..wanted) else { return Ok((0, false)) };
    let (count, _) = recv(&stream, into, RecvFlags::DONTWAIT)?;
    Ok((count, end.is_some() && count == wanted))
}

/// The port of a complete line. As in Firecracker, the word may be in any case.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (word, port, end) = (words.next()?, words.next()?, words.next());
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|&port| port != PORT_ANY)?;
    (word.eq_ignore_ascii_case("connect") && digits && end.is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Handshake<UnixStream>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Handshake::new(ours), theirs)
    }

    #[test]
    fn a_line_is_read_to_its_end_and_no_further() {
        let (mut handshake, mut program) = pair();
        program.write_all(b"CONNECT 52\nhello\n").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(52));
        let mut rest = [0; 16];
        let count = handshake.stream.read(&mut rest).unwrap();
        assert_eq!(&rest[..count], b"hello\n");
    }

    #[test]
    fn a_line_may_come_byte_by_byte() {
        let (mut handshake, mut program) = pair();
        for byte in b"connect 4294967294" {
            assert_eq!(handshake.advance(), Progress::Incomplete);
            program.write_all(&[*byte]).unwrap();
        }
        assert_eq!(handshake.advance(), Progress::Incomplete);
        program.write_all(b"\n").unwrap();
        assert_eq!(handshake.advance(), Progress::Port(4_294_967_294));
    }

    #[test]
    fn anything_else_fails() {
        let long = [b"CONNECT ".as_slice(), &[b'0'; 23], b"1\n"].concat();
        for bad in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"CONNECT1\n",
            b"LISTEN 1\n",
            b"\xff\xfe 1\n",
            b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
            &[b' '; 64],
            &long,
        ] {
            let (mut handshake, mut program) = pair();
            program.write_all(bad).unwrap();
            assert_eq!(handshake.advance(), Progress::Failed, "{}", bad.escape_ascii());
        }
        let (mut handshake, program) = pair();
        drop(program);
        assert_eq!(handshake.advance(), Progress::Failed);
    }

    #[test]
    fn a_program_that_says_nothing_is_given_up() {
        let (mut handshake, _program) = pair();
        let ticks = (1..100).find(|_| handshake.tick());
        assert_eq!(ticks, Some(PATIENCE));
    }

    /// What programs send first: mostly something like the line.
    fn first_bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            "[Cc](ONNECT|onnect) {0,20}[0-9]{0,12} ?\r?\n[a-z\n]{0,8}".prop_map(String::into_bytes),
            any::<u32>().prop_map(|port| format!("CONNECT {port}\nrest").into_bytes()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever comes in whatever pieces: the outcome is that of the first line alone, and what follows a good
        /// one is left in the socket.
        #[test]
        fn only_the_first_line_counts(bytes in first_bytes(), piece in 1..40_usize) {
            let (mut handshake, mut program) = pair();
            let mut progress = Progress::Incomplete;
            let mut sent = 0;
            for part in bytes.chunks(piece) {
                if progress == Progress::Incomplete {
                    program.write_all(part).unwrap();
                    sent += part.len();
                    progress = handshake.advance();
                }
            }
            let line = bytes.iter().take(MAX_LINE).position(|&byte| byte == b'\n').map(|end| &bytes[..=end]);
            match line {
                None if bytes.len() < MAX_LINE => prop_assert_eq!(progress, Progress::Incomplete),
                None => prop_assert_eq!(progress, Progress::Failed),
                Some(line) => {
                    prop_assert_eq!(progress, parse(line).map_or(Progress::Failed, Progress::Port));
                    let mut rest = Vec::new();
                    program.shutdown(std::net::Shutdown::Write).unwrap();
                    handshake.stream.set_nonblocking(false).unwrap();
                    handshake.stream.read_to_end(&mut rest).unwrap();
                    prop_assert_eq!(rest, &bytes[line.len()..sent]);
                }
            }
        }
    }
}
