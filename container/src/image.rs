//! What is kept of an image beside its layers, so that other manifests can be made of it without the source:
//! `image.json`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use cofferdam_container_manifest::Layer;
use serde::{Deserialize, Serialize};

use crate::source::Defaults;
use crate::spool::Spool;
use crate::tree::{Folder, Kind, Node};

/// The name of its file.
pub const FILE: &str = "image.json";
/// The version of its form.
pub const VERSION: u32 = 1;
/// Longest /etc/passwd and /etc/group that is kept, in bytes.
const MAX_USERS: u64 = 1 << 20;
/// Longest file that is read, in bytes: two such files with an escape for each byte, and a configuration.
const MAX_BYTES: u64 = 32 << 20;

/// An image that was made ready: its layers, and what it says of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Further arguments, unless a command is given.
    pub command: Vec<String>,
    /// First arguments, which a command does not replace.
    pub entrypoint: Vec<String>,
    /// Environment.
    pub env: Vec<String>,
    /// Its /etc/group.
    pub group: String,
    /// Layers, the lowest first.
    pub layers: Vec<Layer>,
    /// Its /etc/passwd.
    pub passwd: String,
    /// Signal of an orderly stop.
    pub stop_signal: Option<String>,
    /// User and group, by names or numbers.
    pub user: String,
    /// Version of this form: 1.
    pub version: u32,
    /// Working directory.
    pub working_dir: String,
}

/// Why the file of an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is not what `cofferdam container build` writes: {source}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It was written by another version.
    #[error("{} has version {version}; this program knows {VERSION}: build the image again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

impl Image {
    /// An image with these layers, whose files `root` and `spool` have.
    pub fn new(layers: Vec<Layer>, defaults: &Defaults, root: &Folder, spool: &Spool) -> Self {
        let Defaults { env, entrypoint, cmd, working_dir, user, stop_signal } = defaults.clone();
        Self {
            command: cmd.unwrap_or_default(),
            entrypoint: entrypoint.unwrap_or_default(),
            env: env.unwrap_or_default(),
            group: text(root, spool, b"group"),
            layers,
            passwd: text(root, spool, b"passwd"),
            stop_signal,
            user,
            version: VERSION,
            working_dir,
        }
    }

    /// Reads the file in `folder`; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read, or has another form.
    pub fn read(folder: &Path) -> Result<Option<Self>, ImageError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let path = folder.join(FILE);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ImageError::Read { path, source }),
        }
        let form = |source| ImageError::Form { path: path.clone(), source };
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(form)?;
        if version != VERSION {
            return Err(ImageError::Version { path, version });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(form)
    }

    /// Writes the file in `folder`, in place of one that is there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        replace_file(&folder.join(FILE), &serde_json::to_vec(self)?)
    }
}

/// Writes a file, all of it or nothing. Who has opened or mapped one that was there keeps that one.
///
/// # Errors
/// If it cannot be written.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    let new = path.with_file_name(format!(".{name}.{}", std::process::id()));
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
        // What is left of it, if anything.
        let _ = fs::remove_file(&new);
    })
}

/// What a file in /etc says, or nothing if it is none.
fn text(root: &Folder, spool: &Spool, name: &[u8]) -> String {
    let Some(Node::Leaf(leaf)) = root.find([b"etc", name]) else { return String::new() };
    let Kind::File(content) = &leaf.kind else { return String::new() };
    let mut bytes = vec![0; content.size().min(MAX_USERS) as usize];
    match spool.read(content, 0, &mut bytes) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        Image {
            command: vec!["a".to_owned()],
            entrypoint: vec![],
            env: vec!["A=1".to_owned()],
            group: "g".to_owned(),
            layers: vec![],
            passwd: "p".to_owned(),
            stop_signal: None,
            user: "u".to_owned(),
            version: VERSION,
            working_dir: "/".to_owned(),
        }
    }

    #[test]
    fn written_and_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Image::read(folder.path()).unwrap(), None);
        for user in ["u", "v"] {
            let image = Image { user: user.to_owned(), ..image() };
            image.write(folder.path()).unwrap();
            assert_eq!(Image::read(folder.path()).unwrap(), Some(image));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_file_is_replaced_or_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        replace_file(&path, b"old").unwrap();
        let mut opened = File::open(&path).unwrap();
        replace_file(&path, b"new").unwrap();
        let mut text = String::new();
        opened.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), fs::read(&path).unwrap()), ("old", b"new".to_vec()));
        fs::create_dir_all(folder.path().join("taken/by")).unwrap();
        replace_file(&folder.path().join("taken"), b"x").unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn other_forms_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (text, part) in [
            ("", "is not what `cofferdam container build` writes"),
            ("{\"version\":1}", "missing field"),
            ("{\"version\":2}", "has version 2; this program knows 1"),
        ] {
            fs::write(folder.path().join(FILE), text).unwrap();
            let error = Image::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
