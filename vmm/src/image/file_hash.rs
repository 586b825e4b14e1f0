//! The SHA-256 of an image's file. It names the image as a registry or `sha256sum` does, but no start can wait until a
//! whole file is read: it is computed when somebody asks, once.

use std::sync::{Arc, OnceLock};

use cofferdam_confidential::image::inspect::hex;
use tracing::warn;

use crate::boot::file::ImageFile;

/// The hash of a file, or of none.
pub struct FileHash {
    file: Option<Arc<ImageFile>>,
    hash: OnceLock<Option<String>>,
}

impl FileHash {
    /// That of `file`, which is yet to be read.
    pub(super) fn of(file: Arc<ImageFile>) -> Self {
        Self { file: Some(file), hash: OnceLock::new() }
    }

    /// That of a domain that comes from no image file.
    pub fn none() -> Self {
        Self { file: None, hash: OnceLock::new() }
    }

    /// The hash, hexadecimal; none without a file, or if it cannot be read to the length that it had at the start.
    pub fn get(&self) -> Option<String> {
        let read = || {
            let file = self.file.as_ref()?;
            match file.sha256() {
                Ok(hash) => Some(hex(&hash)),
                Err(error) => {
                    warn!("{}: no hash of the image: {error}", file.path().display());
                    None
                }
            }
        };
        self.hash.get_or_init(read).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::file;

    #[test]
    fn it_is_that_of_the_whole_file_and_stays() {
        let image = file(b"abc");
        let hash = FileHash::of(Arc::new(ImageFile::open(image.path().into()).unwrap()));
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.get().unwrap(), expected);
        image.as_file().set_len(0).unwrap();
        assert_eq!(hash.get().unwrap(), expected);
        assert_eq!(FileHash::none().get(), None);
    }

    #[test]
    fn a_file_that_was_cut_off_has_none() {
        let image = file(b"abc");
        let hash = FileHash::of(Arc::new(ImageFile::open(image.path().into()).unwrap()));
        image.as_file().set_len(1).unwrap();
        assert_eq!(hash.get(), None);
    }
}
