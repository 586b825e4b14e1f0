//! What a request costs before a device has done anything: `Chain::pop` and `used::add`, for a block request of
//! three descriptors, in the table itself and in an indirect one.

#![allow(clippy::expect_used)] // a benchmark that meets the unexpected ends

use std::sync::atomic::Ordering;

use cofferdam_devices::virtio::chain::Chain;
use cofferdam_devices::virtio::used;
use criterion::{Criterion, criterion_group, criterion_main};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 256;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const INDIRECT_TABLE: u64 = 0x6000;
const INDIRECT_FEATURE: u64 = 1 << 28;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Header, data, status: address, length, flags, next.
const REQUEST: [(u64, u32, u16, u16); 3] =
    [(0x8000, 16, NEXT, 1), (0x9000, 4096, NEXT | WRITE, 2), (0x8100, 1, WRITE, 0)];

fn describe(memory: &GuestMemoryMmap, table: u64, index: u64, of: (u64, u32, u16, u16)) {
    let at = GuestAddress(table + index * 16);
    let (address, length, flags, next) = of;
    let bytes =
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
    memory.write_slice(&bytes.concat(), at).expect("the table is in memory");
}

fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).expect("a power of two");
    queue.try_set_desc_table_address(GuestAddress(TABLE)).expect("aligned");
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).expect("aligned");
    queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
    queue.set_ready(true);
    queue
}

/// Offers descriptor 0 again and again.
fn requests(criterion: &mut Criterion, name: &str, features: u64, memory: &GuestMemoryMmap) {
    let (mut queue, mut chain) = (queue(), Chain::new(features));
    let mut index = 0_u16;
    criterion.bench_function(name, |bencher| {
        bencher.iter(|| {
            index = index.wrapping_add(1);
            memory.store(index, GuestAddress(AVAILABLE + 2), Ordering::Release).expect("in memory");
            assert!(chain.pop(&mut queue, memory).expect("a good chain"));
            used::add(&mut queue, memory, chain.head, 4097).expect("in memory");
        });
    });
}

fn chains(criterion: &mut Criterion) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    for (index, descriptor) in (0..).zip(REQUEST) {
        describe(&memory, TABLE, index, descriptor);
        describe(&memory, INDIRECT_TABLE, index, descriptor);
    }
    requests(criterion, "chain of 3 descriptors", 0, &memory);
    describe(&memory, TABLE, 0, (INDIRECT_TABLE, 48, INDIRECT, 0));
    requests(criterion, "indirect chain of 3 descriptors", INDIRECT_FEATURE, &memory);
}

criterion_group!(benches, chains);
criterion_main!(benches);
