//! Descriptor tables and rings, as [`Chain`] and [`used`] read them.
//!
//! Holds: a chain names memory and nothing else, has bytes, fewer than 4 GiB, and as many segments as its table
//! allows; no more chains come than the ring has room for; each that is given back moves the used index by one.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use cofferdam_devices::virtio::chain::{Chain, slices};
use cofferdam_devices::virtio::testing::{Line, Ring};
use cofferdam_devices::virtio::{Memory, VirtioInterrupt, used};
use cofferdam_fuzz::{Address, Length, clear_rings, three_regions};
use libfuzzer_sys::fuzz_target;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

const RING: u64 = 0x1000;
/// Indirect tables: four, of 0x100 bytes.
const TABLES: u64 = 0x8000;
/// Descriptors read per indirect table of any length that is allowed, and regions.
const MOST_SEGMENTS: usize = 2 * 256 * 3;

#[derive(Arbitrary, Debug)]
struct Input {
    indirect: bool,
    event_idx: bool,
    size: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Describe { index: u8, address: Address, length: Length, flags: u8, next: u8 },
    DescribeAnything { index: u8, address: u64, length: u32, flags: u16, next: u16 },
    DescribeIndirect { index: u8, table: u8, entries: u8 },
    InTable { table: u8, index: u8, address: Address, length: Length, flags: u8, next: u8 },
    Offer(u8),
    OfferAnything(u16),
    Index(u16),
    Flags(u16),
    Pop { write: Option<u8>, answer: bool },
    Rearm,
}

struct Rig {
    memory: Memory,
    ring: Ring,
    queue: Queue,
    chain: Chain,
    interrupt: VirtioInterrupt,
    size: u16,
    given_back: u16,
    in_a_row: u32,
}

impl Rig {
    fn step(&mut self, step: &Step) -> Result<(), cofferdam_devices::virtio::chain::ChainError> {
        let size = self.size;
        let table_at = |table: u8| TABLES + u64::from(table % 4) * 0x100;
        match *step {
            Step::Describe { index, address, length, flags, next } => {
                let (index, next) = (u16::from(index) % size, u16::from(next) % size);
                self.ring.describe(index, address.get(), length.get(), u16::from(flags % 4), next);
            }
            Step::DescribeAnything { index, address, length, flags, next } => {
                self.ring.describe(u16::from(index) % size, address, length, flags, next);
            }
            Step::DescribeIndirect { index, table, entries } => {
                let length = u32::from(entries % 17) * 16;
                let flags = VRING_DESC_F_INDIRECT as u16;
                self.ring.describe(u16::from(index) % size, table_at(table), length, flags, 0);
            }
            Step::InTable { table, index, address, length, flags, next } => {
                let (index, flags) = (u16::from(index % 16), u16::from(flags % 8));
                let (address, length) = (address.get(), length.get());
                self.ring.describe_in(table_at(table), index, address, length, flags, u16::from(next));
            }
            Step::Offer(head) => self.ring.offer(u16::from(head) % size),
            Step::OfferAnything(head) => self.ring.offer(head),
            Step::Index(index) => self.ring.set_index(index),
            Step::Flags(flags) => self.ring.write(self.ring.available(), &flags.to_le_bytes()),
            Step::Pop { write, answer } => return self.pop(write, answer),
            Step::Rearm => {
                used::rearm(&mut self.queue, &self.memory)?;
            }
        }
        // The driver may have offered more.
        self.in_a_row = 0;
        Ok(())
    }

    fn pop(
        &mut self,
        write: Option<u8>,
        answer: bool,
    ) -> Result<(), cofferdam_devices::virtio::chain::ChainError> {
        if !self.chain.pop(&mut self.queue, &self.memory)? {
            return Ok(());
        }
        self.in_a_row += 1;
        assert!(
            write.is_some() || self.in_a_row <= u32::from(self.size),
            "more chains than the ring has room for"
        );
        self.check();
        let written = write.map_or(0, |byte| u64::from(byte).min(self.chain.writable_len()));
        self.chain.write(&self.memory, 0, &vec![0x5A; written as usize])?;
        if write.is_some() {
            // It may have written over the rings.
            self.in_a_row = 0;
        }
        if answer {
            used::add(&mut self.queue, &self.memory, self.chain.head, written as u32)?;
            self.given_back = self.given_back.wrapping_add(1);
            assert_eq!(self.ring.u16(self.ring.used() + 2), self.given_back);
            used::notify(&mut self.queue, &self.memory, &self.interrupt)?;
        }
        Ok(())
    }

    fn check(&self) {
        let (chain, memory) = (&self.chain, &self.memory);
        assert!(chain.head < self.size);
        let total = chain.readable_len() + chain.writable_len();
        assert!(total > 0 && total <= u64::from(u32::MAX));
        assert!(chain.readable.len() + chain.writable.len() <= MOST_SEGMENTS);
        for part in chain.readable.iter().chain(&chain.writable) {
            assert!(part.length > 0);
            assert!(memory.get_slice(part.address, part.length as usize).is_ok(), "{part:?}");
        }
        for (segments, length) in
            [(&chain.readable, chain.readable_len()), (&chain.writable, chain.writable_len())]
        {
            let found: usize =
                slices(memory, segments, 0..length).map(|slice: VolatileSlice| slice.len()).sum();
            assert_eq!(found as u64, length);
        }
        let mut data = [0; 44];
        assert_eq!(chain.read(memory, 3, &mut data).is_ok(), chain.readable_len() >= 47);
        assert!(chain.read(memory, u64::MAX, &mut data).is_err());
    }
}

fuzz_target!(|input: Input| {
    thread_local!(static MEMORY: Memory = three_regions());
    let memory = MEMORY.with(Clone::clone);
    clear_rings(&memory);
    let size = 1 << (input.size % 9);
    let ring = Ring::new(&memory, RING, size);
    let features = u64::from(input.indirect) << VIRTIO_RING_F_INDIRECT_DESC;
    let mut rig = Rig {
        queue: ring.queue(input.event_idx),
        ring,
        chain: Chain::new(features),
        interrupt: VirtioInterrupt::new(Arc::new(Line::default())),
        memory,
        size,
        given_back: 0,
        in_a_row: 0,
    };
    for step in &input.steps {
        // A device stops at the first error.
        if rig.step(step).is_err() {
            break;
        }
    }
    assert!(rig.queue.ready());
});
