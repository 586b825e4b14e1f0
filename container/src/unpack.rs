//! Unpacks what a layer is packed with, as its first bytes say: gzip, zstd, or nothing.

use std::io::{self, Cursor, Read};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// The first of the sixteen numbers that begin frames without content, in the last byte of which they differ.
const SKIPPABLE: u32 = 0x184d_2a50;

/// Reads what is packed in `source`.
///
/// # Errors
/// If the source cannot be read.
pub fn unpack<'a>(mut source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let first = peek(&mut source)?;
    let (is_gzip, is_zstd) = (is_gzip(&first), is_zstd(&first));
    let source = Cursor::new(first).chain(source);
    Ok(if is_gzip {
        Box::new(MultiGzDecoder::new(source))
    } else if is_zstd {
        Box::new(ZstdFrames { source: Some(source), frame: None })
    } else {
        Box::new(source)
    })
}

/// Whether there is something to unpack in `source`.
///
/// # Errors
/// If it cannot be read.
pub fn is_packed(mut source: impl Read) -> io::Result<bool> {
    let first = peek(&mut source)?;
    Ok(is_gzip(&first) || is_zstd(&first))
}

fn is_gzip(first: &[u8]) -> bool {
    first.starts_with(&GZIP)
}

fn is_zstd(first: &[u8]) -> bool {
    first == ZSTD || skippable(first)
}

/// The first four bytes, or fewer at the end.
fn peek(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut first = Vec::with_capacity(4);
    source.take(4).read_to_end(&mut first)?;
    Ok(first)
}

fn skippable(first: &[u8]) -> bool {
    first.try_into().is_ok_and(|first| u32::from_le_bytes(first) & !0xf == SKIPPABLE)
}

type Frame<R> = StreamingDecoder<io::Chain<Cursor<Vec<u8>>, R>, ruzstd::decoding::FrameDecoder>;

/// All frames of a file, one after another.
struct ZstdFrames<R: Read> {
    /// Between frames.
    source: Option<R>,
    /// Within one.
    frame: Option<Frame<R>>,
}

impl<R: Read> ZstdFrames<R> {
    /// Begins the next frame with content. `false`: there is none.
    fn begin(&mut self, mut source: R) -> io::Result<bool> {
        loop {
            let first = peek(&mut source)?;
            if first.is_empty() {
                return Ok(false);
            }
            if !skippable(&first) {
                let source = Cursor::new(first).chain(source);
                self.frame = Some(StreamingDecoder::new(source).map_err(io::Error::other)?);
                return Ok(true);
            }
            let mut length = [0; 4];
            source.read_exact(&mut length)?;
            let length = u64::from(u32::from_le_bytes(length));
            if io::copy(&mut source.by_ref().take(length), &mut io::sink())? < length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<R: Read> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(source) = self.source.take()
                && !self.begin(source)?
            {
                return Ok(0);
            }
            let Some(frame) = &mut self.frame else { return Ok(0) };
            let count = frame.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            self.source = self.frame.take().map(|frame| frame.into_inner().into_inner().1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    fn pack(program: &str, bytes: &[u8]) -> Vec<u8> {
        let mut child =
            Command::new(program).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        unpack(packed)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn all_parts_are_unpacked() {
        for plain in [b"".as_slice(), b"abc", b"abcdefgh"] {
            assert_eq!(unpacked(plain).unwrap(), plain);
        }
        let gzip = [pack("gzip", b"one "), pack("gzip", b"two")].concat();
        assert_eq!(unpacked(&gzip).unwrap(), b"one two");
        let skipped = [&(SKIPPABLE + 3).to_le_bytes()[..], &5_u32.to_le_bytes(), b"never"].concat();
        let one = pack("zstd", b"one ");
        let zstd = [&skipped[..], &one, &skipped, &pack("zstd", b"two"), &skipped].concat();
        assert_eq!(unpacked(&zstd).unwrap(), b"one two");
        for cut in [&zstd[..zstd.len() - 1], &one[..one.len() - 1], &gzip[..gzip.len() - 1]] {
            assert!(unpacked(cut).is_err());
        }
    }
}
