//! Guest memory: one memfd, mapped once per range of RAM, never touched ahead
//! of need.
#![allow(unsafe_code)] // madvise takes an address

use std::fs::File;
use std::sync::Arc;

use cofferdam_firmware::layout;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Guest memory that the host did not give.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A call failed.
    #[error("guest memory of {size} bytes: {call}: {source}")]
    Call {
        /// Bytes asked for.
        size: u64,
        /// The call.
        call: &'static str,
        /// What the host answered.
        #[source]
        source: std::io::Error,
    },
    /// A range could not be mapped.
    #[error("guest memory at {address:#x}, {length} bytes: {reason}")]
    Map {
        /// Guest-physical address.
        address: u64,
        /// Length, bytes.
        length: u64,
        /// Why.
        reason: String,
    },
}

/// Maps `size` bytes of guest memory, a multiple of the page size, in the ranges of [`layout::ram_ranges`].
/// Nothing is reserved, and nothing of it gets into a core dump.
pub fn map(size: u64) -> Result<Arc<GuestMemoryMmap>, MemoryError> {
    let call = |call| move |error: rustix::io::Errno| MemoryError::Call { size, call, source: error.into() };
    let file = memfd_create(c"cofferdam-guest", MemfdFlags::CLOEXEC).map_err(call("memfd_create"))?;
    rustix::fs::ftruncate(&file, size).map_err(call("ftruncate"))?;
    let file = Arc::new(File::from(file));
    let mut regions = Vec::new();
    let mut offset = 0_u64;
    for (address, length) in layout::ram_ranges(size) {
        if length != 0 {
            regions.push(map_range(&file, offset, address, length)?);
            offset = offset.saturating_add(length);
        }
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Map {
        address: 0,
        length: size,
        reason: error.to_string(),
    })?;
    Ok(Arc::new(memory))
}

fn map_range(
    file: &Arc<File>,
    offset: u64,
    address: u64,
    length: u64,
) -> Result<GuestRegionMmap, MemoryError> {
    let failed = |reason: String| MemoryError::Map { address, length, reason };
    let size = usize::try_from(length).map_err(|error| failed(error.to_string()))?;
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(file.clone(), offset))
        .build()
        .map_err(|error| failed(error.to_string()))?;
    // SAFETY: the range is the mapping just made, and the advice does not change its content.
    unsafe { madvise(region.as_ptr().cast(), size, Advice::LinuxDontDump) }
        .map_err(|error| failed(format!("madvise: {error}")))?;
    GuestRegionMmap::new(region, GuestAddress(address))
        .ok_or_else(|| failed("the range ends beyond the address space".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};

    fn ranges(size: u64) -> Vec<(u64, u64)> {
        map(size).unwrap().iter().map(|r| (r.start_addr().raw_value(), r.len())).collect()
    }

    #[test]
    fn ranges_leave_the_gap_below_4_gib() {
        assert_eq!(ranges(32 << 20), [(0, 32 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges(64 << 30), [(0, 3 << 30), (4 << 30, 61 << 30)]);
    }

    #[test]
    fn ranges_do_not_share_bytes_of_the_file() {
        let memory = map((3 << 30) + (1 << 20)).unwrap();
        memory.write_obj(1_u64, GuestAddress(0)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(4 << 30)).unwrap(), 0);
    }

    #[test]
    fn memory_is_not_touched() {
        use std::os::unix::fs::MetadataExt;
        let memory = map(1 << 30).unwrap();
        let region = memory.iter().next().unwrap();
        assert_eq!(region.file_offset().unwrap().file().metadata().unwrap().blocks(), 0);
    }
}
