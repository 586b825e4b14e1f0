//! Frames of ttrpc: a header of ten bytes, then the payload.
//!
//! ```text
//! 0  length of the payload, u32 big-endian
//! 4  stream: which request a response is for; odd, and chosen by whoever asks
//! 8  type: 1 request, 2 response
//! 9  flags: nothing that this protocol knows; read and ignored
//! ```

/// Length of a header, in bytes.
pub const HEADER: usize = 10;
/// Longest payload, in bytes: a command with the most arguments that a manifest can grant fits twice.
pub const MAX_PAYLOAD: usize = 256 << 10;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Request`](crate::message::Request).
    Request,
    /// [`Response`](crate::message::Response).
    Response,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which request it is, or is the response to.
    pub stream: u32,
    /// What the payload is.
    pub kind: Kind,
    /// A message in protobuf's encoding, at most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// Why bytes are no frames. After any of these nothing that follows can be understood: the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload is too long.
    #[error("a frame of {0} bytes, which is too long")]
    TooLong(usize),
    /// There is no such type.
    #[error("a frame of type {0}")]
    Type(u8),
}

impl Frame {
    /// The frame as it is sent.
    ///
    /// # Errors
    /// If the payload is too long.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let length = self.payload.len();
        let length = u32::try_from(length)
            .ok()
            .filter(|_| length <= MAX_PAYLOAD)
            .ok_or(FrameError::TooLong(length))?;
        let kind = match self.kind {
            Kind::Request => 1,
            Kind::Response => 2,
        };
        let mut bytes = Vec::with_capacity(HEADER.saturating_add(self.payload.len()));
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(&self.payload);
        Ok(bytes)
    }
}

/// Makes frames of bytes, in whatever pieces they come. It holds what it was given and did not hand out yet.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// So much of `bytes` was handed out.
    done: usize,
    limit: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new(MAX_PAYLOAD)
    }
}

impl Decoder {
    /// Refuses payloads that are longer than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), done: 0, limit }
    }

    /// Takes bytes. To be followed by calls of [`next`](Self::next) until there is no frame: then no more is held than
    /// a frame's length and `bytes`.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.done.min(self.bytes.len()));
        self.done = 0;
        self.bytes.extend(bytes);
    }

    /// The next frame, if it is there as a whole.
    ///
    /// # Errors
    /// If what comes next is no frame. That is so for ever.
    #[expect(clippy::should_implement_trait, reason = "an iterator ends, and is not fed")]
    pub fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.bytes.get(self.done..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = *header;
        // A length that does not fit is too long.
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(FrameError::TooLong(length));
        }
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(FrameError::Type(other)),
        };
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Frame { stream: u32::from_be_bytes([s0, s1, s2, s3]), kind, payload: payload.to_vec() };
        self.done = self.done.saturating_add(HEADER).saturating_add(length);
        Ok(Some(frame))
    }

    /// Whether part of a frame is held.
    pub fn is_amid(&self) -> bool {
        self.done < self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_has_the_bytes_of_ttrpc() {
        let frame = Frame { stream: 3, kind: Kind::Response, payload: vec![7, 8] };
        assert_eq!(frame.encode().unwrap(), [0, 0, 0, 2, 0, 0, 0, 3, 2, 0, 7, 8]);
    }

    #[test]
    fn the_longest_frame_passes_and_a_longer_one_does_not() {
        let frame = |length| Frame { stream: 1, kind: Kind::Request, payload: vec![0; length] };
        let longest = frame(MAX_PAYLOAD).encode().unwrap();
        let mut decoder = Decoder::default();
        decoder.push(&longest);
        assert_eq!(decoder.next(), Ok(Some(frame(MAX_PAYLOAD))));
        assert_eq!(frame(MAX_PAYLOAD + 1).encode(), Err(FrameError::TooLong(MAX_PAYLOAD + 1)));
        // Refused by its header: nothing of it is waited for.
        decoder.push(&[0, 4, 0, 1, 0, 0, 0, 1, 1, 0]);
        assert_eq!(decoder.next(), Err(FrameError::TooLong(MAX_PAYLOAD + 1)));
        decoder.push(&[0; 64]);
        assert_eq!(decoder.next(), Err(FrameError::TooLong(MAX_PAYLOAD + 1)));
        let mut decoder = Decoder::new(2);
        decoder.push(&Frame { stream: 1, kind: Kind::Response, payload: vec![0; 3] }.encode().unwrap());
        assert_eq!(decoder.next(), Err(FrameError::TooLong(3)));
    }

    #[test]
    fn other_types_are_refused() {
        for kind in [0, 3, 255] {
            let mut decoder = Decoder::default();
            decoder.push(&[0, 0, 0, 0, 0, 0, 0, 1, kind, 0]);
            assert_eq!(decoder.next(), Err(FrameError::Type(kind)));
        }
    }

    proptest! {
        #[test]
        fn frames_survive_being_cut(
            frames in prop::collection::vec((any::<u32>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8),
            cuts in prop::collection::vec(1_usize..30, 1..8),
        ) {
            let frames: Vec<_> = frames
                .into_iter()
                .map(|(stream, request, payload)| Frame {
                    stream,
                    kind: if request { Kind::Request } else { Kind::Response },
                    payload,
                })
                .collect();
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().unwrap()).collect();
            let (mut decoder, mut read, mut rest) = (Decoder::default(), vec![], &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (piece, tail) = rest.split_at(rest.len().min(*cut));
                decoder.push(piece);
                while let Some(frame) = decoder.next().unwrap() {
                    read.push(frame);
                }
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(read, frames);
            prop_assert!(!decoder.is_amid());
        }
    }
}
