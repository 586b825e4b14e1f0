//! Drivers that break the rules.

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::super::*;
use super::guest::{AVAILABLE, BORDER, DATA, Guest, HEADERS, MEMORY, Part, USED, image, options};

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];

fn breaks(parts: &[Part]) {
    for engine in ENGINES {
        let file = image(8192);
        let mut guest = Guest::new(options(&file, engine));
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 0);
        guest.offer(parts);
        guest.device.notify(0);
        assert!(guest.interrupt.is_broken(), "{parts:?}");
        assert_eq!(guest.used_index(), 0);
        // It stays out of service until it is reset.
        guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
        guest.device.notify(0);
        while guest.step(0) {}
        assert_eq!(guest.used_index(), 0);
        guest.device.reset();
        guest.activate(0);
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[], 512).status, 0);
    }
}

#[test]
fn chains_that_are_no_request_break_the_device() {
    breaks(&[(HEADERS, 16, false)]);
    breaks(&[(DATA, 513, true)]);
    breaks(&[(HEADERS, 15, false), (DATA, 513, true)]);
    breaks(&[(HEADERS, 16, false), (DATA, 0, true), (DATA, 1, true)]);
    breaks(&[(HEADERS, 16, false), (MEMORY - 512, 513, true)]);
    breaks(&[(HEADERS, 16, false), (u64::MAX - 100, 513, true)]);
    breaks(&[(DATA, 1, true), (HEADERS, 16, false)]);
}

#[test]
fn what_was_started_before_the_driver_broke_is_still_safe() {
    for engine in ENGINES {
        let file = image(1 << 16);
        let mut guest = Guest::new(options(&file, engine));
        for _ in 0..50 {
            guest.header(HEADERS, VIRTIO_BLK_T_IN, 0);
            guest.offer(&[(HEADERS, 16, false), (DATA, 4097, true)]);
        }
        guest.offer(&[(HEADERS, 16, false)]);
        guest.device.notify(0);
        assert!(guest.interrupt.is_broken());
        guest.device.reset();
        assert_eq!(Arc::strong_count(&guest.memory), 1);
    }
}

#[test]
fn one_chain_offered_many_times_is_bounded_by_the_slots() {
    for engine in ENGINES {
        let file = image(1 << 16);
        let mut guest = Guest::new(options(&file, engine));
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 0);
        let head = guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
        for _ in 1..QUEUE_SIZE {
            guest.offer_head(head);
        }
        guest.device.notify(0);
        guest.run_until(QUEUE_SIZE);
        for round in 1..4 {
            for _ in 0..QUEUE_SIZE {
                guest.offer_head(head);
            }
            guest.device.notify(0);
            guest.run_until(QUEUE_SIZE * (round + 1));
        }
        assert!(guest.device.spare.len() <= usize::from(QUEUE_SIZE));
        assert!(!guest.interrupt.is_broken());
    }
}

#[test]
fn an_available_index_far_ahead_breaks_the_device() {
    let mut guest = Guest::new(options(&image(512), Engine::Sync));
    guest.put16(AVAILABLE + 2, 5000);
    guest.device.notify(0);
    assert!(guest.interrupt.is_broken());
}

#[test]
fn the_status_may_lie_over_the_request_and_the_rings() {
    for engine in ENGINES {
        let mut guest = Guest::new(options(&image(8192), engine));
        guest.header(HEADERS, VIRTIO_BLK_T_OUT, 0);
        guest.offer(&[(HEADERS, 16, false), (HEADERS, 512, false), (HEADERS, 1, true)]);
        guest.header(DATA, VIRTIO_BLK_T_IN, 0);
        guest.offer(&[(DATA, 16, false), (USED, 513, true)]);
        guest.device.notify(0);
        while guest.step(0) {}
    }
}

fn part() -> impl Strategy<Value = (u64, u32)> {
    let address = prop_oneof![
        8 => Just(DATA),
        4 => Just(BORDER - 300),
        2 => Just(HEADERS),
        1 => Just(MEMORY - 1000),
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        6 => (1u32..9).prop_map(|sectors| sectors * 512),
        2 => Just(1u32),
        2 => Just(16),
        2 => 1u32..5000,
        1 => Just(0),
        1 => any::<u32>(),
    ];
    (address, length)
}

type Chain = ((u32, u64), Vec<(u64, u32)>, Vec<(u64, u32)>, bool);

fn chain() -> impl Strategy<Value = Chain> {
    let kind = prop_oneof![6 => 0u32..2, 3 => 0u32..16, 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0u64..140, 1 => any::<u64>()];
    let parts = || proptest::collection::vec(part(), 0..4);
    ((kind, sector), parts(), parts(), prop_oneof![9 => Just(true), 1 => Just(false)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is offered, every chain comes back exactly once, or the device needs reset.
    #[test]
    fn every_chain_is_answered_once_or_the_device_needs_reset(
        chains in proptest::collection::vec(chain(), 1..20),
        uring in any::<bool>(),
        block_size in prop_oneof![Just(512u32), Just(4096)],
        read_only in any::<bool>(),
    ) {
        let file = image(1 << 16);
        let engine = if uring { Engine::Async } else { Engine::Sync };
        let mut guest = Guest::new(BlockOptions { block_size, read_only, ..options(&file, engine) });
        let mut heads = Vec::new();
        for (index, ((kind, sector), readable, writable, well_formed)) in chains.into_iter().enumerate() {
            let header = HEADERS + 0x200 * index as u64;
            guest.header(header, kind, sector);
            let mut parts: Vec<Part> = Vec::new();
            if well_formed {
                parts.push((header, 16, false));
            }
            parts.extend(readable.iter().map(|&(address, length)| (address, length, false)));
            parts.extend(writable.iter().map(|&(address, length)| (address, length, true)));
            if well_formed {
                parts.push((header + 0x100, 1, true));
            }
            if !parts.is_empty() {
                heads.push(guest.offer(&parts));
            }
        }
        let count = heads.len() as u16;
        guest.device.notify(0);
        guest.run_until(count);
        if !guest.interrupt.is_broken() {
            let mut used: Vec<u16> = std::iter::from_fn(|| guest.next_used()).map(|(head, _)| head).collect();
            used.sort_unstable();
            prop_assert_eq!(used, heads);
        }
        prop_assert_eq!(file.metadata().unwrap().len(), 1 << 16);
        guest.device.reset();
        prop_assert_eq!(Arc::strong_count(&guest.memory), 1);
    }

    /// However data is cut, what was written is what is read.
    #[test]
    fn data_survives_any_framing(
        sectors in 1u32..9,
        sector in 0u64..100,
        seed in any::<u8>(),
        cuts in proptest::collection::vec(1u32..700, 0..12),
        uring in any::<bool>(),
    ) {
        let file = image(1 << 16);
        let engine = if uring { Engine::Async } else { Engine::Sync };
        let mut guest = Guest::new(options(&file, engine));
        let length = sectors * 512;
        let data: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        let start = BORDER - 1000;
        let split = |first: u64, length: u32, writable: bool| {
            let (mut parts, mut at): (Vec<Part>, u32) = (Vec::new(), 0);
            for cut in &cuts {
                let piece = (*cut).min(length - at);
                if piece > 0 {
                    parts.push((first + u64::from(at), piece, writable));
                }
                at += piece;
            }
            if at < length {
                parts.push((first + u64::from(at), length - at, writable));
            }
            parts
        };
        guest.header(start - 16, VIRTIO_BLK_T_OUT, sector);
        guest.put(start, &data);
        let mut parts = split(start - 16, length + 16, false);
        parts.push((DATA, 1, true));
        guest.offer(&parts);
        guest.device.notify(0);
        guest.run_until(1);
        prop_assert_eq!(guest.get(DATA, 1), [0]);
        guest.put(start, &vec![0; length as usize]);
        guest.header(HEADERS, VIRTIO_BLK_T_IN, sector);
        let mut parts = vec![(HEADERS, 16, false)];
        parts.extend(split(start, length + 1, true));
        guest.offer(&parts);
        guest.device.notify(0);
        guest.run_until(2);
        prop_assert_eq!(guest.get(start, length as usize + 1), [data, vec![0]].concat());
    }
}
