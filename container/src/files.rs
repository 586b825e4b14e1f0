//! The files of an image layout: in a folder, or in an archive as `docker save` makes it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use tar_core::EntryType;

use crate::archive::{Archive, ArchiveError};
use crate::budget::{Budget, Paid};
use crate::layer::{LayerError, NameProblem, parts, refuse};
use crate::region::Region;
use crate::source::SourceError;

/// Longest JSON file of a source, in bytes.
pub const MAX_JSON: u64 = 4 << 20;
/// So many links lead from one to another at most.
const MAX_LINKS: usize = 8;

/// Files by their names.
#[derive(Debug)]
pub enum Files {
    /// Below a folder.
    Folder(PathBuf),
    /// In an archive.
    Archive(Index),
}

impl Files {
    /// Opens a file. In a folder no symbolic link is followed.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn open(&self, name: &str) -> Result<Region, SourceError> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                open_file(&path).and_then(Region::whole).map_err(|source| SourceError::Read { path, source })
            }
            Self::Archive(index) => index.open(name),
        }
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// If there is none, or it is too long.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let region = self.open(name)?;
        let size = region.size();
        if size > MAX_JSON {
            return Err(SourceError::Long(self.path(name)));
        }
        let mut bytes = Vec::new();
        region
            .take(size)
            .read_to_end(&mut bytes)
            .map_err(|source| SourceError::Read { path: self.path(name), source })?;
        Ok(bytes)
    }

    /// Whether there is a file of this name.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).exists(),
            Self::Archive(index) => index.entries.contains_key(name.as_bytes()),
        }
    }

    /// What messages call a file.
    fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Archive(index) => index.path.join(name),
        }
    }
}

/// Opens a file of a layout, without following a symbolic link or waiting for the other end of a pipe.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(CWD, path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Where the files of an archive are in it.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    archive: Region,
    entries: Entries,
}

/// What is in an archive, by its name.
pub type Entries = BTreeMap<Vec<u8>, Entry>;

/// Something in an archive.
#[derive(Debug)]
pub enum Entry {
    /// So many bytes from there on.
    File(u64, u64),
    /// A symbolic link; `docker save` makes them where images share a layer.
    Link(Vec<u8>),
}

impl Index {
    /// The files `entries` of `archive`, the content of the file `path`.
    pub fn new(path: &Path, archive: Region, entries: Entries) -> Self {
        Self { path: path.to_owned(), archive, entries }
    }

    fn open(&self, wanted: &str) -> Result<Region, SourceError> {
        let missing = || SourceError::NotInArchive { path: self.path.clone(), name: wanted.to_owned() };
        let plain = |name: &[u8]| parts(name).map(|parts| parts.join(&b'/')).map_err(|_| missing());
        let mut name = plain(wanted.as_bytes())?;
        for _ in 0..=MAX_LINKS {
            match self.entries.get(&name).ok_or_else(missing)? {
                Entry::File(at, size) => return Ok(self.archive.part(*at, *size)),
                Entry::Link(target) => name = follow(&name, target).ok_or_else(missing)?,
            }
        }
        Err(missing())
    }
}

/// What is in an archive. `None` as soon as it is found to have what no image has in it.
///
/// # Errors
/// If it is a broken archive, or has names that are refused.
pub fn entries(archive: impl Read, budget: &Budget) -> Result<Option<Entries>, ArchiveError> {
    let mut archive = Archive::new(Paid { inner: archive, budget });
    let mut entries = Entries::new();
    while let Some(header) = archive.next_header()? {
        let fail = |problem| refuse(&header.name, problem);
        let parts = parts(&header.name).map_err(fail)?;
        if parts.first().is_some_and(|first| !belongs_to_image(first)) {
            return Ok(None);
        }
        budget.spend_name(header.name.len() + header.target.len()).map_err(LayerError::from)?;
        let is_folder = header.name.ends_with(b"/") || parts.is_empty();
        let entry = match header.kind {
            EntryType::Directory => None,
            EntryType::Regular if is_folder => None,
            EntryType::Regular if header.map.is_none() => {
                Some(Entry::File(archive.position(), header.stored))
            }
            EntryType::Symlink => Some(Entry::Link(header.target)),
            other => return Err(fail(NameProblem::Kind(other.to_byte().into())).into()),
        };
        if let Some(entry) = entry
            && entries.insert(parts.join(&b'/'), entry).is_some()
        {
            return Err(fail(NameProblem::Twice).into());
        }
        archive.read(header.stored, |_| Ok(()))?;
        archive.skip_padding(header.stored)?;
    }
    Ok(Some(entries))
}

/// Whether an image that was saved may have this name at its top.
fn belongs_to_image(name: &[u8]) -> bool {
    let stem = name.strip_suffix(b".json").or_else(|| name.strip_suffix(b".tar")).unwrap_or(name);
    let is_digest = stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit);
    is_digest
        || [&b"blobs"[..], b"manifest.json", b"index.json", b"oci-layout", b"repositories"].contains(&name)
}

/// Where the link `name` leads, within the archive.
fn follow(name: &[u8], target: &[u8]) -> Option<Vec<u8>> {
    let mut path: Vec<&[u8]> = name.split(|byte| *byte == b'/').collect();
    path.pop();
    if target.starts_with(b"/") {
        return None;
    }
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                path.pop()?;
            }
            part => path.push(part),
        }
    }
    Some(path.join(&b'/'))
}
