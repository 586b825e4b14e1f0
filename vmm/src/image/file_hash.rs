//! The SHA-256 of an image's file. It names the image as a registry or `sha256sum` does, but no start can wait until a
//! whole file is read: it is computed when somebody asks, once, and while the domain runs piece by piece, between which
//! the event loop serves its devices.

use std::sync::{Arc, Mutex, PoisonError};

use cofferdam_confidential::image::inspect::hex;
use tracing::warn;

use crate::boot::file::{Hashing, ImageFile};

/// The hash of a file, or of none.
pub struct FileHash(Mutex<State>);

enum State {
    /// As far as it has been read.
    Unknown(Arc<ImageFile>, Option<Box<Hashing>>),
    Known(Option<String>),
}

impl FileHash {
    /// That of `file`, which is yet to be read.
    pub(crate) fn of(file: Arc<ImageFile>) -> Self {
        Self(Mutex::new(State::Unknown(file, None)))
    }

    /// That of a domain that comes from no image file.
    pub fn none() -> Self {
        Self(Mutex::new(State::Known(None)))
    }

    /// Reads a piece more, unless it is known. Whether it is known then.
    pub fn advance(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Unknown(file, hashing) = &mut *state else { return true };
        let hash = match hashing.get_or_insert_default().advance(file) {
            Ok(None) => return false,
            Ok(Some(hash)) => Some(hex(&hash)),
            Err(error) => {
                warn!("{}: no hash of the image: {error}", file.path().display());
                None
            }
        };
        *state = State::Known(hash);
        true
    }

    /// The hash, hexadecimal, once all is read; none without a file, or if it cannot be read to the length that it had
    /// at the start.
    pub fn get(&self) -> Option<String> {
        while !self.advance() {}
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Known(hash) => hash.clone(),
            State::Unknown(..) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::file;

    fn hash_of(content: &[u8]) -> (tempfile::NamedTempFile, FileHash) {
        let image = file(content);
        let hash = FileHash::of(Arc::new(ImageFile::open(image.path().into()).unwrap()));
        (image, hash)
    }

    #[test]
    fn it_is_that_of_the_whole_file_and_stays() {
        let (image, hash) = hash_of(b"abc");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.get().unwrap(), expected);
        image.as_file().set_len(0).unwrap();
        assert_eq!(hash.get().unwrap(), expected);
        assert_eq!(FileHash::none().get(), None);
    }

    #[test]
    fn a_file_that_was_cut_off_has_none() {
        let (image, hash) = hash_of(b"abc");
        image.as_file().set_len(1).unwrap();
        assert_eq!(hash.get(), None);
    }

    #[test]
    fn it_is_read_piece_by_piece() {
        let (_image, hash) = hash_of(&vec![7; 1 << 20]);
        let pieces = std::iter::repeat_with(|| hash.advance()).take_while(|known| !known).count();
        assert_eq!(pieces, 8, "pieces of 128 KiB, and the end");
        let (_image, whole) = hash_of(&vec![7; 1 << 20]);
        assert_eq!(hash.get(), whole.get());
        assert!(hash.get().is_some());
    }
}
