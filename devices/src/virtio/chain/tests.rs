use proptest::prelude::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;

use super::super::VirtioInterrupt;
use super::super::testing::{Line, NEXT, Ring, WRITE, memory};
use super::super::{Memory, used};
use super::*;
use std::sync::Arc;

const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const SIZE: u16 = 8;

/// Two regions that touch, a hole, a third.
fn three_regions() -> Memory {
    memory(&[(0, 0x1_0000), (0x1_0000, 0x1_0000), (0x4_0000, 0x1_0000)])
}

struct Rig {
    memory: Memory,
    ring: Ring,
    queue: Queue,
    chain: Chain,
}

impl Rig {
    fn new() -> Self {
        let memory = three_regions();
        let ring = Ring::new(&memory, 0x1000, SIZE);
        let queue = ring.queue(false);
        Self { memory, ring, queue, chain: Chain::new(FEATURES) }
    }

    fn pop(&mut self) -> Result<bool, ChainError> {
        self.chain.pop(&mut self.queue, &self.memory)
    }

    fn pop_one(&mut self, parts: &[(u64, u32, bool)]) -> Result<bool, ChainError> {
        self.ring.offer_chain(0, parts);
        self.pop()
    }
}

fn segment(address: u64, length: u32) -> Segment {
    Segment { address: GuestAddress(address), length }
}

#[test]
fn chains_come_in_order_and_whole() {
    let mut rig = Rig::new();
    assert_eq!(rig.pop(), Ok(false));
    rig.ring.offer_chain(3, &[(0x8000, 16, false), (0x9000, 512, true), (0xA000, 1, true)]);
    rig.ring.offer_chain(1, &[(0x7000, 4, true)]);
    assert_eq!(rig.pop(), Ok(true));
    assert_eq!(rig.chain.head, 3);
    assert_eq!(rig.chain.readable, [segment(0x8000, 16)]);
    assert_eq!(rig.chain.writable, [segment(0x9000, 512), segment(0xA000, 1)]);
    assert_eq!((rig.chain.readable_len(), rig.chain.writable_len()), (16, 513));
    assert_eq!(rig.pop(), Ok(true));
    assert_eq!((rig.chain.head, rig.chain.readable.len()), (1, 0));
    assert_eq!(rig.chain.writable, [segment(0x7000, 4)]);
    assert_eq!(rig.pop(), Ok(false));
}

#[test]
fn the_ring_wraps_around() {
    let mut rig = Rig::new();
    for round in 0..u32::from(u16::MAX) + 20 {
        assert_eq!(rig.pop_one(&[(0x8000, 1, false)]), Ok(true), "{round}");
    }
}

#[test]
fn a_queue_that_is_not_ready_is_empty() {
    let mut rig = Rig::new();
    rig.queue.set_ready(false);
    assert_eq!(rig.pop_one(&[(0x8000, 1, false)]), Ok(false));
    assert_eq!(used::rearm(&mut rig.queue, &rig.memory), Ok(false));
}

#[test]
fn a_descriptor_over_two_regions_becomes_two_segments() {
    let mut rig = Rig::new();
    assert_eq!(rig.pop_one(&[(0xFFF0, 0x20, false)]), Ok(true));
    assert_eq!(rig.chain.readable, [segment(0xFFF0, 0x10), segment(0x1_0000, 0x10)]);
}

#[test]
fn memory_outside_is_refused() {
    let whole = |address, length| ChainError::Memory { address, length: u64::from(length) };
    for (address, length) in [
        (0x2_0000, 1),
        (0x1_FFFF, 2),
        (0x3_FFFF, 2),
        (0x4_FFFF, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (0x8000, u32::MAX),
        (0x8000_0000_0000_0000, 0x10),
    ] {
        assert_eq!(
            Rig::new().pop_one(&[(address, length, false)]),
            Err(whole(address, length)),
            "{address:#x}"
        );
        assert_eq!(
            Rig::new().pop_one(&[(address, length, true)]),
            Err(whole(address, length)),
            "{address:#x}"
        );
    }
    assert_eq!(Rig::new().pop_one(&[(0x4_FFFF, 1, true)]), Ok(true));
}

#[test]
fn broken_chains_are_refused() {
    assert_eq!(Rig::new().pop_one(&[(0x8000, 0, false)]), Err(ChainError::Empty { index: 0 }));
    assert_eq!(
        Rig::new().pop_one(&[(0x8000, 1, true), (0x8000, 1, false)]),
        Err(ChainError::Order { index: 1 })
    );

    let mut rig = Rig::new();
    rig.ring.offer(SIZE);
    assert_eq!(rig.pop(), Err(ChainError::Index { index: SIZE, size: SIZE }));

    let mut rig = Rig::new();
    rig.ring.describe(0, 0x8000, 1, NEXT, u16::MAX);
    rig.ring.offer(0);
    assert_eq!(rig.pop(), Err(ChainError::Index { index: u16::MAX, size: SIZE }));

    let mut rig = Rig::new();
    rig.ring.describe(2, 0x8000, 1, NEXT, 5);
    rig.ring.describe(5, 0x8000, 1, NEXT, 2);
    rig.ring.offer(2);
    assert_eq!(rig.pop(), Err(ChainError::TooLong { head: 2, limit: SIZE }));
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    let mut rig = Rig::new();
    rig.ring.set_index(SIZE + 1);
    assert_eq!(rig.pop(), Err(ChainError::AvailableIndex { index: SIZE + 1, next: 0, size: SIZE }));
    rig.ring.set_index(u16::MAX);
    assert_eq!(rig.pop(), Err(ChainError::AvailableIndex { index: u16::MAX, next: 0, size: SIZE }));
    rig.ring.describe(0, 0x8000, 1, 0, 0);
    rig.ring.set_index(SIZE);
    assert_eq!(rig.pop(), Ok(true));
}

#[test]
fn more_than_4_gib_are_refused() {
    let huge = memory(&[(0, 0x1_0000), (0x1000_0000, 0x1000_0000)]);
    let ring = Ring::new(&huge, 0x1000, 32);
    let mut queue = ring.queue(false);
    let mut chain = Chain::new(0);
    ring.offer_chain(0, &[(0x1000_0000, 0x1000_0000, false); 16]);
    assert_eq!(chain.pop(&mut queue, &huge), Err(ChainError::TooManyBytes { head: 0 }));
    ring.offer_chain(0, &[(0x1000_0000, 0x1000_0000, false); 15]);
    assert_eq!(chain.pop(&mut queue, &huge), Ok(true));
    assert_eq!(chain.readable_len(), 15 << 28);
}

#[test]
fn an_indirect_table_continues_the_chain() {
    let mut rig = Rig::new();
    rig.ring.describe(0, 0x8000, 16, NEXT, 4);
    // WRITE says nothing about the table (2.7.5.3.2).
    rig.ring.describe(4, 0x6000, 3 * 16, INDIRECT | WRITE, 0);
    rig.ring.describe_in(0x6000, 0, 0x9000, 1, NEXT, 2);
    rig.ring.describe_in(0x6000, 2, 0xA000, 2, NEXT | WRITE, 1);
    rig.ring.describe_in(0x6000, 1, 0xB000, 3, WRITE, 0);
    rig.ring.offer(0);
    assert_eq!(rig.pop(), Ok(true));
    assert_eq!(rig.chain.readable, [segment(0x8000, 16), segment(0x9000, 1)]);
    assert_eq!(rig.chain.writable, [segment(0xA000, 2), segment(0xB000, 3)]);
}

#[test]
fn an_indirect_table_may_be_as_long_as_the_devices_queue() {
    let mut rig = Rig::new();
    rig.queue.set_size(2);
    rig.ring.describe(0, 0x6000, u32::from(SIZE) * 16, INDIRECT, 0);
    for index in 0..SIZE {
        let flags = if index + 1 < SIZE { NEXT } else { 0 };
        rig.ring.describe_in(0x6000, index, 0x9000, 1, flags, index + 1);
    }
    rig.ring.offer(0);
    assert_eq!(rig.pop(), Ok(true));
    assert_eq!(rig.chain.readable_len(), u64::from(SIZE));
}

#[test]
fn broken_indirect_tables_are_refused() {
    let table = |address, length, flags, entry: (u16, u16)| {
        let mut rig = Rig::new();
        rig.ring.describe(1, address, length, INDIRECT | flags, 0);
        rig.ring.describe_in(0x6000, 0, 0x9000, 32, entry.0, entry.1);
        rig.ring.offer(1);
        rig.pop()
    };
    assert_eq!(table(0x6000, 32, 0, (0, 0)), Ok(true));
    assert_eq!(table(0x6000, 32, NEXT, (0, 0)), Err(ChainError::IndirectPlace { index: 1 }));
    assert_eq!(table(0x6000, 32, 0, (INDIRECT, 0)), Err(ChainError::IndirectPlace { index: 0 }));
    for length in [0, 1, 15, 17, 16 * (u32::from(SIZE) + 1), 16 * 0x1_0000, u32::MAX] {
        assert_eq!(table(0x6000, length, 0, (0, 0)), Err(ChainError::IndirectLength { index: 1, length }));
    }
    assert_eq!(table(0x6000, 32, 0, (NEXT, 0)), Err(ChainError::TooLong { head: 1, limit: 2 }));
    assert_eq!(table(0x6000, 32, 0, (NEXT, 2)), Err(ChainError::Index { index: 2, size: 2 }));
    for address in [0x2_0000, 0x1_FFF8, u64::MAX] {
        assert_eq!(table(address, 32, 0, (0, 0)), Err(ChainError::Memory { address, length: 16 }));
    }

    let mut rig = Rig::new();
    rig.chain = Chain::new(0);
    rig.ring.describe(1, 0x6000, 32, INDIRECT, 0);
    rig.ring.offer(1);
    assert_eq!(rig.pop(), Err(ChainError::IndirectNotNegotiated { index: 1 }));
}

#[test]
fn bytes_are_found_however_they_are_cut() {
    let mut rig = Rig::new();
    rig.ring.write(0xFFFE, b"abcdef");
    rig.ring.write(0x7000, b"gh");
    let parts =
        [(0xFFFE, 6, false), (0x7000, 2, false), (0x8000, 1, true), (0x9000, 3, true), (0xA000, 1, true)];
    assert_eq!(rig.pop_one(&parts), Ok(true));
    for (offset, length) in [(0, 8), (1, 6), (2, 1), (7, 1), (8, 0), (0, 0)] {
        let mut data = vec![0; length];
        assert_eq!(rig.chain.read(&rig.memory, offset as u64, &mut data), Ok(()));
        assert_eq!(data, b"abcdefgh"[offset..offset + length]);
    }
    assert_eq!(rig.chain.read(&rig.memory, 1, &mut [0; 8]), Err(ChainError::Short { offset: 1, length: 8 }));
    assert_eq!(
        rig.chain.read(&rig.memory, u64::MAX, &mut [0; 8]),
        Err(ChainError::Short { offset: u64::MAX, length: 8 })
    );
    assert_eq!(rig.chain.write(&rig.memory, 1, b"123"), Ok(()));
    assert_eq!(rig.chain.write(&rig.memory, 5, b"1"), Err(ChainError::Short { offset: 5, length: 1 }));
    let mut data = [0; 3];
    rig.memory.read_slice(&mut data, GuestAddress(0x9000)).unwrap();
    assert_eq!(&data, b"123");
    assert_eq!(rig.chain.split_last_writable(), Some(GuestAddress(0xA000)));
    assert_eq!(rig.chain.split_last_writable(), Some(GuestAddress(0x9002)));
    assert_eq!(rig.chain.writable, [segment(0x8000, 1), segment(0x9000, 2)]);
    rig.chain.writable.clear();
    assert_eq!(rig.chain.split_last_writable(), None);
}

#[test]
fn a_driver_is_interrupted_as_it_wishes() {
    let memory = three_regions();
    let ring = Ring::new(&memory, 0x1000, SIZE);
    let line = Arc::new(Line::default());
    let interrupt = VirtioInterrupt::new(line.clone());
    let edges_after = |queue: &mut Queue, chains: u16| {
        for head in 0..chains {
            used::add(queue, &memory, head, 7).unwrap();
        }
        used::notify(queue, &memory, &interrupt).unwrap();
        line.edges()
    };

    let mut queue = ring.queue(false);
    assert_eq!(edges_after(&mut queue, 2), 1);
    assert_eq!(ring.completed(), [(0, 7), (1, 7)]);
    ring.write(ring.available(), &1u16.to_le_bytes());
    assert_eq!(edges_after(&mut queue, 1), 1);

    // NO_INTERRUPT means nothing here; used_event does.
    let mut queue = ring.queue(true);
    let used_event = ring.available() + 4 + u64::from(SIZE) * 2;
    ring.write(used_event, &1u16.to_le_bytes());
    assert_eq!(edges_after(&mut queue, 1), 1);
    assert_eq!(edges_after(&mut queue, 1), 2);
    assert_eq!(edges_after(&mut queue, 3), 2);
    ring.write(used_event, &6u16.to_le_bytes());
    assert_eq!(edges_after(&mut queue, 4), 3);

    assert_eq!(used::add(&mut queue, &memory, SIZE, 0), Err(ChainError::Index { index: SIZE, size: SIZE }));
}

#[test]
fn rearming_sees_what_came_meanwhile() {
    let mut rig = Rig::new();
    let mut queue = rig.ring.queue(true);
    assert_eq!(used::rearm(&mut queue, &rig.memory), Ok(false));
    rig.ring.offer_chain(0, &[(0x8000, 1, false)]);
    assert_eq!(used::rearm(&mut queue, &rig.memory), Ok(true));
    assert_eq!(rig.chain.pop(&mut queue, &rig.memory), Ok(true));
    assert_eq!(used::rearm(&mut queue, &rig.memory), Ok(false));
    assert_eq!(rig.ring.u16(rig.ring.used() + 4 + u64::from(SIZE) * 8), 1, "avail_event");
}

/// Descriptors biased to what almost works.
fn descriptors() -> impl Strategy<Value = Vec<(u64, u32, u16, u16)>> {
    let address = prop_oneof![
        4 => 0x5000u64..0x2_0010,
        1 => Just(0x6000u64),
        1 => 0x3_FFF0u64..0x5_0010,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![6 => 1u32..0x100, 1 => (0u32..10).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()];
    proptest::collection::vec((address, length, flags, next), 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the rings and tables: no panic, an end, and segments inside memory only.
    #[test]
    fn chains_never_leave_memory(
        descriptors in descriptors(),
        heads in proptest::collection::vec(0u16..SIZE + 1, usize::from(SIZE)),
        index in prop_oneof![4 => 0u16..SIZE, 1 => any::<u16>()],
        features in prop_oneof![Just(0), Just(FEATURES)],
    ) {
        let mut rig = Rig::new();
        rig.chain = Chain::new(features);
        for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
            let (table, index) = if index < SIZE { (rig.ring.table(), index) } else { (0x6000, index - SIZE) };
            rig.ring.describe_in(table, index, address, length, flags, next);
        }
        for head in heads {
            rig.ring.offer(head);
        }
        rig.ring.set_index(index);
        let mut chains = 0;
        while let Ok(true) = rig.pop() {
            chains += 1;
            prop_assert!(chains <= SIZE);
            let parts = [&rig.chain.readable, &rig.chain.writable];
            prop_assert!(parts.iter().any(|part| !part.is_empty()));
            for part in parts.into_iter().flatten() {
                prop_assert!(part.length > 0);
                prop_assert!(rig.memory.get_slice(part.address, part.length as usize).is_ok());
            }
            let mut data = vec![0; 64];
            let read = rig.chain.read(&rig.memory, 3, &mut data);
            prop_assert_eq!(read.is_ok(), rig.chain.readable_len() >= 67);
            let writable = rig.chain.writable_len() > 0;
            prop_assert_eq!(rig.chain.split_last_writable().is_some(), writable);
        }
    }
}

/// The guest shares what is below an address.
struct Below(u64);

impl SharedPages for Below {
    fn is_shared(&self, address: u64, length: u64) -> bool {
        address + length <= self.0
    }
}

#[test]
fn private_memory_is_never_used() {
    let rig = |shared| {
        let mut rig = Rig::new();
        rig.chain = Chain::new(FEATURES).within(Some(Arc::new(Below(shared))));
        rig
    };
    let private = |address, length| Err(ChainError::Private { address, length });
    let mut buffers = rig(0x9000);
    assert_eq!(buffers.pop_one(&[(0x8000, 0x1000, false)]), Ok(true));
    assert_eq!(buffers.pop_one(&[(0x8000, 1, false), (0x8fff, 2, true)]), private(0x8fff, 2));

    let mut table = rig(0x9000);
    table.memory.write_obj([0_u8; 16], GuestAddress(0xA000)).unwrap();
    table.ring.describe(0, 0xA000, 16, INDIRECT, 0);
    table.ring.offer(0);
    assert_eq!(table.pop(), private(0xA000, 16));

    // The rings lie behind the descriptor table, in an order of their own.
    let mut rings = rig(0x1000 + 16 * u64::from(SIZE));
    assert!(matches!(rings.pop_one(&[(0x80, 1, false)]), Err(ChainError::Private { .. })));
    let mut descriptors = rig(0x1000);
    assert_eq!(descriptors.pop(), private(0x1000, 16 * u64::from(SIZE)));
}
