//! What all tables have in common: the header (ACPI 6.4, 5.2.6), its length and
//! checksum, and the buffer into which they are written one after the other.

use crate::bytes::Bytes;

/// Size of the header of a table, bytes.
pub(super) const HEADER_SIZE: usize = 36;
/// Offset of the length in the header.
const LENGTH: usize = 4;
/// Offset of the checksum in the header.
const CHECKSUM: usize = 9;
/// Every table starts at a multiple of this.
const ALIGNMENT: usize = 16;

/// "OEMID" of every table.
pub(super) const OEM_ID: [u8; 6] = *b"COFFER";
/// "OEM Table ID" of every table, and the hypervisor's name in the FADT.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"COFFERDM";

/// The header of a table, its length and checksum still zero.
pub(super) const fn header(signature: &[u8; 4], revision: u8) -> Bytes {
    Bytes::new()
        .slice(signature)
        .u32(0)
        .u8(revision)
        .u8(0)
        .slice(&OEM_ID)
        .slice(&OEM_TABLE_ID)
        .u32(1) // OEM revision
        .slice(b"CFDM") // creator
        .u32(1) // creator revision
}

/// The tables written so far. What does not fit into the buffer is counted but
/// not written, so that only the end of the work has to be checked.
pub(super) struct Tables<'a> {
    out: &'a mut [u8],
    base: u64,
    length: usize,
}

impl<'a> Tables<'a> {
    /// An empty set of tables in `out`, which the guest sees at `base`.
    pub fn new(out: &'a mut [u8], base: u64) -> Self {
        Self { out, base, length: 0 }
    }

    /// Bytes written, or that would have been written into a larger buffer.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Appends `bytes` and returns their offset.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let offset = self.length;
        self.patch(offset, bytes);
        self.length += bytes.len();
        offset
    }

    /// Appends `bytes` as the start of a table, aligned, and returns their offset.
    pub fn begin(&mut self, bytes: &[u8]) -> usize {
        let padding = self.length.next_multiple_of(ALIGNMENT) - self.length;
        self.put([0; ALIGNMENT].get(..padding).unwrap_or_default());
        self.put(bytes)
    }

    /// Overwrites the bytes at `offset`.
    pub fn patch(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(place) = self.out.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Ends the table that starts at `start`: fills in its length and checksum.
    /// Returns its guest-physical address.
    pub fn finish(&mut self, start: usize) -> u64 {
        let length = self.length - start;
        // At most `MAX_SIZE`, as a test shows.
        self.patch(start + LENGTH, &(length as u32).to_le_bytes());
        self.seal(start, length, CHECKSUM);
        self.base + start as u64
    }

    /// Makes the `length` bytes at `start` sum up to zero by the one at `checksum`
    /// after the start, which is zero so far.
    pub fn seal(&mut self, start: usize, length: usize, checksum: usize) {
        let bytes = self.out.get(start..start + length).unwrap_or_default();
        let sum = bytes.iter().fold(0, |sum: u8, &byte| sum.wrapping_add(byte));
        self.patch(start + checksum, &[sum.wrapping_neg()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_gets_its_length_checksum_and_address() {
        let mut out = [0xAA; 64];
        let mut tables = Tables::new(&mut out, 0x1000);
        tables.put(&[1]);
        let start = tables.begin(&header(b"TEST", 3).array::<HEADER_SIZE>());
        tables.put(&[5]);
        assert_eq!((start, tables.finish(start), tables.len()), (16, 0x1010, 53));
        assert_eq!(out[1..16], [0; 15], "the gap before a table is zero");
        assert_eq!(out[16..24], *b"TEST\x25\0\0\0");
        assert_eq!(out[16..53].iter().fold(0, |sum: u8, &byte| sum.wrapping_add(byte)), 0);
        assert_eq!(out[53..], [0xAA; 11], "nothing is written behind the end");
    }

    #[test]
    fn what_does_not_fit_is_counted_and_not_written() {
        let mut out = [0xAA; 3];
        let mut tables = Tables::new(&mut out, 0);
        tables.put(&[1, 2]);
        tables.put(&[3, 4]);
        tables.patch(2, &[5, 6]);
        tables.patch(usize::MAX - 1, &[7]);
        tables.seal(1, 4, 0);
        assert_eq!(tables.len(), 4);
        assert_eq!(out, [1, 0, 0xAA]);
    }
}
