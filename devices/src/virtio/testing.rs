//! The driver's side, for tests: rings written by hand, and an interrupt line that counts.
//!
//! The fuzz targets (`tests/fuzz`) use it too, by the feature `test-support`, which the monitor never enables.
// A test that has set itself up wrongly should stop.
#![allow(clippy::unwrap_used, clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Memory;
use crate::interrupt::InterruptLine;

/// Descriptor flag: there is a next one.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// An interrupt line that counts its edges.
#[derive(Default)]
pub struct Line(AtomicUsize);

impl Line {
    /// Edges so far.
    pub fn edges(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl InterruptLine for Line {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Guest memory of these (start, length) ranges.
pub fn memory(ranges: &[(u64, usize)]) -> Memory {
    let ranges: Vec<_> = ranges.iter().map(|&(start, length)| (GuestAddress(start), length)).collect();
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A split virtqueue in guest memory, as its driver sees it: table, available ring and used ring follow one
/// another, a page-aligned 0x1000 bytes each, so up to 256 descriptors.
pub struct Ring {
    memory: Memory,
    base: u64,
    size: u16,
}

impl Ring {
    /// A queue of `size` at `base`.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        assert!(size <= 256 && base.is_multiple_of(0x1000));
        Self { memory: memory.clone(), base, size }
    }

    /// Address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    pub fn available(&self) -> u64 {
        self.base + 0x1000
    }

    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + 0x2000
    }

    /// The device's side of it.
    pub fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.table())).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used())).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn describe_in(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.describe_in(self.table(), index, address, length, flags, next);
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer(&self, head: u16) {
        let index = self.u16(self.available() + 2);
        self.write(self.available() + 4 + u64::from(index % self.size) * 2, &head.to_le_bytes());
        self.set_index(index.wrapping_add(1));
    }

    /// Writes the available index.
    pub fn set_index(&self, index: u16) {
        self.write(self.available() + 2, &index.to_le_bytes());
    }

    /// Describes a chain of (address, length, device writes) from descriptor `first` on, and makes it available.
    pub fn offer_chain(&self, first: u16, parts: &[(u64, u32, bool)]) {
        for (index, &(address, length, writes)) in (first..).zip(parts) {
            let last = usize::from(index - first) + 1 == parts.len();
            let flags = if writes { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(index, address, length, flags, index + 1);
        }
        self.offer(first);
    }

    /// What the device has given back: (head, bytes written), oldest first; up to one ring full.
    pub fn completed(&self) -> Vec<(u32, u32)> {
        let u32_at = |address| self.memory.read_obj::<u32>(GuestAddress(address)).unwrap();
        let entry = |index: u16| self.used() + 4 + u64::from(index % self.size) * 8;
        (0..self.u16(self.used() + 2)).map(|index| (u32_at(entry(index)), u32_at(entry(index) + 4))).collect()
    }

    /// Writes into guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads two bytes of guest memory.
    pub fn u16(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}
