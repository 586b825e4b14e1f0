//! dm-verity: a file system with the hash tree behind it that a kernel verifies each block with.
//!
//! ```text
//! file:  data blocks | superblock | top level | ... | level 0
//! ```
//!
//! Format version 1, SHA-256, blocks of 4,096 bytes, a salt of 32 zero bytes: what containerd's EROFS differ appends
//! to its layers, byte for byte but for the superblock's UUID, which containerd draws and we derive from the root hash.
//! (Linux, Documentation/admin-guide/device-mapper/verity.rst; cryptsetup, lib/verity.)
//!
//! A hash block holds the salted hashes of 128 blocks of the level below. All levels are written while the data passes
//! by, with one unfinished block per level in memory.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use cofferdam_container_manifest::RootHash;
use sha2::{Digest, Sha256};

/// Size of data and hash blocks, in bytes.
pub const BLOCK: usize = 4096;
/// The salt.
pub const SALT: [u8; 32] = [0; 32];

const HASH: usize = 32;
const HASHES: u64 = (BLOCK / HASH) as u64;

/// Writes data, and the tree behind it, to a new file.
pub struct VerityWriter<'a> {
    file: &'a File,
    /// What every hash begins with.
    salted: Sha256,
    data_blocks: u64,
    /// Bytes of data so far, and those of the block that is not full yet.
    position: u64,
    block: Vec<u8>,
    /// From level 0, which has the hashes of the data, up.
    levels: Vec<Level>,
    root: [u8; HASH],
}

struct Level {
    /// Where the unfinished block will be, in bytes.
    position: u64,
    block: Vec<u8>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Root hash of the tree.
    pub root_hash: RootHash,
    /// Size of the data, which is where the superblock is, in bytes.
    pub size: u64,
}

impl Written {
    /// What containerd has in the file beside the layer, `layer.erofs.dmverity`.
    pub fn metadata(&self) -> String {
        format!("{{\n  \"roothash\": \"{}\",\n  \"hashoffset\": {}\n}}", self.root_hash, self.size)
    }
}

/// Blocks of each level of the tree over so many data blocks, from level 0 up. One block needs no tree.
fn level_blocks(data_blocks: u64) -> Vec<u64> {
    let mut levels = Vec::new();
    let mut blocks = data_blocks;
    while blocks > 1 {
        blocks = blocks.div_ceil(HASHES);
        levels.push(blocks);
    }
    levels
}

/// Size of a file of data, superblock and tree, in bytes.
pub fn file_size(data_blocks: u64) -> u64 {
    (data_blocks + 1 + level_blocks(data_blocks).iter().sum::<u64>()) * BLOCK as u64
}

impl<'a> VerityWriter<'a> {
    /// A writer of exactly `data_blocks` blocks, at least one, to an empty file.
    pub fn new(file: &'a File, data_blocks: u64) -> Self {
        let mut position = (data_blocks + 1) * BLOCK as u64;
        let mut levels: Vec<Level> = Vec::new();
        for blocks in level_blocks(data_blocks).iter().rev() {
            levels.insert(0, Level { position, block: Vec::with_capacity(BLOCK) });
            position += blocks * BLOCK as u64;
        }
        Self {
            file,
            salted: Sha256::new_with_prefix(SALT),
            data_blocks,
            position: 0,
            block: Vec::with_capacity(BLOCK),
            levels,
            root: [0; HASH],
        }
    }

    /// Bytes of data so far.
    pub fn position(&self) -> u64 {
        self.position + self.block.len() as u64
    }

    /// Fills up with zeros to this many bytes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn pad_to(&mut self, position: u64) -> io::Result<()> {
        while self.position() < position {
            let count = (position - self.position()).min(BLOCK as u64);
            self.write_all(&[0; BLOCK][..count as usize])?;
        }
        Ok(())
    }

    /// Writes what is left of the tree, and the superblock.
    ///
    /// # Errors
    /// If the file cannot be written, or there were more or fewer data blocks than announced.
    pub fn finish(mut self) -> io::Result<Written> {
        let size = self.data_blocks * BLOCK as u64;
        if self.position() != size {
            let message = format!("{} bytes of data were written, {size} announced", self.position());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        for level in 0..self.levels.len() {
            if !self.levels[level].block.is_empty() {
                self.finish_block(level)?;
            }
        }
        self.file.write_all_at(&self.superblock(), size)?;
        self.file.set_len(file_size(self.data_blocks))?;
        Ok(Written { root_hash: RootHash(self.root), size })
    }

    fn hash(&self, block: &[u8]) -> [u8; HASH] {
        self.salted.clone().chain_update(block).finalize().into()
    }

    /// Takes a hash into `level`, or as the root hash if there is no such level.
    fn add(&mut self, level: usize, hash: [u8; HASH]) -> io::Result<()> {
        let Some(Level { block, .. }) = self.levels.get_mut(level) else {
            self.root = hash;
            return Ok(());
        };
        block.extend(hash);
        if block.len() == BLOCK { self.finish_block(level) } else { Ok(()) }
    }

    fn finish_block(&mut self, level: usize) -> io::Result<()> {
        let Level { position, block } = &mut self.levels[level];
        block.resize(BLOCK, 0);
        self.file.write_all_at(block, *position)?;
        *position += BLOCK as u64;
        let mut block = std::mem::take(block);
        let hash = self.hash(&block);
        block.clear();
        self.levels[level].block = block;
        self.add(level + 1, hash)
    }

    /// dm-verity's superblock, in a block of its own.
    fn superblock(&self) -> Vec<u8> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.root[..16]);
        // Version 8, "custom", of RFC 9562.
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let mut block = Vec::with_capacity(BLOCK);
        block.extend(b"verity\0\0");
        block.extend(1_u32.to_le_bytes());
        block.extend(1_u32.to_le_bytes());
        block.extend(uuid);
        block.extend(b"sha256");
        block.resize(64, 0);
        block.extend((BLOCK as u32).to_le_bytes());
        block.extend((BLOCK as u32).to_le_bytes());
        block.extend(self.data_blocks.to_le_bytes());
        block.extend((SALT.len() as u16).to_le_bytes());
        block.resize(88, 0);
        block.extend(SALT);
        block.resize(BLOCK, 0);
        block
    }
}

impl Write for VerityWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(BLOCK - self.block.len());
        self.block.extend(&bytes[..count]);
        if self.block.len() == BLOCK {
            let mut block = std::mem::take(&mut self.block);
            // Blocks of zeros become holes in the file.
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(&block, self.position)?;
            }
            self.position += BLOCK as u64;
            let hash = self.hash(&block);
            block.clear();
            self.block = block;
            self.add(0, hash)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn write(data_blocks: u64) -> (tempfile::NamedTempFile, Written) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = VerityWriter::new(file.as_file(), data_blocks);
        for block in 0..data_blocks {
            // Some blocks are zeros.
            writer.write_all(&vec![(block % 7) as u8; BLOCK]).unwrap();
        }
        let written = writer.finish().unwrap();
        (file, written)
    }

    fn veritysetup(args: &[&str]) -> String {
        let output = Command::new("/usr/sbin/veritysetup").args(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// The same file, byte for byte, as cryptsetup makes of the same data; around each size where a level begins.
    #[test]
    fn files_are_those_of_veritysetup() {
        for data_blocks in [1, 2, 127, 128, 129, 128 * 128 + 1] {
            let (ours, written) = write(data_blocks);
            let path = ours.path().to_str().unwrap();
            let offset = format!("--hash-offset={}", written.size);
            veritysetup(&["verify", path, path, &written.root_hash.to_string(), &offset]);

            let theirs = tempfile::NamedTempFile::new().unwrap();
            let bytes = std::fs::read(path).unwrap();
            assert_eq!(bytes.len() as u64, file_size(data_blocks));
            std::fs::write(theirs.path(), &bytes[..written.size as usize]).unwrap();
            let uuid: String = bytes[written.size as usize + 16..][..16]
                .iter()
                .enumerate()
                .map(|(at, byte)| format!("{}{byte:02x}", if [4, 6, 8, 10].contains(&at) { "-" } else { "" }))
                .collect();
            let path = theirs.path().to_str().unwrap();
            let uuid = format!("--uuid={uuid}");
            let salt = format!("--salt={}", "00".repeat(32));
            let blocks = format!("--data-blocks={data_blocks}");
            let text = veritysetup(&["format", path, path, &offset, &uuid, &salt, &blocks]);
            assert!(text.contains(&written.root_hash.to_string()), "{data_blocks}: {text}");
            let theirs = std::fs::read(path).unwrap();
            // cryptsetup leaves the rest of the superblock's block out if nothing follows.
            assert_eq!(&bytes[..theirs.len().min(bytes.len())], &theirs[..], "{data_blocks}");
        }
    }

    #[test]
    fn the_announced_size_counts() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = VerityWriter::new(&file, 2);
        writer.write_all(&[1; BLOCK]).unwrap();
        assert_eq!(writer.finish().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn metadata_as_containerd_writes_it() {
        let written = Written { root_hash: RootHash([0xab; 32]), size: 4489216 };
        let root = "ab".repeat(32);
        assert_eq!(
            written.metadata(),
            format!("{{\n  \"roothash\": \"{root}\",\n  \"hashoffset\": 4489216\n}}")
        );
    }
}
