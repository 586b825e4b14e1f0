//! Reads a layer out of a tar archive: ustar, PAX, GNU's long names and sparse files.

use std::io::{self, Read};

use tar_core::EntryType;
use tar_core::parse::{Limits, ParseError, ParseEvent, ParsedEntry, Parser};

use crate::budget::{Budget, Exceeded, Paid};
use crate::digest::Digest;
use crate::layer::{LayerError, NameProblem, Reading, refuse};
use crate::spool::{Content, Spool};
use crate::tree::{Attributes, Kind};

/// Archives are padded to multiples of this size, in bytes.
const RECORD: u64 = 512;
/// Longest name and target, in bytes.
const MAX_PATH: u32 = 4096;
/// Most bytes that belong to one name beside its content.
const MAX_ENTRY_METADATA: u32 = 1 << 20;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Not a tar archive, or a broken one.
    #[error("the archive is broken: {0}")]
    Tar(#[from] ParseError),
    /// It ends too early.
    #[error("the archive ends in the middle of something")]
    Truncated,
    /// For what is in it.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Its file is another than its digest says.
    #[error("it does not match its digest: it is {found}, not {expected}")]
    Digest {
        /// What it is.
        found: Digest,
        /// What it should be.
        expected: Digest,
    },
    /// What is packed in it is something else than the image's configuration says.
    #[error("unpacked it does not match its digest: it is {found}, not {expected}")]
    UnpackedDigest {
        /// What it is.
        found: Digest,
        /// What it should be.
        expected: Digest,
    },
    /// It cannot be read, or not be unpacked.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Exceeded>()) {
            Some(exceeded) => Self::Layer(LayerError::Exceeded(*exceeded)),
            None => Self::Io(error),
        }
    }
}

/// What an archive says of a name.
#[derive(Debug)]
pub struct Header {
    /// The name.
    pub name: Vec<u8>,
    /// The target of a link.
    pub target: Vec<u8>,
    /// The kind of entry.
    pub kind: EntryType,
    /// Bytes that follow for it in the archive.
    pub stored: u64,
    /// Size of the file, in bytes.
    pub size: u64,
    /// Where the bytes that follow belong in the file, and how many each: sparse files only.
    pub map: Option<Vec<(u64, u64)>>,
    owner: (u64, u64),
    attributes: Attributes,
}

/// An archive that is being read.
#[derive(Debug)]
pub struct Archive<R> {
    inner: R,
    parser: Parser,
    /// What was read, and not used yet.
    buffer: Vec<u8>,
    /// Bytes that were used.
    position: u64,
}

impl<R: Read> Archive<R> {
    /// The archive that begins here.
    pub fn new(inner: R) -> Self {
        let limits = Limits {
            max_metadata_size: MAX_ENTRY_METADATA,
            max_path_len: Some(MAX_PATH),
            ..Limits::default()
        };
        Self { inner, parser: Parser::new(limits), buffer: Vec::new(), position: 0 }
    }

    /// The reader behind the archive.
    fn inner(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Where in the archive that is which is read next: behind a header, its content.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next header, or `None` at the end. The content of the one before must have been read or skipped.
    ///
    /// # Errors
    /// If there is none, or the archive cannot be read.
    pub fn next_header(&mut self) -> Result<Option<Header>, ArchiveError> {
        loop {
            let (used, header) = match self.parser.parse(&self.buffer)? {
                ParseEvent::NeedData { min_bytes } => {
                    let more = min_bytes.saturating_sub(self.buffer.len()) as u64;
                    let count = self.inner.by_ref().take(more).read_to_end(&mut self.buffer)? as u64;
                    if count < more {
                        // Some archives lack the two blocks of zeros at the end, or the second of them.
                        let ended = self.buffer.iter().all(|byte| *byte == 0);
                        return if ended { Ok(None) } else { Err(ArchiveError::Truncated) };
                    }
                    continue;
                }
                ParseEvent::Entry { consumed, entry } => (consumed, Some(header(&entry, None))),
                ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                    let map = sparse_map.iter().map(|region| (region.offset, region.length)).collect();
                    (consumed, Some(header(&entry, Some((map, real_size)))))
                }
                // Defaults for all names that follow; nothing that an image needs.
                ParseEvent::GlobalExtensions { consumed, .. } => (consumed, None),
                ParseEvent::End { .. } => return Ok(None),
            };
            let used = used.min(self.buffer.len());
            self.buffer.drain(..used);
            self.position += used as u64;
            if header.is_some() {
                return Ok(header);
            }
        }
    }

    /// Reads `count` bytes of content, and hands them on in pieces.
    ///
    /// # Errors
    /// If there are fewer, or `take` fails.
    pub fn read(
        &mut self,
        mut count: u64,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), ArchiveError> {
        let mut piece = vec![0; (64 << 10).min(count) as usize];
        while count > 0 {
            let wanted = piece.len().min(count as usize);
            let got = if self.buffer.is_empty() {
                self.inner.read(&mut piece[..wanted])?
            } else {
                let got = wanted.min(self.buffer.len());
                piece[..got].copy_from_slice(&self.buffer[..got]);
                self.buffer.drain(..got);
                got
            };
            if got == 0 {
                return Err(ArchiveError::Truncated);
            }
            take(&piece[..got])?;
            self.position += got as u64;
            count -= got as u64;
        }
        Ok(())
    }

    /// Skips what pads a content of this size.
    ///
    /// # Errors
    /// If the archive cannot be read.
    pub fn skip_padding(&mut self, stored: u64) -> Result<(), ArchiveError> {
        let padding = stored.wrapping_neg() % RECORD;
        match self.read(padding, |_| Ok(())) {
            // The last content of an archive without an end may lack it.
            Err(ArchiveError::Truncated) => Ok(()),
            other => other,
        }
    }
}

fn header(entry: &ParsedEntry<'_>, sparse: Option<(Vec<(u64, u64)>, u64)>) -> Header {
    let xattrs = entry.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    let (map, size) = match sparse {
        Some((map, size)) => (Some(map), size),
        None => (None, entry.size),
    };
    // Only files have content, whatever a header says of the size of a link or folder: as Go's reader, which Docker
    // and containerd have, takes it.
    let has_content = matches!(
        entry.entry_type,
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse | EntryType::Other(_)
    );
    Header {
        name: entry.path.to_vec(),
        target: entry.link_target.as_deref().unwrap_or_default().to_vec(),
        kind: entry.entry_type,
        stored: if has_content { entry.size } else { 0 },
        size,
        map,
        owner: (entry.uid, entry.gid),
        attributes: Attributes {
            mode: (entry.mode & 0o7777) as u16,
            uid: 0,
            gid: 0,
            mtime: entry.mtime,
            xattrs,
        },
    }
}

/// Reads the archive's names into `layer` and its files into `spool`, and the rest of `source` to its end.
///
/// # Errors
/// If the archive, or something in it, is refused.
pub fn read_layer(source: impl Read, layer: &mut Reading<'_>, spool: &mut Spool) -> Result<(), ArchiveError> {
    let mut archive = Archive::new(Paid { inner: source, budget: layer.budget });
    while let Some(header) = archive.next_header()? {
        let stored = header.stored;
        read_name(header, &mut archive, layer, spool)?;
        archive.skip_padding(stored)?;
    }
    io::copy(archive.inner(), &mut io::sink())?;
    Ok(())
}

fn read_name<R: Read>(
    header: Header,
    archive: &mut Archive<R>,
    layer: &mut Reading<'_>,
    spool: &mut Spool,
) -> Result<(), ArchiveError> {
    let Header { name, target, kind, stored, size, map, owner, mut attributes } = header;
    let id = |id: u64| u32::try_from(id).map_err(|_| refuse(&name, NameProblem::Owner(id)));
    (attributes.uid, attributes.gid) = (id(owner.0)?, id(owner.1)?);
    let attributes = layer.without_foreign_xattrs(&name, attributes);
    // Old archives have folders as files whose names end with a slash.
    let is_folder = kind == EntryType::Regular && name.ends_with(b"/");
    match kind {
        EntryType::Directory => layer.add_folder(&name, attributes)?,
        EntryType::Regular if is_folder => layer.add_folder(&name, attributes)?,
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
            let content = read_file(&name, stored, size, map, archive, layer.budget, spool)?;
            return Ok(layer.add_leaf(&name, attributes, Kind::File(content))?);
        }
        EntryType::Link => layer.add_hard_link(&name, &target)?,
        EntryType::Symlink => layer.add_leaf(&name, attributes, Kind::Symlink(target))?,
        EntryType::Fifo => layer.add_leaf(&name, attributes, Kind::Fifo)?,
        EntryType::Char | EntryType::Block => layer.left_out(&name, "device node"),
        other => return Err(refuse(&name, NameProblem::Kind(other.to_byte().into())).into()),
    }
    archive.read(stored, |_| Ok(()))
}

fn read_file<R: Read>(
    name: &[u8],
    stored: u64,
    size: u64,
    map: Option<Vec<(u64, u64)>>,
    archive: &mut Archive<R>,
    budget: &Budget,
    spool: &mut Spool,
) -> Result<Content, ArchiveError> {
    let mut adding = spool.add();
    let Some(map) = map else {
        archive.read(stored, |piece| adding.write(piece))?;
        return Ok(adding.finish()?);
    };
    // Holes are not read, but cost as much.
    budget.spend_bytes(size).map_err(LayerError::from)?;
    let mut at = 0_u64;
    let mut left = stored;
    for (offset, length) in map {
        let bad = || refuse(name, NameProblem::SparseMap);
        let hole = offset.checked_sub(at).ok_or_else(bad)?;
        at = offset.checked_add(length).filter(|end| *end <= size).ok_or_else(bad)?;
        left = left.checked_sub(length).ok_or_else(bad)?;
        adding.zeros(hole)?;
        archive.read(length, |piece| adding.write(piece))?;
    }
    archive.read(left, |_| Ok(()))?;
    adding.zeros(size - at)?;
    Ok(adding.finish()?)
}
