//! A small driver: a queue written by hand in memory that the device works on.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::*;
use crate::interrupt::InterruptLine;
use crate::virtio::status;

pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
/// Where requests lie: headers, then data.
pub const HEADERS: u64 = 0x8000;
pub const DATA: u64 = 0x2_0000;
/// Guest memory is two regions that touch here.
pub const BORDER: u64 = 0x10_0000;
pub const MEMORY: u64 = 0x20_0000;

#[derive(Default)]
pub struct Line(AtomicUsize);

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Part of a chain: address, length, whether the device writes it.
pub type Part = (u64, u32, bool);

/// What the device gave back for one chain.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub used: u32,
    pub data: Vec<u8>,
}

pub struct Guest {
    pub device: Block,
    pub memory: Memory,
    pub interrupt: Arc<VirtioInterrupt>,
    line: Arc<Line>,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

/// A file of `bytes` with different sectors.
pub fn image(bytes: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..bytes).map(pattern).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    file
}

pub fn pattern(at: usize) -> u8 {
    (at / 512 * 7 + at % 251) as u8
}

pub fn options(file: &File, engine: Engine) -> BlockOptions {
    let source = BlockSource::File(file.try_clone().unwrap(), "image".into());
    BlockOptions { engine, ..BlockOptions::new(source, "a drive with a long name") }
}

impl Guest {
    pub fn new(options: BlockOptions) -> Self {
        Self::with_features(options, 0)
    }

    pub fn with_features(options: BlockOptions, features: u64) -> Self {
        let device = Block::new(BlockFile::open(options).unwrap()).unwrap();
        let ranges = [(GuestAddress(0), BORDER as usize), (GuestAddress(BORDER), (MEMORY - BORDER) as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let line = Arc::new(Line::default());
        let interrupt = Arc::new(VirtioInterrupt::new(line.clone()));
        let mut guest = Self { device, memory, interrupt, line, next_descriptor: 0, available: 0, seen: 0 };
        guest.activate(features);
        guest
    }

    /// Activates the device with its own features and some of the ring.
    pub fn activate(&mut self, features: u64) {
        self.activate_with(features | self.device.features());
    }

    pub fn activate_with(&mut self, features: u64) {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
        for ring in [AVAILABLE, USED] {
            self.memory.write_slice(&[0; 0x1000], GuestAddress(ring)).unwrap();
        }
        (self.next_descriptor, self.available, self.seen) = (0, 0, 0);
        self.interrupt.status.store(status::DRIVER_OK, Ordering::SeqCst);
        let driver = Driver {
            shared: None,
            memory: self.memory.clone(),
            queues: vec![queue],
            features: features | 1 << VIRTIO_RING_F_INDIRECT_DESC,
            interrupt: self.interrupt.clone(),
        };
        self.device.activate(driver).unwrap();
        self.device.notify(0);
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn get16(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn put16(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn interrupts(&self) -> usize {
        self.line.0.load(Ordering::SeqCst)
    }

    /// Makes a chain of `parts` available; returns its head. The queue has room for 256 descriptors at a time.
    pub fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_descriptor % QUEUE_SIZE;
        for (index, &(address, length, writable)) in parts.iter().enumerate() {
            let place = self.next_descriptor % QUEUE_SIZE;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let more = if index + 1 < parts.len() { VRING_DESC_F_NEXT } else { 0 };
            let flags = more | if writable { VRING_DESC_F_WRITE } else { 0 };
            let next = self.next_descriptor % QUEUE_SIZE;
            let descriptor = Descriptor::new(address, length, flags as u16, next);
            self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * u64::from(place))).unwrap();
        }
        self.offer_head(head);
        head
    }

    pub fn offer_head(&mut self, head: u16) {
        self.put16(AVAILABLE + 4 + 2 * u64::from(self.available % QUEUE_SIZE), head);
        self.available = self.available.wrapping_add(1);
        self.put16(AVAILABLE + 2, self.available);
    }

    pub fn used_index(&self) -> u16 {
        self.get16(USED + 2)
    }

    /// Head and length of the next used element, if there is one.
    pub fn next_used(&mut self) -> Option<(u16, u32)> {
        if self.seen == self.used_index() {
            return None;
        }
        let element = USED + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        Some((head as u16, length))
    }

    /// Runs the device's events until it has used `count` chains in all, or is broken.
    pub fn run_until(&mut self, count: u16) {
        while self.used_index() != count && !self.interrupt.is_broken() {
            assert!(self.step(30), "the device stopped at {} of {count}", self.used_index());
        }
    }

    /// Waits for one of the device's events, `seconds` at most.
    pub fn step(&mut self, seconds: i64) -> bool {
        let mut events = vec![(TIMER_EVENT, PollFd::new(self.device.timer.descriptor(), PollFlags::IN))];
        if let Some(uring) = &self.device.uring {
            events.push((COMPLETION_EVENT, PollFd::new(uring.event(), PollFlags::IN)));
        }
        let mut descriptors: Vec<_> = events.iter().map(|(_, fd)| fd.clone()).collect();
        poll(&mut descriptors, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).unwrap();
        let ready: Vec<u32> = events
            .iter()
            .zip(&descriptors)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|((event, _), _)| *event)
            .collect();
        for &event in &ready {
            self.device.wake(event);
        }
        !ready.is_empty()
    }

    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(at, &header);
    }

    /// One request: header, `out` to be read by the device, `length` bytes and a status to be written.
    pub fn request(&mut self, kind: u32, sector: u64, out: &[u8], length: u32) -> Answer {
        self.header(HEADERS, kind, sector);
        let (status, input) = (HEADERS + 0x100, DATA + out.len() as u64);
        self.put(status, &[0xFF]);
        self.put(DATA, out);
        let mut parts = vec![(HEADERS, 16, false)];
        if !out.is_empty() {
            parts.push((DATA, out.len() as u32, false));
        }
        if length > 0 {
            self.put(input, &vec![0xAA; length as usize]);
            parts.push((input, length, true));
        }
        parts.push((status, 1, true));
        let head = self.offer(&parts);
        self.device.notify(0);
        self.run_until(self.seen.wrapping_add(1));
        let (used_head, used) = self.next_used().expect("device is broken");
        assert_eq!(used_head, head);
        Answer { status: self.get(status, 1)[0], used, data: self.get(input, length as usize) }
    }
}
