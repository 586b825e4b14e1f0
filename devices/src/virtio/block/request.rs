//! Block requests, as a driver writes them (virtio 1.2, 5.2.6).
//!
//! The readable part of a chain starts with a header of 16 bytes: `type` (le32),
//! reserved (le32), `sector` (le64, always in units of 512 bytes). What is to be
//! written follows; for discard and write-zeroes that is a range of 16 bytes:
//! `sector` (le64), `num_sectors` (le32), `flags` (le32). The writable part is
//! what is to be read, and one last byte for the status.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryMmap;

use super::config::{MAX_DISCARD_SECTORS, MAX_REQUEST_BYTES, MAX_WRITE_ZEROES_SECTORS};
use crate::virtio::chain::{Chain, ChainError};

/// Unit of all sector numbers, bytes.
pub(super) const SECTOR_SIZE: u64 = 512;
/// Length of a request's header, and of a range to discard or zero, bytes.
pub(super) const HEADER_SIZE: u64 = 16;

/// What the requests of a drive are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the drive, bytes.
    pub size: u64,
    /// Size of a logical block, bytes.
    pub block_size: u32,
    /// Whether the drive cannot be written.
    pub read_only: bool,
    /// Whether flush was offered.
    pub flush: bool,
}

/// A request that can be carried out. Offsets and lengths are in bytes, inside the drive, and whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable part from `offset` on.
    Read { offset: u64, length: u64 },
    /// Store what follows the header from `offset` on.
    Write { offset: u64, length: u64 },
    /// Make what was written durable.
    Flush,
    /// Fill the writable part with the drive's id.
    GetId,
    /// Give a range back to the host.
    Discard { offset: u64, length: u64 },
    /// Make a range read as zeroes; with `unmap`, giving it back is welcome.
    WriteZeroes { offset: u64, length: u64, unmap: bool },
}

/// Why a request is answered without being tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Bad range, or a write to a read-only drive.
    IoError,
    /// Unknown type or flag.
    Unsupported,
}

impl Refusal {
    /// The status byte.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// The parts of a request that its type gives a meaning to.
#[derive(Clone, Copy, Debug)]
struct Raw {
    header: [u8; 16],
    /// Bytes after the header.
    readable: u64,
    /// Bytes before the status.
    writable: u64,
    /// The first 16 bytes after the header, if they are all there is.
    range: Option<[u8; 16]>,
}

impl Request {
    /// Reads the request of `chain`, whose status byte was split off. An error is one of the chain: the
    /// driver is broken.
    pub(super) fn read(
        chain: &Chain,
        memory: &GuestMemoryMmap,
        limits: &Limits,
    ) -> Result<Result<Self, Refusal>, ChainError> {
        let mut header = [0; HEADER_SIZE as usize];
        chain.read(memory, 0, &mut header)?;
        let readable = chain.readable_len().saturating_sub(HEADER_SIZE);
        let range = if readable == HEADER_SIZE {
            let mut range = [0; HEADER_SIZE as usize];
            chain.read(memory, HEADER_SIZE, &mut range)?;
            Some(range)
        } else {
            None
        };
        Ok(Raw { header, readable, writable: chain.writable_len(), range }.check(limits))
    }
}

impl Raw {
    fn check(&self, limits: &Limits) -> Result<Request, Refusal> {
        let (kind, sector) = (le32(&self.header, 0), le64(&self.header, 8));
        let changes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if changes && limits.read_only {
            return Err(Refusal::IoError);
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = limits.data(sector, self.writable)?;
                Ok(Request::Read { offset, length: self.writable })
            }
            VIRTIO_BLK_T_OUT => {
                let offset = limits.data(sector, self.readable)?;
                Ok(Request::Write { offset, length: self.readable })
            }
            VIRTIO_BLK_T_FLUSH if limits.flush => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
            VIRTIO_BLK_T_DISCARD => {
                let (offset, length, flags) = self.range(limits, MAX_DISCARD_SECTORS)?;
                if flags != 0 {
                    return Err(Refusal::Unsupported);
                }
                Ok(Request::Discard { offset, length })
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let (offset, length, flags) = self.range(limits, MAX_WRITE_ZEROES_SECTORS)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                Ok(Request::WriteZeroes { offset, length, unmap: flags != 0 })
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Offset and length in bytes, and flags, of the one range that the device takes.
    fn range(&self, limits: &Limits, max_sectors: u32) -> Result<(u64, u64, u32), Refusal> {
        let range = self.range.ok_or(Refusal::IoError)?;
        let (sector, sectors, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
        if sectors > max_sectors {
            return Err(Refusal::IoError);
        }
        let length = u64::from(sectors).saturating_mul(SECTOR_SIZE);
        Ok((limits.offset(sector, length)?, length, flags))
    }
}

impl Limits {
    /// Offset in bytes of `length` bytes of data at `sector`.
    fn data(&self, sector: u64, length: u64) -> Result<u64, Refusal> {
        if length > MAX_REQUEST_BYTES {
            return Err(Refusal::IoError);
        }
        self.offset(sector, length)
    }

    /// Offset in bytes of `sector`, if `length` bytes from there are whole blocks inside the drive.
    fn offset(&self, sector: u64, length: u64) -> Result<u64, Refusal> {
        let block = u64::from(self.block_size);
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Refusal::IoError)?;
        let end = offset.checked_add(length).ok_or(Refusal::IoError)?;
        let inside = end <= self.size && offset.is_multiple_of(block) && length.is_multiple_of(block);
        if inside { Ok(offset) } else { Err(Refusal::IoError) }
    }
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const DRIVE: Limits = Limits { size: MIB, block_size: 512, read_only: false, flush: true };

    fn pack(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[4..8].fill(0xEE); // reserved
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn pack_range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    }

    fn data(kind: u32, sector: u64, length: u64, limits: Limits) -> Result<Request, Refusal> {
        let (readable, writable) = if kind == VIRTIO_BLK_T_IN { (0, length) } else { (length, 0) };
        Raw { header: pack(kind, sector), readable, writable, range: None }.check(&limits)
    }

    fn range(kind: u32, range: [u8; 16], limits: Limits) -> Result<Request, Refusal> {
        Raw { header: pack(kind, 0), readable: 16, writable: 0, range: Some(range) }.check(&limits)
    }

    #[test]
    fn ranges_of_data_are_inside_the_drive() {
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            let check = |sector, length| data(kind, sector, length, DRIVE);
            assert!(check(0, MIB).is_ok());
            assert!(check(2047, 512).is_ok());
            assert!(check(2048, 0).is_ok());
            for (sector, length) in [
                (2048, 512),
                (2047, 1024),
                (0, MIB + 512),
                (0, 511),
                (0, 1),
                (2049, 0),
                (u64::MAX, 512),
                (u64::MAX / 512, 512),
                (1 << 55, 512),
                (0, u64::MAX),
            ] {
                assert_eq!(check(sector, length), Err(Refusal::IoError), "{sector} {length}");
            }
        }
        assert_eq!(data(VIRTIO_BLK_T_IN, 3, 1024, DRIVE), Ok(Request::Read { offset: 1536, length: 1024 }));
        assert_eq!(data(VIRTIO_BLK_T_OUT, 3, 1024, DRIVE), Ok(Request::Write { offset: 1536, length: 1024 }));
    }

    #[test]
    fn requests_have_a_largest_size() {
        let large = Limits { size: 1 << 40, ..DRIVE };
        assert!(data(VIRTIO_BLK_T_IN, 0, MAX_REQUEST_BYTES, large).is_ok());
        assert_eq!(data(VIRTIO_BLK_T_IN, 0, MAX_REQUEST_BYTES + 512, large), Err(Refusal::IoError));
        let discard = |sectors| range(VIRTIO_BLK_T_DISCARD, pack_range(0, sectors, 0), large);
        assert!(discard(MAX_DISCARD_SECTORS).is_ok());
        assert_eq!(discard(MAX_DISCARD_SECTORS + 1), Err(Refusal::IoError));
        let zero = |sectors| range(VIRTIO_BLK_T_WRITE_ZEROES, pack_range(0, sectors, 0), large);
        assert!(zero(MAX_WRITE_ZEROES_SECTORS).is_ok());
        assert_eq!(zero(MAX_WRITE_ZEROES_SECTORS + 1), Err(Refusal::IoError));
    }

    #[test]
    fn large_blocks_are_transferred_whole() {
        let large = Limits { block_size: 4096, ..DRIVE };
        assert!(data(VIRTIO_BLK_T_IN, 8, 4096, large).is_ok());
        assert_eq!(data(VIRTIO_BLK_T_IN, 1, 4096, large), Err(Refusal::IoError));
        assert_eq!(data(VIRTIO_BLK_T_OUT, 8, 512, large), Err(Refusal::IoError));
        assert_eq!(range(VIRTIO_BLK_T_DISCARD, pack_range(8, 1, 0), large), Err(Refusal::IoError));
    }

    #[test]
    fn a_read_only_drive_is_not_changed() {
        let fixed = Limits { read_only: true, flush: false, ..DRIVE };
        assert!(data(VIRTIO_BLK_T_IN, 0, 512, fixed).is_ok());
        assert_eq!(data(VIRTIO_BLK_T_OUT, 0, 512, fixed), Err(Refusal::IoError));
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(range(kind, pack_range(0, 1, 0), fixed), Err(Refusal::IoError));
        }
        assert_eq!(data(VIRTIO_BLK_T_FLUSH, 0, 0, fixed), Err(Refusal::Unsupported));
    }

    #[test]
    fn ranges_have_known_flags_and_exactly_one_entry() {
        let discard = |bytes| range(VIRTIO_BLK_T_DISCARD, bytes, DRIVE);
        let zero = |bytes| range(VIRTIO_BLK_T_WRITE_ZEROES, bytes, DRIVE);
        assert_eq!(discard(pack_range(2, 4, 0)), Ok(Request::Discard { offset: 1024, length: 2048 }));
        assert_eq!(discard(pack_range(2, 4, 1)), Err(Refusal::Unsupported));
        for (flags, unmap) in [(0, false), (1, true)] {
            let wanted = Request::WriteZeroes { offset: 1024, length: 2048, unmap };
            assert_eq!(zero(pack_range(2, 4, flags)), Ok(wanted));
        }
        assert_eq!(zero(pack_range(2, 4, 2)), Err(Refusal::Unsupported));
        assert_eq!(zero(pack_range(2047, 2, 0)), Err(Refusal::IoError));
        assert_eq!(zero(pack_range(u64::MAX, 2, 0)), Err(Refusal::IoError));
        assert_eq!(data(VIRTIO_BLK_T_DISCARD, 0, 32, DRIVE), Err(Refusal::IoError));
        assert_eq!(data(VIRTIO_BLK_T_WRITE_ZEROES, 0, 0, DRIVE), Err(Refusal::IoError));
    }

    #[test]
    fn unknown_types_are_unsupported() {
        for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 0x8000_0000, u32::MAX] {
            assert_eq!(data(kind, 0, 512, DRIVE), Err(Refusal::Unsupported), "{kind}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_accepted_is_whole_blocks_inside_the_drive(
            kind in prop_oneof![0u32..16, any::<u32>()],
            sector in prop_oneof![0u64..3000, any::<u64>()],
            length in prop_oneof![(0u64..3000).prop_map(|n| n * 512), any::<u64>()],
            bytes in (prop_oneof![0u64..3000, any::<u64>()], prop_oneof![0u32..3000, any::<u32>()], 0u32..4),
            block_size in prop_oneof![Just(512u32), Just(4096)],
        ) {
            let limits = Limits { block_size, ..DRIVE };
            let range = Some(pack_range(bytes.0, bytes.1, bytes.2));
            let raw = Raw { header: pack(kind, sector), readable: length, writable: length, range };
            let (offset, length) = match raw.check(&limits) {
                Ok(Request::Read { offset, length } | Request::Write { offset, length }) => (offset, length),
                Ok(Request::Discard { offset, length }) => (offset, length),
                Ok(Request::WriteZeroes { offset, length, .. }) => (offset, length),
                _ => (0, 0),
            };
            prop_assert!(offset.checked_add(length).is_some_and(|end| end <= limits.size));
            prop_assert_eq!(offset % u64::from(block_size), 0);
            prop_assert_eq!(length % u64::from(block_size), 0);
        }
    }
}
