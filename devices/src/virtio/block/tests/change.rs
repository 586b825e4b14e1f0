//! Another file and other limits while the drive is in use.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::guest::*;
use crate::rate_limiter::{RateLimitChange, RateLimits, TokenBucket};
use crate::virtio::block::*;

const ENGINES: [Engine; 2] = [Engine::Sync, Engine::Async];

/// A file of `sectors` sectors that are filled with `byte`.
fn filled(sectors: usize, byte: u8) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&vec![byte; 512 * sectors], 0).unwrap();
    file
}

fn on(path: &Path, engine: Engine) -> BlockOptions {
    BlockOptions { engine, ..BlockOptions::new(BlockSource::Path(path.into()), "disk") }
}

fn change(guest: &mut Guest, path: &Path) -> Result<(), BlockFileError> {
    let file = guest.device.file().reopen(BlockSource::Path(path.into()))?;
    guest.device.replace(file);
    Ok(())
}

fn sectors(guest: &Guest) -> u64 {
    let mut capacity = [0; 8];
    guest.device.read_config(0, &mut capacity);
    u64::from_le_bytes(capacity)
}

fn first_byte(guest: &mut Guest, sector: u64) -> Option<u8> {
    let answer = guest.request(VIRTIO_BLK_T_IN, sector, &[], 512);
    (answer.status == 0).then(|| answer.data[0])
}

fn is_locked(path: &Path) -> bool {
    matches!(BlockFile::open(on(path, Engine::Sync)), Err(BlockFileError::Locked { .. }))
}

#[test]
fn another_file_has_its_own_size_and_content_and_the_former_one_is_let_go() {
    for engine in ENGINES {
        let (small, large) = (filled(4, 1), filled(9, 2));
        let mut guest = Guest::new(on(small.path(), engine));
        assert_eq!((sectors(&guest), first_byte(&mut guest, 8)), (4, None));
        change(&mut guest, large.path()).unwrap();
        assert_eq!((sectors(&guest), first_byte(&mut guest, 8)), (9, Some(2)));
        assert!(is_locked(large.path()) && !is_locked(small.path()));
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[7; 512], 0).status, 0);
        change(&mut guest, small.path()).unwrap();
        assert_eq!((sectors(&guest), first_byte(&mut guest, 0)), (4, Some(1)));
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 8, &[], 512).status, VIRTIO_BLK_S_IOERR as u8);
        assert!(is_locked(small.path()) && !is_locked(large.path()));
        let mut byte = [0];
        large.as_file().read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    }
}

#[test]
fn the_same_file_may_have_grown_or_shrunk_and_stays_locked() {
    for engine in ENGINES {
        let file = filled(4, 1);
        let mut guest = Guest::new(on(file.path(), engine));
        for sectors in [20, 2] {
            file.as_file().set_len(512 * sectors).unwrap();
            change(&mut guest, file.path()).unwrap();
            assert_eq!(self::sectors(&guest), sectors);
            assert!(first_byte(&mut guest, sectors - 1).is_some());
            assert!(is_locked(file.path()));
        }
        drop(guest);
        assert!(!is_locked(file.path()));
    }
}

#[test]
fn what_cannot_be_opened_changes_nothing() {
    let (file, other) = (filled(4, 1), filled(9, 2));
    let mut guest = Guest::new(on(file.path(), Engine::Auto));
    let holder = BlockFile::open(on(other.path(), Engine::Sync)).unwrap();
    let (empty, odd) = (filled(0, 0), filled(1, 0));
    odd.as_file().set_len(1000).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    for path in [other.path(), empty.path(), odd.path(), directory.path(), &missing, Path::new("/dev/null")] {
        change(&mut guest, path).unwrap_err();
        assert_eq!((sectors(&guest), first_byte(&mut guest, 3)), (4, Some(1)));
        assert!(is_locked(file.path()));
    }
    drop(holder);
    change(&mut guest, other.path()).unwrap();
}

#[test]
fn a_file_given_open_is_unlocked_when_it_is_let_go() {
    let (given, file) = (filled(4, 1), filled(4, 2));
    let opened = File::options().read(true).write(true).open(given.path()).unwrap();
    let mut guest = Guest::new(options(&opened, Engine::Auto));
    assert!(is_locked(given.path()));
    change(&mut guest, file.path()).unwrap();
    assert!(!is_locked(given.path()), "and `opened` is open still");
    drop(opened);
}

#[test]
fn other_limits_count_at_once() {
    let bucket = |size| TokenBucket { size, one_time_burst: 0, refill_time: Duration::from_secs(3600) };
    let file = filled(64, 1);
    let limits = RateLimits { bandwidth: None, operations: Some(bucket(1)) };
    let mut guest = Guest::new(BlockOptions { limits, ..on(file.path(), Engine::Sync) });
    assert_eq!(first_byte(&mut guest, 0), Some(1));
    guest.header(HEADERS, VIRTIO_BLK_T_IN, 0);
    guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
    guest.device.notify(0);
    assert_eq!(guest.used_index(), 1, "an hour is not over");
    // What is left out stays.
    let bandwidth = RateLimitChange { bandwidth: Some(Some(bucket(512))), operations: None };
    guest.device.limit(bandwidth).unwrap();
    assert_eq!(guest.used_index(), 1);
    guest.device.limit(RateLimitChange { bandwidth: None, operations: Some(None) }).unwrap();
    assert_eq!(guest.used_index(), 2, "without waiting for the former limit");
    let bad = RateLimitChange { bandwidth: Some(None), operations: Some(Some(bucket(0))) };
    assert!(guest.device.limit(bad).is_err());
    guest.offer(&[(HEADERS, 16, false), (DATA, 513, true)]);
    guest.device.notify(0);
    assert_eq!(guest.used_index(), 2, "an error takes away no limit");
    guest.device.limit(RateLimitChange { bandwidth: Some(None), operations: None }).unwrap();
    assert_eq!(guest.used_index(), 3);
}
