//! A stream of bytes that both ends of a test can make, and so compare without
//! a copy at hand.

use std::io::{self, Read, Write};

/// The bytes of a xorshift generator, from a seed.
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Pattern {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(2).wrapping_add(1), word: [0; 8], used: 8 }
    }

    fn next_word(&mut self) -> [u8; 8] {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.to_le_bytes()
    }
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // What is left of the last word, whole words, the start of one more.
        let rest = &self.word[self.used..];
        let (first, others) = buffer.split_at_mut(rest.len().min(buffer.len()));
        first.copy_from_slice(&rest[..first.len()]);
        self.used += first.len();
        let mut words = others.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next_word());
        }
        let last = words.into_remainder();
        if !last.is_empty() {
            self.word = self.next_word();
            self.used = last.len();
            last.copy_from_slice(&self.word[..self.used]);
        }
        Ok(buffer.len())
    }
}

/// Writes the first `length` bytes of the stream of `seed`.
pub fn write(mut to: impl Write, length: u64, seed: u64) -> io::Result<()> {
    io::copy(&mut Pattern::new(seed).take(length), &mut to)?;
    to.flush()
}

/// Reads to the end, and fails unless that is exactly the first `length` bytes of the stream of `seed`.
pub fn check(mut from: impl Read, length: u64, seed: u64) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let (mut got, mut wanted) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut at = 0;
    loop {
        let read = from.read(&mut got)?;
        if read == 0 {
            break;
        }
        pattern.read_exact(&mut wanted[..read])?;
        if got[..read] != wanted[..read] {
            let place = got.iter().zip(&wanted).take_while(|(got, wanted)| got == wanted).count();
            return Err(io::Error::other(format!("byte {} is wrong", at + place as u64)));
        }
        at += read as u64;
    }
    if at == length { Ok(()) } else { Err(io::Error::other(format!("{at} bytes came, not {length}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_in_pieces_of_any_size() {
        let mut whole = vec![0; 1000];
        Pattern::new(3).read_exact(&mut whole).unwrap();
        let (mut pieces, mut pattern) = (vec![0; 1000], Pattern::new(3));
        let (mut at, mut size) = (0, 0);
        while at < pieces.len() {
            size = (size * 5 + 1) % 23;
            let end = (at + size).min(pieces.len());
            pattern.read_exact(&mut pieces[at..end]).unwrap();
            at = end;
        }
        assert_eq!(pieces, whole);
    }

    #[test]
    fn a_stream_checks_itself_and_nothing_else() {
        let mut stream = Vec::new();
        write(&mut stream, 100_001, 7).unwrap();
        check(&stream[..], 100_001, 7).unwrap();
        assert!(check(&stream[..], 100_001, 8).is_err());
        assert!(check(&stream[..100_000], 100_001, 7).unwrap_err().to_string().contains("100000 bytes"));
        stream[70_000] ^= 1;
        assert!(check(&stream[..], 100_001, 7).unwrap_err().to_string().contains("byte 70000 "));
    }
}
