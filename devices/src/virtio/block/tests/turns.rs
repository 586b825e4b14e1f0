//! How the device shares its time: engines, batches, limits, resets.

use std::fs::File;
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::*;
use super::guest::{AVAILABLE, BORDER, DATA, Guest, HEADERS, USED, image, options, pattern};
use crate::rate_limiter::{RateLimits, TokenBucket};

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];

/// A bucket that does not refill while a test runs.
fn bucket(size: u64) -> Option<TokenBucket> {
    Some(TokenBucket { size, one_time_burst: 0, refill_time: Duration::from_secs(100_000) })
}

/// Offers `count` reads of one sector each, of sectors 0, 1, ...
fn offer_reads(guest: &mut Guest, count: u64) {
    for index in 0..count {
        let header = HEADERS + 16 * index;
        guest.header(header, VIRTIO_BLK_T_IN, index);
        guest.offer(&[(header, 16, false), (DATA + 1024 * index, 513, true)]);
    }
}

#[test]
fn auto_takes_the_synchronous_engine_where_rings_are_refused() {
    let refuse = |_| Err(Errno::PERM.into());
    let open = |engine| {
        let mut file = BlockFile::open(options(&image(512), engine)).unwrap();
        file.in_memory = false;
        file
    };
    assert!(!Block::with_uring(open(Engine::Auto), refuse).unwrap().uses_uring());
    assert!(Block::new(open(Engine::Auto)).unwrap().uses_uring());
    assert!(Block::new(open(Engine::Async)).unwrap().uses_uring());
    assert!(!Block::new(open(Engine::Sync)).unwrap().uses_uring());
    let error = Block::with_uring(open(Engine::Async), refuse).err().unwrap();
    assert!(matches!(error, BlockError::Uring { .. }), "{error}");
}

#[test]
fn auto_takes_the_synchronous_engine_for_a_file_in_memory() {
    let memory = memfd_create("image", MemfdFlags::CLOEXEC).unwrap().into();
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for (file, engine, uses_uring) in
        [(&memory, Engine::Auto, false), (&memory, Engine::Async, true), (&disk, Engine::Auto, true)]
    {
        File::set_len(file, 512).unwrap();
        let drive = BlockFile::open(options(file, engine)).unwrap();
        assert_eq!(Block::new(drive).unwrap().uses_uring(), uses_uring, "{file:?} {engine:?}");
    }
}

#[test]
fn a_drive_without_a_ring_works_all_the_same() {
    let file = image(4096);
    let mut guest = Guest::new(options(&file, Engine::Auto));
    let drive = BlockFile::open(BlockOptions { read_only: true, ..options(&image(4096), Engine::Auto) });
    guest.device = Block::with_uring(drive.unwrap(), |_| Err(Errno::NOSYS.into())).unwrap();
    guest.activate(0);
    let answer = guest.request(VIRTIO_BLK_T_IN, 1, &[], 512);
    assert_eq!(answer.data, (512..1024).map(pattern).collect::<Vec<_>>());
}

#[test]
fn limits_that_mean_nothing_are_refused() {
    let limits = RateLimits { bandwidth: None, operations: bucket(0) };
    let file = BlockFile::open(BlockOptions { limits, ..options(&image(512), Engine::Sync) }).unwrap();
    assert!(matches!(Block::new(file), Err(BlockError::RateLimit { error: RateLimitError::NoTokens, .. })));
}

#[test]
fn a_full_queue_is_answered_completely_with_the_right_data() {
    for engine in ENGINES {
        let file = image(1 << 17);
        let mut guest = Guest::new(options(&file, engine));
        offer_reads(&mut guest, 128);
        guest.device.notify(0);
        guest.run_until(128);
        let mut heads: Vec<u16> = std::iter::from_fn(|| guest.next_used())
            .inspect(|&(_, length)| assert_eq!(length, 513))
            .map(|(head, _)| head)
            .collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..128).map(|index| index * 2).collect::<Vec<_>>());
        for index in 0..128usize {
            let wanted: Vec<u8> = (index * 512..index * 512 + 512).map(pattern).chain([0]).collect();
            assert_eq!(guest.get(DATA + 1024 * index as u64, 513), wanted);
        }
        if engine == Engine::Sync {
            assert_eq!(guest.interrupts(), 1);
        }
    }
}

#[test]
fn with_event_idx_the_driver_hears_what_it_asked_for() {
    let file = image(1 << 16);
    let mut guest = Guest::with_features(options(&file, Engine::Sync), 1 << VIRTIO_RING_F_EVENT_IDX);
    let (used_event, avail_event) = (AVAILABLE + 4 + 2 * 256, USED + 4 + 8 * 256);
    guest.put16(used_event, 5);
    offer_reads(&mut guest, 4);
    guest.device.notify(0);
    assert_eq!((guest.used_index(), guest.interrupts()), (4, 0));
    assert_eq!(guest.get16(avail_event), 4);
    offer_reads(&mut guest, 4);
    guest.device.notify(0);
    assert_eq!((guest.used_index(), guest.interrupts()), (8, 1));
    assert_eq!(guest.get16(avail_event), 8);
}

#[test]
fn without_event_idx_flags_are_set_back_when_the_queue_is_empty() {
    let file = image(512);
    let limits = RateLimits { bandwidth: None, operations: bucket(2) };
    let mut guest = Guest::new(BlockOptions { limits, ..options(&file, Engine::Sync) });
    offer_reads(&mut guest, 1);
    guest.device.notify(0);
    assert_eq!((guest.used_index(), guest.get16(USED)), (1, 0));
    // While the device waits for tokens it need not be told of more.
    offer_reads(&mut guest, 1);
    guest.device.notify(0);
    assert_eq!((guest.used_index(), guest.get16(USED)), (2, 1));
    // The driver wants no interrupts.
    let before = guest.interrupts();
    guest.put16(AVAILABLE, 1);
    guest.device.reset();
    guest.device.limiter = RateLimiter::default();
    guest.activate(0);
    guest.put16(AVAILABLE, 1);
    offer_reads(&mut guest, 1);
    guest.device.notify(0);
    assert_eq!((guest.used_index(), guest.interrupts()), (1, before));
}

#[test]
fn operations_are_limited_whatever_they_are() {
    for (engine, kind) in ENGINES.into_iter().zip([VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_FLUSH]) {
        let limits = RateLimits { bandwidth: bucket(1), operations: bucket(3) };
        let mut guest = Guest::new(BlockOptions { limits, ..options(&image(512), engine) });
        for _ in 0..5 {
            guest.header(HEADERS, kind, 0);
            guest.offer(&[(HEADERS, 16, false), (DATA, 21, true)]);
        }
        guest.device.notify(0);
        guest.run_until(3);
        guest.device.notify(0);
        while guest.step(0) {}
        assert_eq!(guest.used_index(), 3);
        // A reset gives no new tokens.
        guest.device.reset();
        guest.activate(0);
        guest.offer(&[(HEADERS, 16, false), (DATA, 21, true)]);
        guest.device.notify(0);
        assert_eq!(guest.used_index(), 0);
    }
}

#[test]
fn bandwidth_goes_into_debt_and_no_further() {
    for engine in ENGINES {
        let limits = RateLimits { bandwidth: bucket(512), operations: None };
        let mut guest = Guest::new(BlockOptions { limits, ..options(&image(1 << 16), engine) });
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[], 1 << 16).status, 0);
        offer_reads(&mut guest, 1);
        guest.device.notify(0);
        assert_eq!(guest.used_index(), 1);
    }
}

#[test]
fn a_turn_of_the_synchronous_engine_moves_a_bounded_number_of_bytes() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(TURN_BYTES).unwrap();
    let mut guest = Guest::new(options(&file, Engine::Sync));
    let piece = (BORDER, 1 << 20, true);
    for _ in 0..3 {
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 0);
        let pieces = std::iter::repeat_n(piece, (TURN_BYTES >> 20) as usize);
        let parts: Vec<_> =
            [(HEADERS, 16, false)].into_iter().chain(pieces).chain([(DATA, 1, true)]).collect();
        guest.offer(&parts);
    }
    guest.device.notify(0);
    assert_eq!(guest.used_index(), 1);
    assert!(guest.step(30));
    assert_eq!(guest.used_index(), 2);
    guest.run_until(3);
    assert_eq!(guest.get(DATA, 1), [0]);
}

#[test]
fn reset_leaves_nothing_behind_and_the_device_works_again() {
    for engine in ENGINES {
        let file = image(1 << 17);
        let mut guest = Guest::new(options(&file, engine));
        for _ in 0..3 {
            offer_reads(&mut guest, 100);
            guest.device.notify(0);
            guest.device.reset();
            assert_eq!(Arc::strong_count(&guest.memory), 1);
            assert_eq!(Arc::strong_count(&guest.interrupt), 1);
            guest.put(DATA, &[0xAA; 4096]);
            // Late events of the time before find nothing to do.
            while guest.step(0) {}
            assert_eq!(guest.get(DATA, 4096), [0xAA; 4096]);
            guest.activate(0);
            assert_eq!(guest.used_index(), 0);
            let answer = guest.request(VIRTIO_BLK_T_IN, 7, &[], 512);
            assert_eq!(answer.data, (3584..4096).map(pattern).collect::<Vec<_>>());
        }
    }
}

#[test]
fn another_thread_may_reset_what_the_event_loop_submitted() {
    let mut guest = Guest::new(options(&image(1 << 17), Engine::Async));
    offer_reads(&mut guest, 128);
    guest.device.notify(0);
    // A vCPU resets the device while the event loop waits for its lock.
    std::thread::scope(|scope| scope.spawn(|| guest.device.reset()).join().unwrap());
    assert_eq!(Arc::strong_count(&guest.memory), 1);
}

#[test]
fn a_queue_that_is_not_ready_is_refused() {
    let mut device = Block::new(BlockFile::open(options(&image(512), Engine::Sync)).unwrap()).unwrap();
    let guest = Guest::new(options(&image(512), Engine::Sync));
    for queues in [vec![], vec![Queue::new(QUEUE_SIZE).unwrap()]] {
        let (memory, interrupt) = (guest.memory.clone(), guest.interrupt.clone());
        let result = device.activate(Driver { memory, shared: None, queues, features: 0, interrupt });
        assert!(matches!(result, Err(ActivateError::QueueNotReady(0))));
    }
}

#[test]
fn configuration_reads_may_start_anywhere_and_end_outside() {
    let device = Block::new(BlockFile::open(options(&image(4096), Engine::Sync)).unwrap()).unwrap();
    let read = |offset, length| {
        let mut data = vec![0; length];
        device.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), [8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(20, 4), [0, 2, 0, 0]);
    assert_eq!(read(21, 1), [2]);
    assert_eq!(read(56, 16)[..2], [1, 0]);
    for offset in [60, 4096, u64::MAX] {
        assert_eq!(read(offset, 8), [0; 8]);
    }
}

struct Loop(Guest);

impl MutEventSubscriber for Loop {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.0.device.event(events, ops);
    }
    fn init(&mut self, ops: &mut EventOps) {
        self.0.device.register(ops);
    }
}

#[test]
fn the_event_loop_keeps_a_throttled_device_going() {
    for engine in ENGINES {
        let refill_time = Duration::from_millis(5);
        let operations = Some(TokenBucket { size: 1, one_time_burst: 0, refill_time });
        let limits = RateLimits { bandwidth: None, operations };
        let guest = Guest::new(BlockOptions { limits, ..options(&image(1 << 16), engine) });
        let shared = Arc::new(Mutex::new(Loop(guest)));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(shared.clone());
        let start = Instant::now();
        offer_reads(&mut shared.lock().unwrap().0, 5);
        shared.lock().unwrap().0.device.notify(0);
        while shared.lock().unwrap().0.used_index() < 5 {
            assert!(events.run_with_timeout(30_000).unwrap() > 0, "the device stopped");
        }
        assert!(start.elapsed() >= refill_time * 4);
    }
}
