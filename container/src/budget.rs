//! What a source may cost, so that a small one cannot fill memory or disk.

use std::cell::Cell;
use std::io::{self, Read};

/// Most names of an image, folders that are only implied by others included.
pub const MAX_NAMES: u64 = 1_000_000;
/// Most bytes of names, targets of links and extended attributes of an image together.
pub const MAX_METADATA: u64 = 256 << 20;

/// What is left to spend.
#[derive(Debug)]
pub struct Budget {
    bytes: Cell<u64>,
    names: Cell<u64>,
    metadata: Cell<u64>,
    limit: u64,
}

/// What was spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// Bytes.
    #[error("it has more than {0} bytes when unpacked, which is the limit (--max-unpacked)")]
    Bytes(u64),
    /// Names.
    #[error("it has more than {MAX_NAMES} names")]
    Names,
    /// Bytes of names, targets and attributes.
    #[error("its names, links and extended attributes have more than {MAX_METADATA} bytes")]
    Metadata,
}

impl From<Exceeded> for io::Error {
    fn from(exceeded: Exceeded) -> Self {
        Self::other(exceeded)
    }
}

impl Budget {
    /// For an image that has at most `limit` bytes when unpacked: archives with their headers, and files with holes.
    pub fn new(limit: u64) -> Self {
        Self {
            bytes: Cell::new(limit),
            names: Cell::new(MAX_NAMES),
            metadata: Cell::new(MAX_METADATA),
            limit,
        }
    }

    /// Spends bytes.
    ///
    /// # Errors
    /// If so many are not left.
    pub fn spend_bytes(&self, count: u64) -> Result<(), Exceeded> {
        spend(&self.bytes, count, Exceeded::Bytes(self.limit))
    }

    /// Spends a name, with so many bytes of metadata.
    ///
    /// # Errors
    /// If so much is not left.
    pub fn spend_name(&self, metadata: usize) -> Result<(), Exceeded> {
        spend(&self.names, 1, Exceeded::Names)?;
        spend(&self.metadata, metadata as u64, Exceeded::Metadata)
    }
}

fn spend(from: &Cell<u64>, count: u64, exceeded: Exceeded) -> Result<(), Exceeded> {
    from.set(from.get().checked_sub(count).ok_or(exceeded)?);
    Ok(())
}

/// A reader whose bytes are paid for.
#[derive(Debug)]
pub struct Paid<'a, R> {
    /// Where bytes come from.
    pub inner: R,
    /// What pays.
    pub budget: &'a Budget,
}

impl<R: Read> Read for Paid<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.budget.spend_bytes(count as u64)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_there_can_be_spent_and_no_more() {
        let budget = Budget::new(10);
        budget.spend_bytes(4).unwrap();
        budget.spend_bytes(6).unwrap();
        assert_eq!(budget.spend_bytes(1), Err(Exceeded::Bytes(10)));
        budget.spend_bytes(0).unwrap();

        budget.spend_name(MAX_METADATA as usize).unwrap();
        assert_eq!(budget.spend_name(1), Err(Exceeded::Metadata));
        (2..MAX_NAMES).for_each(|_| budget.spend_name(0).unwrap());
        assert_eq!(budget.spend_name(0), Err(Exceeded::Names));

        let mut rest = Paid { inner: &[0; 20][..], budget: &Budget::new(19) };
        let error = rest.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), Exceeded::Bytes(19).to_string());
    }
}
