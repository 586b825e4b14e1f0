//! The content of folders: blocks of entries, in the order of their names, so that a name is found by halving.
//!
//! Each block has its own entries (12 bytes each: inode, offset of the name, kind) and behind them their names.

use std::ops::Range;

use super::format::Kind;
use crate::verity::BLOCK;

const ENTRY: usize = 12;

/// A name in a folder.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Index of its inode.
    pub inode: usize,
    /// Kind of its inode.
    pub kind: Kind,
}

/// Size of a folder's content, in bytes.
pub fn size(entries: &[Entry<'_>]) -> u64 {
    let blocks = blocks(entries);
    let last = blocks.last().map_or(0, |range| length(&entries[range.clone()]));
    (blocks.len().saturating_sub(1) * BLOCK + last) as u64
}

/// A folder's content. `number` is the inode number of an index.
pub fn encode(entries: &[Entry<'_>], number: impl Fn(usize) -> u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for range in blocks(entries) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let entries = &entries[range];
        let mut offset = entries.len() * ENTRY;
        for entry in entries {
            bytes.extend(number(entry.inode).to_le_bytes());
            bytes.extend((offset as u16).to_le_bytes());
            bytes.extend([entry.kind.number, 0]);
            offset += entry.name.len();
        }
        entries.iter().for_each(|entry| bytes.extend(entry.name));
    }
    bytes
}

fn length(entries: &[Entry<'_>]) -> usize {
    entries.iter().map(|entry| ENTRY + entry.name.len()).sum()
}

/// Which entries go into which block.
fn blocks(entries: &[Entry<'_>]) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (index, entry) in entries.iter().enumerate() {
        let more = ENTRY + entry.name.len();
        if used + more > BLOCK {
            blocks.push(start..index);
            (start, used) = (index, 0);
        }
        used += more;
    }
    blocks.push(start..entries.len());
    blocks
}
