//! An empty ext4 file system, of which as little is written as its kernel reads.
//!
//! ```text
//! block 0          superblock, at byte 1024
//! blocks 1 to g    group descriptors: 32 bytes for each 128 MiB
//! block g+1        bitmap of blocks, then the bitmap of inodes, the inode table, and two folders: `/` and `/lost+found`
//! other groups     bitmap of blocks, bitmap of inodes, inode table: nothing is written but the last one's bitmap of blocks
//! ```
//!
//! Every group but the first is marked as uninitialised, with the checksums that make its kernel believe that
//! (`gdt_csum`): the kernel makes bitmaps of such groups itself, and reads an inode table only where it has written it.
//! There is no journal, and there are no copies of the superblock (`sparse_super2` without any). So what the kernel has not written is never
//! read, which matters on a device that fails such reads; and what is written hardly grows with the size: 256 KiB for 1 TiB.
//! (Linux, Documentation/filesystems/ext4.)
#![allow(clippy::arithmetic_side_effects)] // on sizes that `Layout::new` bounds, and constants

/// Size of a block, in bytes.
pub const BLOCK: u64 = 4096;
/// Blocks of a group: as many as a bitmap of one block has bits.
const GROUP: u64 = 8 * BLOCK;
const INODE: u64 = 256;
const INODES_PER_BLOCK: u64 = BLOCK / INODE;
/// Most inodes of a group: one for 16 KiB.
const MAX_GROUP_INODES: u64 = GROUP / 4;
const DESCRIPTOR: u64 = 32;
/// Largest file system, in blocks: their numbers have 32 bits. A multiple of a group.
const MAX_BLOCKS: u64 = 1 << 32;

const ROOT: u32 = 2;
const LOST_FOUND: u32 = 11;
/// Inodes up to here are in use or reserved.
const USED_INODES: u64 = 11;

const EXT_ATTR: u32 = 0x8;
const DIR_INDEX: u32 = 0x20;
const SPARSE_SUPER2: u32 = 0x200;
const FILETYPE: u32 = 0x2;
const EXTENTS: u32 = 0x40;
const LARGE_FILE: u32 = 0x2;
const HUGE_FILE: u32 = 0x8;
const GDT_CSUM: u32 = 0x10;
const DIR_NLINK: u32 = 0x20;
const EXTRA_ISIZE: u32 = 0x40;

const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;

/// What is to be written: whole blocks, and where they begin, in bytes.
pub type Writes = Vec<(u64, Vec<u8>)>;

/// Where things lie.
struct Layout {
    blocks: u64,
    groups: u64,
    group_inodes: u64,
    descriptor_blocks: u64,
}

impl Layout {
    fn new(size: u64) -> Option<Self> {
        let mut blocks = (size / BLOCK).min(MAX_BLOCKS - GROUP);
        let group_inodes = (blocks.min(GROUP) / 4).next_multiple_of(INODES_PER_BLOCK).min(MAX_GROUP_INODES);
        // A last group without room for its own tables is left out.
        let rest = blocks % GROUP;
        if blocks > GROUP && rest < 2 * (2 + group_inodes / INODES_PER_BLOCK) {
            blocks -= rest;
        }
        let groups = blocks.div_ceil(GROUP);
        let descriptor_blocks = (groups * DESCRIPTOR).div_ceil(BLOCK);
        let layout = Self { blocks, groups, group_inodes, descriptor_blocks };
        let fits = group_inodes >= 2 * INODES_PER_BLOCK && layout.free_blocks(0).is_some();
        fits.then_some(layout)
    }

    fn table_blocks(&self) -> u64 {
        self.group_inodes / INODES_PER_BLOCK
    }

    /// Blocks of a group.
    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP).min(GROUP)
    }

    /// First block of a group's tables: bitmap of blocks, bitmap of inodes, inodes.
    fn tables(&self, group: u64) -> u64 {
        if group == 0 { 1 + self.descriptor_blocks } else { group * GROUP }
    }

    /// The folder `/`; `/lost+found` follows.
    fn folders(&self) -> u64 {
        self.tables(0) + 2 + self.table_blocks()
    }

    fn free_blocks(&self, group: u64) -> Option<u64> {
        let folders = if group == 0 { 2 } else { 0 };
        let used = self.tables(group) - group * GROUP + 2 + self.table_blocks() + folders;
        self.group_blocks(group).checked_sub(used)
    }

    fn free_inodes(&self, group: u64) -> u64 {
        self.group_inodes - if group == 0 { USED_INODES } else { 0 }
    }
}

/// The blocks of an empty file system on a device of `size` bytes, of which it uses the first 16 TiB. None if the device is too small.
pub fn format(size: u64, uuid: [u8; 16]) -> Option<Writes> {
    let layout = Layout::new(size)?;
    let mut descriptors = Vec::new();
    for group in 0..layout.groups {
        descriptors.extend(descriptor(&layout, group, &uuid)?);
    }
    descriptors.resize((layout.descriptor_blocks * BLOCK) as usize, 0);
    let tables = layout.tables(0);
    let mut inodes = vec![0; BLOCK as usize];
    put(&mut inodes, INODE * u64::from(ROOT - 1), &folder(0o755, 3, layout.folders()));
    put(&mut inodes, INODE * u64::from(LOST_FOUND - 1), &folder(0o700, 2, layout.folders() + 1));
    let map = |group| {
        let size = layout.group_blocks(group);
        Some(bitmap(size - layout.free_blocks(group)?, size))
    };
    let mut blocks = vec![
        (0, superblock(&layout, &uuid)?),
        (1, descriptors),
        (tables, map(0)?),
        (tables + 1, bitmap(USED_INODES, layout.group_inodes)),
        (tables + 2, inodes),
        (layout.folders(), names(&[(ROOT, "."), (ROOT, ".."), (LOST_FOUND, "lost+found")])),
        (layout.folders() + 1, names(&[(LOST_FOUND, "."), (ROOT, "..")])),
    ];
    // e2fsprogs wants the last one to be written, which may end early.
    if let last @ 1.. = layout.groups - 1 {
        blocks.push((layout.tables(last), map(last)?));
    }
    Some(blocks.into_iter().map(|(block, bytes)| (block * BLOCK, bytes)).collect())
}

/// Writes `bytes` at an offset into a block, which they fit into.
fn put(block: &mut [u8], offset: u64, bytes: &[u8]) {
    let place = block.iter_mut().skip(offset as usize);
    place.zip(bytes).for_each(|(to, from)| *to = *from);
}

fn superblock(layout: &Layout, uuid: &[u8; 16]) -> Option<Vec<u8>> {
    let free_blocks = (0..layout.groups).try_fold(0, |sum, group| Some(sum + layout.free_blocks(group)?))?;
    let inodes = layout.groups * layout.group_inodes;
    let mut block = vec![0; BLOCK as usize];
    let fields: [(u64, u32); 19] = [
        (0x00, inodes as u32),
        (0x04, layout.blocks as u32),
        (0x0C, free_blocks as u32),
        (0x10, (inodes - USED_INODES) as u32),
        (0x18, 2), // blocks of 1024 << 2 bytes
        (0x1C, 2), // and clusters
        (0x20, GROUP as u32),
        (0x24, GROUP as u32),
        (0x28, layout.group_inodes as u32),
        (0x34, 0xFFFF << 16),       // no limit to the number of mounts
        (0x38, 0xEF53 | 1 << 16),   // magic, and clean
        (0x3C, 2),                  // read-only after an error
        (0x4C, 1),                  // revision
        (0x54, USED_INODES as u32), // first inode that is not reserved
        (0x58, INODE as u32),       // and its size
        (0x5C, EXT_ATTR | DIR_INDEX | SPARSE_SUPER2),
        (0x60, FILETYPE | EXTENTS),
        (0x64, LARGE_FILE | HUGE_FILE | GDT_CSUM | DIR_NLINK | EXTRA_ISIZE),
        (0x15C, 32 | 32 << 16), // bytes of an inode beyond the first 128 that are, and shall be, in use
    ];
    for (offset, value) in fields {
        put(&mut block, 1024 + offset, &value.to_le_bytes());
    }
    put(&mut block, 1024 + 0x68, uuid);
    put(&mut block, 1024 + 0xEC, uuid); // seed of the hashes of names
    put(&mut block, 1024 + 0xFC, &[1]); // which are half MD4,
    put(&mut block, 1024 + 0x160, &[1]); // of signed characters
    Some(block)
}

fn descriptor(layout: &Layout, group: u64, uuid: &[u8; 16]) -> Option<[u8; DESCRIPTOR as usize]> {
    let tables = layout.tables(group) as u32;
    let (folders, flags) = match group {
        0 => (2, 0),
        last if last + 1 == layout.groups => (0, INODE_UNINIT),
        _ => (0, INODE_UNINIT | BLOCK_UNINIT),
    };
    let free_inodes = layout.free_inodes(group) as u16;
    let mut bytes = [0; DESCRIPTOR as usize];
    for (index, table) in [tables, tables + 1, tables + 2].into_iter().enumerate() {
        put(&mut bytes, 4 * index as u64, &table.to_le_bytes());
    }
    // Of the inodes at the table's end as many were never used as are free.
    let words = [
        (12, layout.free_blocks(group)? as u16),
        (14, free_inodes),
        (16, folders),
        (18, flags),
        (28, free_inodes),
    ];
    for (offset, value) in words {
        put(&mut bytes, offset, &value.to_le_bytes());
    }
    let checked = uuid
        .iter()
        .chain(&(group as u32).to_le_bytes())
        .chain(bytes.iter().take(30))
        .copied()
        .collect::<Vec<u8>>();
    put(&mut bytes, 30, &crc16(&checked).to_le_bytes());
    Some(bytes)
}

/// A folder of one block.
fn folder(mode: u16, links: u16, block: u64) -> [u8; INODE as usize] {
    let mut inode = [0; INODE as usize];
    put(&mut inode, 0, &(0o040_000 | mode).to_le_bytes());
    put(&mut inode, 4, &(BLOCK as u32).to_le_bytes());
    put(&mut inode, 26, &links.to_le_bytes());
    put(&mut inode, 28, &(BLOCK as u32 / 512).to_le_bytes());
    put(&mut inode, 32, &0x8_0000_u32.to_le_bytes()); // its blocks are in extents: a header and one extent
    for (offset, value) in [(40, 0xF30A_u16), (42, 1), (44, 4), (56, 1)] {
        put(&mut inode, offset, &value.to_le_bytes());
    }
    put(&mut inode, 60, &(block as u32).to_le_bytes());
    put(&mut inode, 128, &32_u16.to_le_bytes());
    inode
}

/// A folder's block with these names, all of folders.
fn names(names: &[(u32, &str)]) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    let mut at = 0;
    for (index, (inode, name)) in names.iter().enumerate() {
        let length = (8 + name.len() as u64).next_multiple_of(4);
        // The last entry has all that is left.
        let length = if index + 1 == names.len() { BLOCK - at } else { length };
        put(&mut block, at, &inode.to_le_bytes());
        put(&mut block, at + 4, &(length as u16).to_le_bytes());
        put(&mut block, at + 6, &[name.len() as u8, 2]);
        put(&mut block, at + 8, name.as_bytes());
        at += length;
    }
    block
}

/// A bitmap with the first `used` bits set, and those from `size` on, which stand for nothing.
fn bitmap(used: u64, size: u64) -> Vec<u8> {
    let bit = |at: u64| u8::from(at < used || at >= size);
    (0..BLOCK)
        .map(|byte| (0..8).fold(0, |bits, at| bits | bit(byte.saturating_mul(8).saturating_add(at)) << at))
        .collect()
}

/// CRC-16 (polynomial 0x8005, reflected), from all ones.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xA001 })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn written(size: u64) -> u64 {
        format(size, [7; 16]).unwrap().iter().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// Sizes around each border, from the smallest to the largest, to e2fsck's satisfaction.
    #[test]
    fn e2fsck_finds_nothing() {
        let group = GROUP * BLOCK;
        let sizes = [
            MIB,
            16 * MIB + BLOCK,
            group - BLOCK,
            group,
            group + BLOCK,
            group + 5 * MIB,
            3 * group + 77 * MIB,
            1 << 40,
            1 << 44,
        ];
        for size in sizes {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(size.min((1 << 44) - BLOCK)).unwrap();
            for (offset, bytes) in format(size, [7; 16]).unwrap() {
                assert!(offset + bytes.len() as u64 <= size, "{size}");
                file.as_file().write_all_at(&bytes, offset).unwrap();
            }
            if size > 1 << 37 {
                // e2fsck takes minutes for so many groups.
                continue;
            }
            let output =
                Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(file.path()).output().unwrap();
            assert!(output.status.success(), "{size}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    #[test]
    fn what_is_too_small_is_refused() {
        assert!(format(0, [0; 16]).is_none());
        assert!(format(16 * BLOCK, [0; 16]).is_none());
        assert!(format(MIB, [0; 16]).is_some());
    }

    #[test]
    fn hardly_more_is_written_for_a_larger_one() {
        assert_eq!(written(200 * MIB), written(16 << 30));
        assert_eq!(written(1 << 40) - written(200 * MIB), 63 * BLOCK);
        assert!(written(1 << 44) <= 5 * MIB);
    }

    /// The check value of CRC-16/MODBUS, which is this one.
    #[test]
    fn checksum() {
        assert_eq!(crc16(b"123456789"), 0x4B37);
    }
}
