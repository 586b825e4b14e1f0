//! Descriptor chains, read completely and checked before a device sees them.
//!
//! A driver describes one request by a chain of descriptors in the queue's table
//! (virtio 1.2, 2.7.5): first those that the device may read, then those that it
//! may write. Where `INDIRECT_DESC` was negotiated, the last descriptor may refer
//! to another table in guest memory that holds the rest of the chain. The driver
//! puts the index of the first descriptor into the available ring; the device
//! gives it back in the used ring with the number of bytes it wrote.
//!
//! [`Chain::pop`] reads every ring entry and every descriptor once, so a driver
//! that changes them meanwhile gains nothing, and keeps the outcome as
//! [`Segment`]s, each inside one region of guest memory. Descriptors may cut a
//! request anywhere (`VERSION_1` implies any layout): devices read headers with
//! [`Chain::read`], answer with [`Chain::write`], and turn any range of bytes
//! into host memory with [`slices`].
//!
//! A device's loop, in which nothing is lost whether or not `EVENT_IDX` is used:
//!
//! ```text
//! loop {
//!     while chain.pop(queue, memory)? { .. used::add(queue, memory, chain.head, written)?; }
//!     if !used::rearm(queue, memory)? { break }
//! }
//! used::notify(queue, memory, interrupt)?;
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

use super::SharedPages;

/// Bytes of one descriptor.
const DESCRIPTOR_SIZE: u32 = 16;

/// A queue or chain that breaks the rules (virtio 1.2, 2.7).
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// The available ring promises more chains than the queue has room for.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// The index that the device reads next.
        next: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A descriptor index is outside the table.
    #[error("descriptor {index} is outside the table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// The chain has a loop, or is longer than the queue allows.
    #[error("chain from descriptor {head} has more than {limit} descriptors")]
    TooLong {
        /// Index of the first descriptor.
        head: u16,
        /// Most descriptors that a chain may have.
        limit: u16,
    },
    /// A descriptor names no bytes.
    #[error("descriptor {index} has length 0")]
    Empty {
        /// Index of the descriptor.
        index: u16,
    },
    /// A readable descriptor follows a writable one.
    #[error("readable descriptor {index} follows a writable one")]
    Order {
        /// Index of the descriptor.
        index: u16,
    },
    /// The chain's bytes cannot be counted in 32 bits.
    #[error("chain from descriptor {head} is longer than 4 GiB")]
    TooManyBytes {
        /// Index of the first descriptor.
        head: u16,
    },
    /// An indirect descriptor, but the feature was not negotiated.
    #[error("descriptor {index} is indirect, which was not negotiated")]
    IndirectNotNegotiated {
        /// Index of the descriptor.
        index: u16,
    },
    /// An indirect descriptor inside an indirect table, or one with a successor.
    #[error("indirect descriptor {index} is inside an indirect table or not the last of its chain")]
    IndirectPlace {
        /// Index of the descriptor.
        index: u16,
    },
    /// An indirect table that is empty, not a whole number of descriptors, or too long.
    #[error("indirect table of descriptor {index} has {length} bytes")]
    IndirectLength {
        /// Index of the descriptor.
        index: u16,
        /// Length of the table, bytes.
        length: u32,
    },
    /// A range that is not completely in guest memory.
    #[error("{length:#x} bytes at {address:#x} are not in guest memory")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Length, bytes.
        length: u64,
    },
    /// A range that the guest does not share.
    #[error("{length:#x} bytes at {address:#x} are private to the guest")]
    Private {
        /// Guest-physical address.
        address: u64,
        /// Length, bytes.
        length: u64,
    },
    /// A request that does not have the bytes it should have.
    #[error("chain has no {length} bytes at offset {offset}")]
    Short {
        /// Offset in the readable or the writable part, bytes.
        offset: u64,
        /// Length, bytes.
        length: u64,
    },
}

/// A part of guest memory that a descriptor names, checked to be inside one region of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length, bytes; not 0.
    pub length: u32,
}

/// One descriptor chain. A device keeps one and reads chain after chain into it: nothing is allocated in the
/// steady state.
pub struct Chain {
    /// Index of the first descriptor, for the used ring.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
    /// Whether `INDIRECT_DESC` was negotiated.
    indirect: bool,
    /// What of memory the guest shares; all, if nobody tells.
    shared: Option<Arc<dyn SharedPages>>,
}

/// Where the descriptors of a walk lie.
#[derive(Clone, Copy)]
struct Table {
    address: GuestAddress,
    /// Descriptors.
    size: u16,
}

impl Chain {
    /// An empty chain for queues with the negotiated `features`.
    pub fn new(features: u64) -> Self {
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        Self { head: 0, readable: Vec::new(), writable: Vec::new(), indirect, shared: None }
    }

    /// The same for memory of which the guest shares only some.
    pub fn within(self, shared: Option<Arc<dyn SharedPages>>) -> Self {
        Self { shared, ..self }
    }

    /// Reads the next available chain of `queue`: `Ok(false)` if there is none, or the queue is not ready. On
    /// an error the driver is broken and the device should need a reset.
    pub fn pop(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.check_rings(queue)?;
        let Some(head) = next_head(queue, memory)? else { return Ok(false) };
        self.head = head;
        self.walk(queue, memory)?;
        Ok(true)
    }

    /// Checks that the guest shares all of the queue.
    fn check_rings(&self, queue: &Queue) -> Result<(), ChainError> {
        if self.shared.is_none() || !queue.ready() {
            return Ok(());
        }
        // Before and behind the entries of the rings are three fields of two bytes.
        let size = u64::from(queue.size());
        let ring = |entry: u64| size.saturating_mul(entry).saturating_add(6);
        self.check_shared(queue.desc_table(), size.saturating_mul(u64::from(DESCRIPTOR_SIZE)))?;
        self.check_shared(queue.avail_ring(), ring(2))?;
        self.check_shared(queue.used_ring(), ring(8))
    }

    fn check_shared(&self, address: u64, length: u64) -> Result<(), ChainError> {
        match &self.shared {
            Some(shared) if !shared.is_shared(address, length) => {
                Err(ChainError::Private { address, length })
            }
            _ => Ok(()),
        }
    }

    /// Follows the chain from `self.head` through the queue's table and an indirect one.
    fn walk(&mut self, queue: &Queue, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let mut table = Table { address: GuestAddress(queue.desc_table()), size: queue.size() };
        let mut index = self.head;
        let mut in_indirect = false;
        let mut total = 0u64;
        let mut room = table.size;
        loop {
            // Only a loop makes a chain longer than its table.
            room = room.checked_sub(1).ok_or(ChainError::TooLong { head: self.head, limit: table.size })?;
            let descriptor = table.descriptor(index, memory)?;
            if descriptor.refers_to_indirect_table() {
                if in_indirect || descriptor.has_next() {
                    return Err(ChainError::IndirectPlace { index });
                }
                if !self.indirect {
                    return Err(ChainError::IndirectNotNegotiated { index });
                }
                // The limit is the device's queue size; the driver may have chosen a smaller one (2.7.5.3.1).
                table = Table::indirect(index, &descriptor, queue.max_size())?;
                self.check_shared(table.address.raw_value(), descriptor.len().into())?;
                (index, room, in_indirect) = (0, table.size, true);
                continue;
            }
            total = total.saturating_add(u64::from(descriptor.len()));
            if total > u64::from(u32::MAX) {
                return Err(ChainError::TooManyBytes { head: self.head });
            }
            self.push(index, &descriptor, memory)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Adds the memory of one descriptor, a segment per region that it touches.
    fn push(
        &mut self,
        index: u16,
        descriptor: &Descriptor,
        memory: &GuestMemoryMmap,
    ) -> Result<(), ChainError> {
        let (address, length) = (descriptor.addr(), descriptor.len());
        if length == 0 {
            return Err(ChainError::Empty { index });
        }
        self.check_shared(address.raw_value(), length.into())?;
        let segments = if descriptor.is_write_only() {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(ChainError::Order { index });
        };
        let outside = ChainError::Memory { address: address.raw_value(), length: u64::from(length) };
        let mut rest = Segment { address, length };
        loop {
            let Some(room) = room_at(memory, rest.address) else { return Err(outside) };
            let part = u32::try_from(room).unwrap_or(u32::MAX).min(rest.length);
            segments.push(Segment { address: rest.address, length: part });
            rest.length = rest.length.saturating_sub(part);
            if rest.length == 0 {
                return Ok(());
            }
            let Some(next) = rest.address.checked_add(u64::from(part)) else { return Err(outside) };
            rest.address = next;
        }
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        length(&self.writable)
    }

    /// Copies `data.len()` bytes from `offset` of the readable part.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: u64, data: &mut [u8]) -> Result<(), ChainError> {
        let range = checked_range(&self.readable, offset, data.len())?;
        let mut rest = data;
        for slice in slices(memory, &self.readable, range) {
            let (part, others) = rest.split_at_mut_checked(slice.len()).unwrap_or_default();
            slice.copy_to(part);
            rest = others;
        }
        Ok(())
    }

    /// Copies `data` to `offset` of the writable part.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        let range = checked_range(&self.writable, offset, data.len())?;
        let mut rest = data;
        for slice in slices(memory, &self.writable, range) {
            let (part, others) = rest.split_at_checked(slice.len()).unwrap_or_default();
            slice.copy_from(part);
            rest = others;
        }
        Ok(())
    }

    /// Splits the last byte off the writable part, where a block device puts its status. `None` if nothing
    /// is writable.
    pub fn split_last_writable(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        last.length = last.length.saturating_sub(1);
        let byte = last.address.checked_add(u64::from(last.length))?;
        if last.length == 0 {
            self.writable.pop();
        }
        Some(byte)
    }
}

impl Table {
    /// The table that `descriptor` (at `index`) refers to, of at most `limit` descriptors.
    fn indirect(index: u16, descriptor: &Descriptor, limit: u16) -> Result<Self, ChainError> {
        let length = descriptor.len();
        let size = u16::try_from(length / DESCRIPTOR_SIZE).unwrap_or(u16::MAX);
        if size == 0 || size > limit || !length.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(ChainError::IndirectLength { index, length });
        }
        Ok(Self { address: descriptor.addr(), size })
    }

    /// Reads descriptor `index`.
    fn descriptor(&self, index: u16, memory: &GuestMemoryMmap) -> Result<Descriptor, ChainError> {
        if index >= self.size {
            return Err(ChainError::Index { index, size: self.size });
        }
        let offset = u64::from(index).saturating_mul(u64::from(DESCRIPTOR_SIZE));
        read_at(memory, self.address, offset)
    }
}

/// Takes the index of the next chain's first descriptor from the available ring.
fn next_head(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<Option<u16>, ChainError> {
    if !queue.ready() {
        return Ok(None);
    }
    let ring = GuestAddress(queue.avail_ring());
    let index = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|_| ChainError::Memory { address: ring.raw_value(), length: 4 })?
        .0;
    let (next, size) = (queue.next_avail(), queue.size());
    let available = index.wrapping_sub(next);
    if available > size {
        return Err(ChainError::AvailableIndex { index, next, size });
    }
    if available == 0 {
        return Ok(None);
    }
    // flags and idx, then the entries, two bytes each
    let entry = u64::from(next.checked_rem(size).unwrap_or(0)).saturating_mul(2).saturating_add(4);
    let head = u16::from_le(read_at(memory, ring, entry)?);
    queue.set_next_avail(next.wrapping_add(1));
    Ok(Some(head))
}

/// Reads an object `offset` bytes after `base`.
fn read_at<T: vm_memory::ByteValued>(
    memory: &GuestMemoryMmap,
    base: GuestAddress,
    offset: u64,
) -> Result<T, ChainError> {
    let outside = || ChainError::Memory {
        address: base.raw_value().saturating_add(offset),
        length: size_of::<T>() as u64,
    };
    let address = base.checked_add(offset).ok_or_else(outside)?;
    memory.read_obj(address).map_err(|_| outside())
}

/// Bytes from `address` to the end of its memory region; `None` outside memory.
fn room_at(memory: &GuestMemoryMmap, address: GuestAddress) -> Option<u64> {
    let region = memory.find_region(address)?;
    let offset = region.to_region_addr(address)?;
    region.len().checked_sub(offset.raw_value())
}

/// Bytes in `segments`.
pub fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length)).sum()
}

/// The range of `length` bytes from `offset`, if `segments` have it.
fn checked_range(segments: &[Segment], offset: u64, length: usize) -> Result<Range<u64>, ChainError> {
    let short = ChainError::Short { offset, length: length as u64 };
    match offset.checked_add(length as u64) {
        Some(end) if end <= self::length(segments) => Ok(offset..end),
        _ => Err(short),
    }
}

/// The part of `segments` that lies in `range` of their bytes, in order.
pub fn sub_segments(segments: &[Segment], range: Range<u64>) -> impl Iterator<Item = Segment> {
    let mut start = 0u64;
    segments.iter().filter_map(move |segment| {
        let first = start;
        start = start.saturating_add(u64::from(segment.length));
        let from = range.start.max(first);
        let to = range.end.min(start);
        let length = u32::try_from(to.checked_sub(from)?).ok()?;
        let address = segment.address.checked_add(from.checked_sub(first)?)?;
        (length != 0).then_some(Segment { address, length })
    })
}

/// Host memory behind the bytes in `range` of `segments`, one slice per segment. `memory` must be the one that
/// the segments were checked against.
pub fn slices<'a>(
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    range: Range<u64>,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    sub_segments(segments, range)
        .filter_map(|segment| memory.get_slice(segment.address, usize::try_from(segment.length).ok()?).ok())
}

#[cfg(test)]
mod tests;
