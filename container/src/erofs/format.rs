//! The structures on disk. All numbers are little-endian.

use crate::tree::Attributes;

/// Where the superblock is, in bytes.
pub const SUPERBLOCK: u64 = 1024;
/// Where the first inode is, in bytes: behind the superblock.
pub const FIRST_INODE: u64 = SUPERBLOCK + 128;
/// Size of an extended inode, in bytes.
pub const INODE: u64 = 64;
/// Inodes are numbered by their places, in units of so many bytes.
pub const INODE_SLOT: u64 = 32;

/// EROFS_SUPER_MAGIC_V1.
const MAGIC: u32 = 0xe0f5_e1e2;
/// EROFS_FEATURE_COMPAT_MTIME: times are those of the last change of the content.
const COMPAT_MTIME: u32 = 2;
/// EROFS_FEATURE_INCOMPAT_CHUNKED_FILE.
const INCOMPAT_CHUNKED_FILE: u32 = 4;
/// Base-2 logarithm of the block size.
const BLOCK_BITS: u32 = 12;

/// A kind of inode: its bits in the mode, and its number in folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    mode: u16,
    /// As in `struct erofs_dirent`.
    pub number: u8,
}

/// A file.
pub const FILE: Kind = Kind { mode: 0o100_000, number: 1 };
/// A folder.
pub const FOLDER: Kind = Kind { mode: 0o040_000, number: 2 };
/// A character device.
pub const CHARACTER: Kind = Kind { mode: 0o020_000, number: 3 };
/// A named pipe.
pub const FIFO: Kind = Kind { mode: 0o010_000, number: 5 };
/// A symbolic link.
pub const SYMLINK: Kind = Kind { mode: 0o120_000, number: 7 };

/// Where the content of an inode is.
#[derive(Debug)]
pub enum Layout {
    /// In blocks from this one on (EROFS_INODE_FLAT_PLAIN).
    Plain {
        /// The first block.
        block: u32,
    },
    /// Whole blocks so, the rest behind the inode (EROFS_INODE_FLAT_INLINE).
    Inline {
        /// The first block.
        block: u32,
    },
    /// In chunks, each somewhere or nowhere (EROFS_INODE_CHUNK_BASED).
    Chunks {
        /// Base-2 logarithm of the size of a chunk, in bytes.
        bits: u32,
        /// First block of each, or `u32::MAX` for a hole.
        blocks: Vec<u32>,
    },
}

/// What an inode says beside its content.
#[derive(Debug)]
pub struct Inode {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: u64,
    /// Number of names.
    pub links: u32,
}

impl Inode {
    /// An inode with one name.
    pub fn new(kind: Kind, attributes: &Attributes) -> Self {
        let Attributes { mode, uid, gid, mtime, xattrs: _ } = attributes;
        Self { mode: kind.mode | mode & 0o7777, uid: *uid, gid: *gid, mtime: *mtime, links: 1 }
    }

    /// `struct erofs_inode_extended`. `number` is the inode number for programs of 32 bits.
    pub fn encode(&self, layout: &Layout, xattrs: usize, size: u64, number: u32) -> Vec<u8> {
        let (layout, place) = match layout {
            Layout::Plain { block } => (0_u16, *block),
            Layout::Inline { block } => (2, *block),
            Layout::Chunks { bits, .. } => (4, bits - BLOCK_BITS),
        };
        // Units of 4 bytes, the header of 12 bytes counted as one (EROFS_XATTR_ENTRY).
        let xattrs = if xattrs == 0 { 0 } else { ((xattrs - 12) / 4 + 1) as u16 };
        let mut bytes = Vec::with_capacity(INODE as usize);
        // Bit 0: extended.
        bytes.extend((layout << 1 | 1).to_le_bytes());
        bytes.extend(xattrs.to_le_bytes());
        bytes.extend(self.mode.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(place.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(self.uid.to_le_bytes());
        bytes.extend(self.gid.to_le_bytes());
        bytes.extend(self.mtime.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.links.to_le_bytes());
        bytes.resize(INODE as usize, 0);
        bytes
    }
}

/// `struct erofs_super_block`, without a checksum: dm-verity has one for every block. UUID, volume name and the time of
/// the image are zeros, so that equal trees make equal images.
/// `root` is where the root's inode is, in bytes, in the first two blocks.
pub fn superblock(root: u64, inodes: u64, blocks: u32, has_chunks: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(COMPAT_MTIME.to_le_bytes());
    bytes.extend([BLOCK_BITS as u8, 0]);
    bytes.extend(((root / INODE_SLOT) as u16).to_le_bytes());
    bytes.extend(inodes.to_le_bytes());
    bytes.resize(36, 0);
    bytes.extend(blocks.to_le_bytes());
    bytes.resize(80, 0);
    bytes.extend(if has_chunks { INCOMPAT_CHUNKED_FILE } else { 0 }.to_le_bytes());
    bytes.resize(128, 0);
    bytes
}
