//! Which RAM of a protected domain is accepted, in units of 2 MiB.
//!
//! A protected domain must accept (SEV-SNP: validate) each page before it uses it, and no page twice: accepting what was
//! accepted would hide that the host has put another page in its place. The first stage accepts what the kernel needs to
//! start, and the kernel the rest, when it needs it. Both keep the books in one table, `struct efi_unaccepted_memory`
//! of Linux (include/linux/efi.h), which a kernel finds through [`crate::efi`]:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x00 | 4 | version, 1 |
//! | 0x04 | 4 | size of a unit, bytes |
//! | 0x08 | 8 | address of the first unit, 0 |
//! | 0x10 | 8 | size of the bitmap, bytes |
//! | 0x18 | | bitmap: a bit is set for a unit that is not accepted |
//!
//! The first unit, with the image's pages in it, is accepted before there is a table, and is never in it. What is no RAM
//! is not in it either. So a unit that [`take`] gives out lies in RAM, away from the image and from the load window, and
//! is given out once.

use core::ops::Range;

use crate::fields::Place;
use crate::layout::{self, GAP_START, MAX_MEMORY, MIB};

/// What a bit stands for, bytes.
pub const UNIT: u64 = 2 * MIB;
/// Size of the largest table, bytes.
pub const SIZE: usize = HEADER + (layout::ram_end(MAX_MEMORY) / UNIT / 8) as usize;

const HEADER: usize = 24;
const VERSION: u32 = 1;

const _: () = assert!(SIZE as u64 <= 2 * layout::PAGE_SIZE && GAP_START.is_multiple_of(UNIT));

/// The byte of the bitmap that a unit is in, and its bit.
fn bit(table: &mut [u8], unit: u64) -> Option<(&mut u8, u8)> {
    let byte = table.get_mut(HEADER..)?.get_mut((unit / 8) as usize)?;
    Some((byte, 1 << (unit % 8)))
}

/// Writes the table of a domain with `memory` bytes of RAM, of which nothing but the first unit is accepted. `table` has
/// [`SIZE`] bytes.
pub fn begin(table: &mut [u8], memory: u64) {
    table.fill(0);
    // Linux reads the bitmap in words of 8 bytes.
    let bitmap = layout::ram_end(memory).div_ceil(UNIT).div_ceil(64) * 8;
    let mut place = Place(table);
    place.put(&VERSION.to_le_bytes());
    place.put(&(UNIT as u32).to_le_bytes());
    place.put(&0_u64.to_le_bytes());
    place.put(&bitmap.to_le_bytes());
    for (start, length) in layout::ram_ranges(memory) {
        for unit in (start / UNIT).max(1)..(start + length).div_ceil(UNIT) {
            if let Some((byte, bit)) = bit(table, unit) {
                *byte |= bit;
            }
        }
    }
}

/// Finds the first units that lie in `range`, at least in part, and are not accepted; takes all of them that are
/// neighbours out of the table, and returns their memory, which is to be accepted now. The last unit of the RAM may be
/// smaller than the others.
pub fn take(table: &mut [u8], range: &Range<u64>, memory: u64) -> Option<Range<u64>> {
    let mut is_taken = |unit| match bit(table, unit) {
        Some((byte, bit)) if *byte & bit != 0 => {
            *byte &= !bit;
            true
        }
        _ => false,
    };
    let end = range.end.min(layout::ram_end(memory)).div_ceil(UNIT);
    let mut units = range.start / UNIT..end;
    let first = units.find(|&unit| is_taken(unit))?;
    let last = units.take_while(|&unit| is_taken(unit)).last().unwrap_or(first);
    Some(first * UNIT..((last + 1) * UNIT).min(layout::ram_end(memory)))
}

/// The memory in a last unit that is smaller than the others; empty if there is none. A kernel would accept all of the
/// unit.
pub fn remainder(memory: u64) -> Range<u64> {
    let end = layout::ram_end(memory);
    end / UNIT * UNIT..end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::{GAP_END, GIB, MIN_MEMORY};

    fn table(memory: u64) -> [u8; SIZE] {
        let mut table = [0xEE; SIZE];
        begin(&mut table, memory);
        table
    }

    fn take_all(table: &mut [u8], range: Range<u64>, memory: u64) -> Vec<Range<u64>> {
        std::iter::from_fn(|| take(table, &range, memory)).collect()
    }

    fn unaccepted(table: &[u8]) -> Vec<u64> {
        let units = table[HEADER..].iter().zip((0..).step_by(8));
        units
            .flat_map(|(byte, unit)| {
                (0..8).filter(move |bit| byte >> bit & 1 != 0).map(move |bit| unit + bit)
            })
            .collect()
    }

    #[test]
    fn the_table_is_linux_s() {
        let table = table(129 * MIB);
        assert_eq!(table[..24], [1, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(table[24..34], [0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0]);
        assert!(table[34..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn neither_the_gap_nor_the_first_unit_is_in_it() {
        let units = unaccepted(&table(4 * GIB));
        assert_eq!(units, (1..1536).chain(2048..2560).collect::<Vec<_>>());
        assert_eq!(unaccepted(&table(MAX_MEMORY)).len(), 32 * 1024 - 1);
    }

    #[test]
    fn units_are_taken_whole_and_once() {
        let mut table = table(64 * MIB);
        assert_eq!(take(&mut table, &(5 * MIB..9 * MIB), 64 * MIB), Some(4 * MIB..10 * MIB));
        assert_eq!(take_all(&mut table, 4 * MIB..10 * MIB, 64 * MIB), []);
        assert_eq!(take_all(&mut table, 3 * MIB..11 * MIB, 64 * MIB), [2 * MIB..4 * MIB, 10 * MIB..12 * MIB]);
        assert_eq!(take(&mut table, &(0..u64::MAX), 64 * MIB), Some(12 * MIB..64 * MIB));
        assert_eq!(unaccepted(&table), []);
    }

    #[test]
    fn the_last_unit_may_be_half() {
        let memory = 33 * MIB;
        assert_eq!(remainder(memory), 32 * MIB..33 * MIB);
        assert!(remainder(64 * MIB).is_empty());
        assert_eq!(remainder(3 * GIB + MIB), GAP_END..GAP_END + MIB);
        let mut table = table(memory);
        assert_eq!(take(&mut table, &remainder(memory), memory), Some(32 * MIB..33 * MIB));
        assert_eq!(take(&mut table, &(0..memory), memory), Some(2 * MIB..32 * MIB));
    }

    #[test]
    fn the_gap_parts_what_is_taken() {
        let mut table = table(4 * GIB);
        let taken = take_all(&mut table, 0..8 * GIB, 4 * GIB);
        assert_eq!(taken, [2 * MIB..3 * GIB, 4 * GIB..5 * GIB]);
    }

    proptest! {
        /// Whatever is asked for in whatever order: nothing is given out twice, nothing but RAM, nothing of the first unit;
        /// all that was asked for is given out, and what is left in the table is the rest.
        #[test]
        fn no_page_twice_none_of_the_forbidden_ones_and_all_of_the_needed(
            memory in MIN_MEMORY / MIB..=5 * 1024,
            asked in proptest::collection::vec((0..6 * GIB, 0..GIB), 0..12),
        ) {
            let memory = memory * MIB;
            let mut table = table(memory);
            let ram: Vec<_> = layout::ram_ranges(memory).into_iter().map(|(start, length)| start..start + length).collect();
            let mut given: Vec<Range<u64>> = Vec::new();
            for (start, length) in &asked {
                given.extend(take_all(&mut table, *start..start + length, memory));
            }
            for (index, range) in given.iter().enumerate() {
                prop_assert!(range.start >= UNIT && range.start.is_multiple_of(UNIT) && !range.is_empty());
                prop_assert!(ram.iter().any(|ram| ram.start <= range.start && range.end <= ram.end));
                for other in &given[..index] {
                    prop_assert!(range.end <= other.start || other.end <= range.start, "{range:?} {other:?}");
                }
            }
            let has = |address: u64| given.iter().any(|range| range.contains(&address));
            let is_ram = |address: u64| ram.iter().any(|ram| ram.contains(&address));
            for (start, length) in asked {
                for address in (start..start + length).step_by(MIB as usize) {
                    prop_assert_eq!(has(address), is_ram(address) && address >= UNIT, "{:#x}", address);
                }
            }
            let left = unaccepted(&table);
            prop_assert!(left.iter().all(|unit| is_ram(unit * UNIT) && !has(unit * UNIT)));
            let sum: u64 = given.iter().map(|range| (range.end - range.start).div_ceil(UNIT)).sum();
            let all: u64 = ram.iter().map(|ram| (ram.end - ram.start).div_ceil(UNIT)).sum();
            prop_assert_eq!(sum + left.len() as u64 + 1, all);
        }
    }
}
