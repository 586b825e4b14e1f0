//! What the requests do to the file.

use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;

use cofferdam_metrics::Counter;
use rustix::fs::{MemfdFlags, SealFlags};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::super::*;
use super::guest::{Answer, BORDER, DATA, Guest, HEADERS, image, options, pattern};

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn content(file: &std::fs::File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn failed(answer: &Answer) -> (u8, u32) {
    assert!(answer.data.iter().all(|&byte| byte == 0xAA), "data was written");
    (answer.status, answer.used)
}

#[test]
fn reads_and_writes_reach_the_file() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut guest = Guest::new(options(&file, engine));
        let answer = guest.request(VIRTIO_BLK_T_IN, 3, &[], 4096);
        let wanted: Vec<u8> = (1536..1536 + 4096).map(pattern).collect();
        assert_eq!(answer, Answer { status: OK, used: 4097, data: wanted });
        let data: Vec<u8> = (0..8192u32).map(|n| (n % 253) as u8).collect();
        let answer = guest.request(VIRTIO_BLK_T_OUT, 2040, &data[..4096], 0);
        assert_eq!(answer, Answer { status: OK, used: 1, data: vec![] });
        assert_eq!(content(&file, 2040 * 512, 4096), data[..4096]);
        // The neighbours are untouched.
        assert_eq!(
            content(&file, 2039 * 512, 512),
            (2039 * 512..2040 * 512).map(pattern).collect::<Vec<_>>()
        );
        let answer = guest.request(VIRTIO_BLK_T_OUT, 2048, &data[..512], 0);
        assert_eq!((answer.status, file.metadata().unwrap().len()), (IOERR, 1 << 20));
        assert!(!guest.interrupt.is_broken());
    }
}

#[test]
fn the_driver_may_cut_a_request_anywhere() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut guest = Guest::new(options(&file, engine));
        // A write: header in two parts, the second with the first data; data across the regions' border.
        guest.header(HEADERS, VIRTIO_BLK_T_OUT, 8);
        guest.put(HEADERS + 16, &[1; 100]);
        guest.put(BORDER - 200, &[2; 412]);
        guest.offer(&[
            (HEADERS, 5, false),
            (HEADERS + 5, 111, false),
            (BORDER - 200, 412, false),
            (DATA, 1, true),
        ]);
        guest.device.notify(0);
        guest.run_until(1);
        assert_eq!((guest.next_used(), guest.get(DATA, 1)), (Some((0, 1)), vec![OK]));
        assert_eq!(content(&file, 4096, 512), [vec![1; 100], vec![2; 412]].concat());
        // A read: the status is the last byte of the last part, which has data before it.
        guest.header(HEADERS, VIRTIO_BLK_T_IN, 8);
        guest.put(BORDER - 20, &[0xAA; 40]);
        guest.offer(&[(HEADERS, 16, false), (DATA, 490, true), (BORDER - 20, 23, true)]);
        guest.device.notify(0);
        guest.run_until(2);
        assert_eq!(guest.next_used(), Some((4, 513)));
        assert_eq!(guest.get(DATA, 490), content(&file, 4096, 490));
        let end = [content(&file, 4096 + 490, 22), vec![OK, 0xAA]].concat();
        assert_eq!(guest.get(BORDER - 20, 24), end);
    }
}

#[test]
fn a_read_only_drive_is_only_read() {
    for engine in ENGINES {
        let file = image(8192);
        let mut guest = Guest::new(BlockOptions { read_only: true, ..options(&file, engine) });
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[], 512).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[9; 512], 0).status, IOERR);
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(guest.request(kind, 0, &range(0, 8, 0), 0).status, IOERR);
        }
        assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, UNSUPP);
        assert_eq!(content(&file, 0, 8192), (0..8192).map(pattern).collect::<Vec<_>>());
    }
}

#[test]
fn bad_ranges_are_refused_and_change_nothing() {
    for engine in ENGINES {
        let file = image(8192);
        let mut guest = Guest::new(BlockOptions { block_size: 4096, ..options(&file, engine) });
        for (sector, length) in [(16, 4096), (8, 8192), (1, 4096), (0, 512), (0, 4000), (u64::MAX, 4096)] {
            let answer = guest.request(VIRTIO_BLK_T_IN, sector, &[], length);
            assert_eq!(failed(&answer), (IOERR, 0), "{sector} {length}");
            assert_eq!(guest.request(VIRTIO_BLK_T_OUT, sector, &vec![9; length as usize], 0).status, IOERR);
        }
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 8, &[], 4096).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 16, &[], 0).status, OK);
        assert_eq!(guest.request(99, 0, &[], 0).status, UNSUPP);
        assert_eq!(content(&file, 0, 8192), (0..8192).map(pattern).collect::<Vec<_>>());
    }
}

#[test]
fn the_id_has_20_bytes_however_much_room_there_is() {
    let file = image(512);
    let mut guest = Guest::new(options(&file, Engine::Sync));
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!(answer, Answer { status: OK, used: 21, data: b"a drive with a long ".to_vec() });
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 7);
    assert_eq!(answer, Answer { status: OK, used: 8, data: b"a drive".to_vec() });
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 30);
    assert_eq!((answer.status, answer.used, &answer.data[20..]), (OK, 20, &[0xAA; 10][..]));
    drop(guest);
    let mut guest = Guest::new(BlockOptions { id: "b".into(), ..options(&file, Engine::Sync) });
    let answer = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!(answer.data, [&b"b"[..], &[0; 19]].concat());
}

#[test]
fn flush_is_there_if_it_was_offered() {
    for engine in ENGINES {
        let file = image(512);
        let mut guest = Guest::new(options(&file, engine));
        assert_eq!(
            guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0),
            Answer { status: OK, used: 1, data: vec![] }
        );
        drop(guest);
        let mut guest = Guest::new(BlockOptions { cache: Cache::Unsafe, ..options(&file, engine) });
        assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, UNSUPP);
    }
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    for engine in ENGINES {
        let file = image(1 << 20);
        file.sync_all().unwrap();
        let blocks = file.metadata().unwrap().blocks();
        let mut guest = Guest::new(options(&file, engine));
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(1024, 512, 0), 0).status, OK);
        // The host's file system may need some blocks to note the hole.
        let after = file.metadata().unwrap();
        assert!(after.len() == 1 << 20 && after.blocks() < blocks - 256);
        assert_eq!(content(&file, 0, 1 << 19), (0..1 << 19).map(pattern).collect::<Vec<_>>());
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(1024, 512, 1), 0).status, UNSUPP);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(2047, 2, 0), 0).status, IOERR);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 0, 0), 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0)[..15], 0).status, IOERR);
    }
}

#[test]
fn zeroes_are_zeroes_whatever_the_file_system_supports() {
    use super::super::file::ZeroMethod;
    let refusals: [&[ZeroMethod]; 3] =
        [&[], &[ZeroMethod::ZeroRange], &[ZeroMethod::ZeroRange, ZeroMethod::PunchHole]];
    for (engine, refused) in ENGINES.iter().flat_map(|engine| refusals.map(|refused| (*engine, refused))) {
        let size = 3 << 20;
        let file = image(size);
        file.sync_all().unwrap();
        let blocks = file.metadata().unwrap().blocks();
        let mut guest = Guest::new(options(&file, engine));
        refused.iter().for_each(|&method| guest.device.file.refuses(method));
        // More than is written at once, and not aligned to anything but sectors.
        let (start, sectors) = (1537, 4001);
        let zeroes = range(start, sectors, 0);
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0).status, OK);
        let (from, to) = (start as usize * 512, (start as usize + sectors as usize) * 512);
        let wanted: Vec<u8> =
            (0..size).map(|at| if (from..to).contains(&at) { 0 } else { pattern(at) }).collect();
        assert!(content(&file, 0, size) == wanted, "{engine:?} {refused:?}");
        let unmap = range(0, 1024, 1);
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &unmap, 0).status, OK);
        assert_eq!(content(&file, 0, 1 << 19), vec![0; 1 << 19]);
        file.sync_all().unwrap();
        if refused.is_empty() {
            assert!(file.metadata().unwrap().blocks() < blocks - 512);
        }
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 2), 0).status, UNSUPP);
    }
}

#[test]
fn a_file_system_without_zero_range_is_found_out() {
    for engine in ENGINES {
        let file: std::fs::File = rustix::fs::memfd_create("drive", MemfdFlags::CLOEXEC).unwrap().into();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let mut guest = Guest::new(options(&file, engine));
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(1, 8, 0), 0).status, OK);
        assert_eq!(content(&file, 0, 8192), [vec![7; 512], vec![0; 4096], vec![7; 3584]].concat());
        assert_eq!(guest.device.metrics.execute_fails.total(), 0);
    }
}

#[test]
fn a_file_cut_off_underneath_is_an_error_not_garbage() {
    for engine in ENGINES {
        let file = image(16384);
        let mut guest = Guest::new(options(&file, engine));
        file.set_len(5000).unwrap();
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 8, &[], 512).status, OK);
        let answer = guest.request(VIRTIO_BLK_T_IN, 8, &[], 4096);
        assert_eq!((answer.status, answer.used), (IOERR, 5000 - 4096));
        assert_eq!(failed(&guest.request(VIRTIO_BLK_T_IN, 16, &[], 4096)), (IOERR, 0));
        assert_eq!(guest.device.metrics.execute_fails.total(), 2);
        assert!(!guest.interrupt.is_broken());
    }
}

#[test]
fn a_write_that_the_host_refuses_is_an_error() {
    for engine in ENGINES {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file: std::fs::File = rustix::fs::memfd_create("drive", flags).unwrap().into();
        file.set_len(16384).unwrap();
        let mut guest = Guest::new(options(&file, engine));
        // As on a full disk, what is there can be written, and no more.
        file.set_len(8192).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 16, &[1; 512], 0).status, IOERR);
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 16, &[1; 512], 0).status, IOERR);
        assert_eq!((guest.device.metrics.execute_fails.total(), content(&file, 0, 1)), (2, vec![1]));
    }
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes() {
    for engine in ENGINES {
        let file = image(8192);
        let mut guest = Guest::new(options(&file, engine));
        guest.device.reset();
        guest.activate_with(guest.device.features() & !(1 << VIRTIO_BLK_F_FLUSH));
        assert!(guest.device.driver.as_ref().is_some_and(|live| live.write_through));
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(8, 8, 0), 0).status, OK);
        assert_eq!((content(&file, 0, 512), content(&file, 4096, 4096)), (vec![1; 512], vec![0; 4096]));
    }
}

#[test]
fn what_is_done_and_refused_is_counted() {
    for engine in ENGINES {
        let file = image(1 << 20);
        let mut guest = Guest::new(options(&file, engine));
        let metrics = guest.device.metrics();
        let notified = metrics.queue_event_count.total();
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[], 4096).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 8, &[], 512).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 1024], 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(1, 8, 0), 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &range(1, 8, 0), 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[], 0).status, OK);
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 2048, &[], 512).status, IOERR);
        assert_eq!(guest.request(77, 0, &[], 512).status, UNSUPP);
        let total = |counter: &Counter| counter.total();
        assert_eq!((total(&metrics.read_count), total(&metrics.read_bytes)), (2, 4608));
        assert_eq!((total(&metrics.write_count), total(&metrics.write_bytes)), (2, 1024));
        assert_eq!((total(&metrics.flush_count), total(&metrics.invalid_reqs_count)), (1, 2));
        assert_eq!((total(&metrics.discard_count), total(&metrics.write_zeroes_count)), (1, 1));
        assert_eq!(total(&metrics.queue_event_count) - notified, 9);
        for (times, count) in [(&metrics.read_agg, 2), (&metrics.write_agg, 2), (&metrics.flush_agg, 1)] {
            assert_eq!(times.distribution().counts.iter().sum::<u64>(), count);
            assert!(times.distribution().sum > 0);
        }
        assert_eq!((total(&metrics.execute_fails), total(&metrics.event_fails)), (0, 0));
        guest.offer(&[(HEADERS, 16, false)]);
        guest.device.notify(0);
        assert!(guest.interrupt.is_broken());
        assert_eq!(total(&metrics.event_fails), 1);
    }
}
