//! What tells a source from others, and from what it was before, without reading all of it: the digest that an image
//! layout is addressed by; of files and folders what the host says of them, as `make` and others go by.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::image;
use crate::source::{Source, SourceError, layout_digest};

/// Of what is made of a source. Another number, and everything is built again.
const FORM: u32 = 1;

impl Source {
    /// The name of this source as it is now. One that has changed has another name.
    ///
    /// # Errors
    /// If it cannot be looked at, or is refused.
    pub fn identity(&self) -> Result<Digest, SourceError> {
        let mut hash = Sha256::new();
        hash.update(format!("{FORM}.{}\n", image::VERSION));
        match self {
            Self::Layout { folder, tag } => {
                hash.update(b"layout\n");
                hash.update(layout_digest(folder, tag.as_deref())?.to_string());
            }
            Self::Saved { file, name } => {
                hash.update(b"saved\n");
                hash.update(format!("{name:?}\n"));
                look_at(file, &mut hash)?;
            }
            Self::Path(path) => {
                hash.update(b"path\n");
                look_at(path, &mut hash)?;
            }
        }
        Ok(Digest::finish(hash))
    }
}

fn look_at(path: &Path, hash: &mut Sha256) -> Result<(), SourceError> {
    let read = |source| SourceError::Read { path: path.to_owned(), source };
    let path = path.canonicalize().map_err(read)?;
    look(&path, &fs::metadata(&path).map_err(read)?, hash).map_err(read)
}

/// Takes in what is said of a file, or of a folder and all below it.
fn look(path: &Path, metadata: &Metadata, hash: &mut Sha256) -> io::Result<()> {
    let name = path.as_os_str().as_bytes();
    for number in [
        name.len() as u64,
        metadata.dev(),
        metadata.ino(),
        u64::from(metadata.mode()),
        metadata.size(),
        metadata.mtime() as u64,
        metadata.mtime_nsec() as u64,
        metadata.ctime() as u64,
        metadata.ctime_nsec() as u64,
    ] {
        hash.update(number.to_le_bytes());
    }
    hash.update(name);
    if metadata.is_dir() {
        let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            look(&entry.path(), &entry.metadata()?, hash)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_has_another_identity() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("root");
        let source = Source::Path(path.clone());
        assert!(matches!(source.identity(), Err(SourceError::Read { .. })));
        fs::write(&path, "1").unwrap();
        let first = source.identity().unwrap();
        assert_eq!(source.identity().unwrap(), first);
        let other = place.path().join("other");
        fs::write(&other, "1").unwrap();
        assert_ne!(Source::Path(other.clone()).identity().unwrap(), first);
        fs::rename(&other, &path).unwrap();
        assert_ne!(source.identity().unwrap(), first);

        fs::remove_file(&path).unwrap();
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(path.join("a/b/c"), "1").unwrap();
        let first = source.identity().unwrap();
        assert_eq!(source.identity().unwrap(), first);
        fs::write(path.join("a/b/c"), "12").unwrap();
        let second = source.identity().unwrap();
        assert_ne!(second, first);
        fs::rename(path.join("a/b/c"), path.join("a/b/d")).unwrap();
        assert_ne!(source.identity().unwrap(), second);

        let saved = |name: Option<&str>| {
            let name = name.map(str::to_owned);
            Source::Saved { file: path.clone(), name }.identity().unwrap()
        };
        let [any, one, two] = [None, Some("one"), Some("two")].map(saved);
        assert!(any != one && one != two && any != source.identity().unwrap());
    }
}
