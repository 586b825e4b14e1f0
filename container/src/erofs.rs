//! A writer of EROFS file systems: uncompressed, reproducible, from a tree in memory and a spool.
//!
//! ```text
//! block 0: 1 KiB free | superblock | root inode | more inodes, each with xattrs, chunk map or tail of its content ...
//! then:    whole blocks of folders and files, in the order of the inodes
//! ```
//!
//! First everything gets its place ([`Image::new`]), then all is written in one go ([`Image::write`]). The order is
//! that of the names, so equal trees make equal images. (Linux, fs/erofs/erofs_fs.h and
//! Documentation/filesystems/erofs.rst.)

mod folder;
mod format;
mod xattr;

use std::collections::HashMap;
use std::io::{self, Write};
use std::rc::Rc;

use crate::spool::{Content, PIECE, Spool};
use crate::tree::{Attributes, Folder, Kind, Leaf, Node};
use crate::verity::{BLOCK, VerityWriter};

use self::folder::Entry;
use self::format::{FIRST_INODE, Inode, Layout};
pub use self::xattr::{XattrError, is_known as is_known_xattr};

/// The longest end of a content, in bytes, that is put behind its inode instead of into a block of its own.
const MAX_TAIL: u64 = 2048;
/// Most chunks of a sparse file: larger files have larger chunks.
const MAX_CHUNKS: u64 = 1 << 16;
/// The block of a chunk that is a hole.
const HOLE: u32 = u32::MAX;

/// Why a tree cannot become an image.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// Extended attributes that the format cannot hold.
    #[error("{path}: {source}")]
    Xattr {
        /// Of what.
        path: String,
        /// Why.
        source: XattrError,
    },
    /// More blocks than the format can count.
    #[error("the image would have more than 16 TiB")]
    TooLarge,
    /// Spool or image cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An image that has its layout.
#[derive(Debug)]
pub struct Image<'a> {
    items: Vec<Item<'a>>,
    /// Size in blocks.
    blocks: u64,
    has_chunks: bool,
}

/// An inode, and what belongs to it.
#[derive(Debug)]
struct Item<'a> {
    inode: Inode,
    xattrs: Vec<u8>,
    data: Data<'a>,
    /// Where the inode is, in bytes.
    position: u64,
    layout: Layout,
}

#[derive(Debug)]
enum Data<'a> {
    Nothing,
    Symlink(&'a [u8]),
    File(&'a Content),
    Folder(Vec<Entry<'a>>),
}

impl Data<'_> {
    fn size(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Symlink(target) => target.len() as u64,
            Self::File(content) => content.size(),
            Self::Folder(entries) => folder::size(entries),
        }
    }
}

impl<'a> Image<'a> {
    /// Gives everything in `root` its place.
    ///
    /// # Errors
    /// If the format cannot hold it.
    pub fn new(root: &'a Folder) -> Result<Self, ErofsError> {
        let mut collector = Collector { items: Vec::new(), leaves: HashMap::new(), path: Vec::new() };
        collector.folder(root, 0)?;
        let mut image = Self { items: collector.items, blocks: 0, has_chunks: false };
        image.place_inodes();
        image.place_blocks()?;
        Ok(image)
    }

    /// Size of the image, in blocks of 4,096 bytes.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Writes the image.
    ///
    /// # Errors
    /// If the spool cannot be read, or the image cannot be written.
    pub fn write(&self, spool: &Spool, out: &mut VerityWriter<'_>) -> Result<(), ErofsError> {
        out.pad_to(format::SUPERBLOCK)?;
        let (root, inodes) = (self.items[0].position, self.items.len() as u64);
        out.write_all(&format::superblock(root, inodes, self.blocks as u32, self.has_chunks))?;
        for (index, item) in self.items.iter().enumerate() {
            out.pad_to(item.position)?;
            out.write_all(&item.inode.encode(
                &item.layout,
                item.xattrs.len(),
                item.data.size(),
                index as u32 + 1,
            ))?;
            out.write_all(&item.xattrs)?;
            match &item.layout {
                Layout::Plain { .. } => {}
                Layout::Inline { .. } => {
                    let size = item.data.size();
                    let whole = size - size % BLOCK as u64;
                    self.write_content(spool, out, &item.data, whole, size)?;
                }
                Layout::Chunks { blocks, .. } => {
                    blocks.iter().try_for_each(|block| out.write_all(&block.to_le_bytes()))?;
                }
            }
        }
        out.pad_to(out.position().next_multiple_of(BLOCK as u64))?;
        for item in &self.items {
            let size = item.data.size();
            match &item.layout {
                Layout::Plain { .. } => self.write_content(spool, out, &item.data, 0, size)?,
                Layout::Inline { .. } => {
                    self.write_content(spool, out, &item.data, 0, size - size % BLOCK as u64)?;
                }
                Layout::Chunks { bits, blocks } => {
                    let chunk = 1_u64 << bits;
                    for (index, block) in blocks.iter().enumerate() {
                        let at = index as u64 * chunk;
                        if *block != HOLE {
                            self.write_content(spool, out, &item.data, at, size.min(at + chunk))?;
                            out.pad_to(out.position().next_multiple_of(BLOCK as u64))?;
                        }
                    }
                }
            }
            out.pad_to(out.position().next_multiple_of(BLOCK as u64))?;
        }
        Ok(())
    }

    /// Writes the bytes `from..to` of a content.
    fn write_content(
        &self,
        spool: &Spool,
        out: &mut VerityWriter<'_>,
        data: &Data<'_>,
        from: u64,
        to: u64,
    ) -> io::Result<()> {
        match data {
            Data::Nothing => Ok(()),
            Data::Symlink(target) => out.write_all(&target[from as usize..to as usize]),
            Data::Folder(entries) => {
                let bytes = folder::encode(entries, |index| self.items[index].position / format::INODE_SLOT);
                out.write_all(&bytes[from as usize..to as usize])
            }
            Data::File(content) => {
                let mut buffer = vec![0; PIECE.min((to - from) as usize)];
                let mut at = from;
                while at < to {
                    let count = buffer.len().min((to - at) as usize);
                    spool.read(content, at, &mut buffer[..count])?;
                    out.write_all(&buffer[..count])?;
                    at += count as u64;
                }
                Ok(())
            }
        }
    }

    /// Chooses layouts, and puts the inodes one behind the other.
    fn place_inodes(&mut self) {
        let mut position = FIRST_INODE;
        for item in &mut self.items {
            let size = item.data.size();
            let mut length = format::INODE + item.xattrs.len() as u64;
            let tail = size % BLOCK as u64;
            let sparse = matches!(item.data, Data::File(content) if content.is_sparse());
            item.layout = if sparse {
                let mut bits = PIECE.ilog2();
                while size.div_ceil(1 << bits) > MAX_CHUNKS {
                    bits += 1;
                }
                self.has_chunks = true;
                let blocks = vec![HOLE; size.div_ceil(1 << bits) as usize];
                length += blocks.len() as u64 * 4;
                Layout::Chunks { bits, blocks }
            } else if (1..=MAX_TAIL).contains(&tail) && length + tail <= BLOCK as u64 {
                length += tail;
                Layout::Inline { block: 0 }
            } else {
                Layout::Plain { block: 0 }
            };
            // The kernel wants what is read at once within one block.
            position = position.next_multiple_of(format::INODE_SLOT);
            let whole = match item.layout {
                Layout::Chunks { .. } => format::INODE + item.xattrs.len() as u64,
                _ => length,
            };
            if position % BLOCK as u64 + whole > BLOCK as u64 {
                position = position.next_multiple_of(BLOCK as u64);
            }
            item.position = position;
            position += length;
        }
        self.blocks = position.div_ceil(BLOCK as u64);
    }

    /// Gives contents their blocks.
    fn place_blocks(&mut self) -> Result<(), ErofsError> {
        let mut next = self.blocks;
        let mut take = |count: u64| {
            let block = u32::try_from(next).ok().filter(|block| *block != HOLE);
            next = next.saturating_add(count);
            block.ok_or(ErofsError::TooLarge)
        };
        for item in &mut self.items {
            let size = item.data.size();
            match &mut item.layout {
                // A device has its number there: 0/0.
                Layout::Plain { .. } if size == 0 => {}
                Layout::Plain { block } => *block = take(size.div_ceil(BLOCK as u64))?,
                Layout::Inline { block } => *block = take(size / BLOCK as u64)?,
                Layout::Chunks { bits, blocks } => {
                    let Data::File(content) = item.data else { continue };
                    for (index, block) in blocks.iter_mut().enumerate() {
                        let at = (index as u64) << *bits;
                        let length = (size - at).min(1 << *bits);
                        if !content.is_hole(at, length) {
                            *block = take(length.div_ceil(BLOCK as u64))?;
                        }
                    }
                }
            }
        }
        take(0)?;
        self.blocks = next;
        Ok(())
    }
}

/// Finds all inodes of a tree.
struct Collector<'a> {
    items: Vec<Item<'a>>,
    /// Inodes of leaves, by their addresses: names of the same leaf are hard links.
    leaves: HashMap<*const Leaf, usize>,
    /// Where the walk is, for messages.
    path: Vec<&'a [u8]>,
}

impl<'a> Collector<'a> {
    /// Adds a folder and all that is in it, and returns its inode.
    fn folder(&mut self, folder: &'a Folder, parent: usize) -> Result<usize, ErofsError> {
        let index = self.item(format::FOLDER, &folder.attributes, folder.opaque, Data::Nothing)?;
        let mut entries = vec![
            Entry { name: b".", inode: index, kind: format::FOLDER },
            Entry { name: b"..", inode: parent, kind: format::FOLDER },
        ];
        let mut links = 2;
        for (name, node) in &folder.children {
            self.path.push(name);
            let (inode, kind) = match node {
                Node::Folder(child) => {
                    links += 1;
                    (self.folder(child, index)?, format::FOLDER)
                }
                Node::Leaf(leaf) => self.leaf(leaf)?,
                // A character device with the number 0/0 is what overlayfs takes for a whiteout.
                Node::Whiteout => {
                    let none = Attributes::default();
                    (self.item(format::CHARACTER, &none, false, Data::Nothing)?, format::CHARACTER)
                }
            };
            self.path.pop();
            entries.push(Entry { name, inode, kind });
        }
        entries.sort_by_key(|entry| entry.name);
        self.items[index].inode.links = links;
        self.items[index].data = Data::Folder(entries);
        Ok(index)
    }

    fn leaf(&mut self, leaf: &'a Rc<Leaf>) -> Result<(usize, format::Kind), ErofsError> {
        let (kind, data) = match &leaf.kind {
            Kind::File(content) => (format::FILE, Data::File(content)),
            Kind::Symlink(target) => (format::SYMLINK, Data::Symlink(target)),
            Kind::Fifo => (format::FIFO, Data::Nothing),
        };
        if let Some(index) = self.leaves.get(&Rc::as_ptr(leaf)) {
            self.items[*index].inode.links += 1;
            return Ok((*index, kind));
        }
        let index = self.item(kind, &leaf.attributes, false, data)?;
        self.leaves.insert(Rc::as_ptr(leaf), index);
        Ok((index, kind))
    }

    fn item(
        &mut self,
        kind: format::Kind,
        attributes: &Attributes,
        opaque: bool,
        data: Data<'a>,
    ) -> Result<usize, ErofsError> {
        let xattrs = xattr::encode(&attributes.xattrs, opaque).map_err(|source| {
            let path = self.path.iter().map(|name| format!("/{}", String::from_utf8_lossy(name))).collect();
            ErofsError::Xattr { path, source }
        })?;
        let inode = Inode::new(kind, attributes);
        self.items.push(Item { inode, xattrs, data, position: 0, layout: Layout::Plain { block: 0 } });
        Ok(self.items.len() - 1)
    }
}
