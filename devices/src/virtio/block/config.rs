//! What a drive tells the driver about itself: features and configuration space
//! (virtio 1.2, 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::file::{BlockFile, Cache};
use super::request::{Limits, SECTOR_SIZE};

/// Size of the queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: a chain also has a header and a status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes of a segment.
const SIZE_MAX: u32 = 256 << 10;
/// Most bytes of data of a request. One that keeps to `seg_max` and `size_max` has less.
pub(super) const MAX_REQUEST_BYTES: u64 = 64 << 20;
/// Most sectors of one discard: 256 MiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 256 << 11;
/// Most sectors of one write-zeroes: 16 MiB, which the host may have to write.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 16 << 11;
/// Usual size of a block of the host's file system, bytes.
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// Bytes of the configuration space up to the last field in use.
pub(super) const CONFIG_SIZE: usize = 60;

/// What the requests of `file` are checked against.
pub(super) fn limits(file: &BlockFile) -> Limits {
    Limits {
        size: file.size,
        block_size: file.block_size,
        read_only: file.read_only,
        flush: !file.read_only && file.cache == Cache::Writeback,
    }
}

/// The device's own feature bits.
pub(super) fn features(limits: &Limits) -> u64 {
    let mut bits =
        vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY];
    if limits.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    if limits.flush {
        bits.push(VIRTIO_BLK_F_FLUSH);
    }
    bits.iter().fold(0, |features, bit| features | 1 << bit)
}

/// The configuration space.
pub(super) fn space(limits: &Limits) -> [u8; CONFIG_SIZE] {
    let mut space = [0; CONFIG_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (place, byte) in space.iter_mut().skip(offset).zip(bytes) {
            *place = *byte;
        }
    };
    let blocks = PHYSICAL_BLOCK_SIZE.checked_div(limits.block_size).unwrap_or(1);
    let physical_block_exp = blocks.max(1).ilog2() as u8;
    let block_sectors = (u64::from(limits.block_size) / SECTOR_SIZE) as u32;
    put(0, &(limits.size / SECTOR_SIZE).to_le_bytes()); // capacity
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &limits.block_size.to_le_bytes()); // blk_size
    put(24, &[physical_block_exp, 0]); // and alignment_offset
    put(26, &1u16.to_le_bytes()); // min_io_size, blocks
    if !limits.read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes()); // max_discard_seg
        put(44, &block_sectors.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRIVE: Limits = Limits { size: 3 << 20, block_size: 512, read_only: false, flush: true };

    fn field(space: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_space_has_the_fields_of_the_specification() {
        let space = space(&DRIVE);
        let fields = [0, 4, 8, 12, 16, 20, 28, 32, 36, 40, 44, 48, 52, 56].map(|at| field(&space, at));
        let (discard, zeroes) = (MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS);
        assert_eq!(fields, [6144, 0, 256 << 10, 254, 0, 512, 0, 0, discard, 1, 1, zeroes, 1, 1]);
        assert_eq!(space[24..28], [3, 0, 1, 0]);
        let large = super::space(&Limits { block_size: 4096, ..DRIVE });
        assert_eq!((field(&large, 20), large[24], field(&large, 44)), (4096, 0, 8));
    }

    #[test]
    fn features_follow_the_drive() {
        let has = |limits: &Limits, bit: u32| features(limits) & 1 << bit != 0;
        let fixed = Limits { read_only: true, flush: false, ..DRIVE };
        for bit in [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
            assert!(has(&DRIVE, bit) && !has(&fixed, bit));
        }
        assert!(has(&fixed, VIRTIO_BLK_F_RO) && !has(&DRIVE, VIRTIO_BLK_F_RO));
        assert!(!has(&Limits { flush: false, ..DRIVE }, VIRTIO_BLK_F_FLUSH));
        assert_eq!(space(&fixed)[32..], [0; CONFIG_SIZE - 32]);
    }

    #[test]
    fn a_request_within_the_limits_is_small_enough() {
        assert!(u64::from(SEG_MAX) * u64::from(SIZE_MAX) <= MAX_REQUEST_BYTES);
    }
}
