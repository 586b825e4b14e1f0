//! The memory map that a kernel is given, in the terms that e820 and PVH share.

use crate::layout;

/// Type of usable RAM, in e820 and PVH maps alike.
pub const RAM: u32 = 1;
/// Type of memory that the kernel must leave alone.
pub const RESERVED: u32 = 2;
/// Type of memory with ACPI tables. In a protected domain, Linux takes reserved memory for memory that the host shares.
pub const ACPI: u32 = 3;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical start.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// [`RAM`], [`RESERVED`] or [`ACPI`].
    pub kind: u32,
}

/// The map of a domain with `memory` bytes of RAM, by rising address. The reset stub lies in a reserved range.
pub fn map(memory: u64) -> impl Iterator<Item = Range> {
    let [(_, low), (high_address, high)] = layout::ram_ranges(memory);
    let range = |address: u64, end: u64, kind| Range { address, size: end.saturating_sub(address), kind };
    let map = [
        range(0, layout::LOW_MEMORY_END, RAM),
        range(layout::LOW_MEMORY_END, layout::ACPI_TABLES, RESERVED),
        range(layout::ACPI_TABLES, layout::RESET_STUB_PAGE, ACPI),
        range(layout::RESET_STUB_PAGE, layout::HIGH_MEMORY, RESERVED),
        range(layout::HIGH_MEMORY, low, RAM),
        Range { address: high_address, size: high, kind: RAM },
    ];
    map.into_iter().filter(|range| range.size != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GIB, MIB};

    fn range(address: u64, size: u64, kind: u32) -> Range {
        Range { address, size, kind }
    }

    #[test]
    fn small_and_large_memory() {
        let ranges = |memory| map(memory).collect::<Vec<_>>();
        let low = vec![
            range(0, 0x9_0000, RAM),
            range(0x9_0000, 0x5_0000, RESERVED),
            range(0xE_0000, 0x1_F000, ACPI),
            range(0xF_F000, 0x1000, RESERVED),
        ];
        let with = |high: &[Range]| [&low, high].concat();
        assert_eq!(ranges(128 * MIB), with(&[range(MIB, 127 * MIB, RAM)]));
        assert_eq!(ranges(3 * GIB), with(&[range(MIB, 3 * GIB - MIB, RAM)]));
        let high = [range(MIB, 3 * GIB - MIB, RAM), range(4 * GIB, 2 * GIB, RAM)];
        assert_eq!(ranges(5 * GIB), with(&high));
    }
}
