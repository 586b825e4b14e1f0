//! The memory map that the kernel is given, in the terms that e820 and PVH share.

use cofferdam_firmware::layout;

/// Type of usable RAM, in e820 and PVH maps alike.
pub(super) const RAM: u32 = 1;
/// Type of memory that the kernel must leave alone.
pub(super) const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    /// Guest-physical start.
    pub(super) address: u64,
    /// Bytes.
    pub(super) size: u64,
    /// [`RAM`] or [`RESERVED`].
    pub(super) kind: u32,
}

/// The map of a domain with `memory` bytes of RAM, by rising address. The ACPI tables
/// and the reset stub lie in its reserved range.
pub(super) fn memory_map(memory: u64) -> Vec<MapEntry> {
    let [(_, low), (high_address, high)] = layout::ram_ranges(memory);
    let entry = |address: u64, end: u64, kind| MapEntry { address, size: end.saturating_sub(address), kind };
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, RAM),
        entry(layout::LOW_MEMORY_END, layout::HIGH_MEMORY, RESERVED),
        entry(layout::HIGH_MEMORY, low, RAM),
    ];
    if high > 0 {
        map.push(MapEntry { address: high_address, size: high, kind: RAM });
    }
    map
}

#[cfg(test)]
mod tests {
    use cofferdam_firmware::layout::{GIB, MIB};

    use super::*;

    fn entry(address: u64, size: u64, kind: u32) -> MapEntry {
        MapEntry { address, size, kind }
    }

    #[test]
    fn small_and_large_memory() {
        let low = [entry(0, 0x9_0000, RAM), entry(0x9_0000, 0x7_0000, RESERVED)];
        assert_eq!(memory_map(128 * MIB), [low[0], low[1], entry(MIB, 127 * MIB, RAM)]);
        assert_eq!(memory_map(3 * GIB), [low[0], low[1], entry(MIB, 3 * GIB - MIB, RAM)]);
        assert_eq!(
            memory_map(5 * GIB),
            [low[0], low[1], entry(MIB, 3 * GIB - MIB, RAM), entry(4 * GIB, 2 * GIB, RAM)]
        );
    }
}
