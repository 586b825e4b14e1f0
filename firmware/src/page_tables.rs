//! Page tables that map guest-physical memory onto itself by pages of 1 GiB: two
//! tables, whatever the size of the memory.
//!
//! Two sets are used. An image brings one for the first stage's entry, at
//! [`layout::STAGE_PAGE_TABLES`](crate::layout::STAGE_PAGE_TABLES), of the first
//! [`ENTRY_GIB`] GiB; the first stage makes another for the kernel, of all RAM.
//! The GiB with the load window is shared memory in both; everything else is
//! private.

use crate::layout::{GAP_START, GIB, PAGE_SIZE};

/// What an image's own tables map: RAM up to the gap, and the gap.
pub const ENTRY_GIB: u64 = 4;
/// Entries of a table.
const ENTRIES: usize = 512;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// Writes the tables, PML4 and PDPT, into `pages`, which lie at the guest-physical address `address`: they map the first
/// `gib` GiB (at most 512). `private` is the bit of an address that makes a page private (SEV-SNP: `1 << 51`), or 0
/// where there is none.
pub fn fill(pages: &mut [u8], address: u64, gib: u64, private: u64) {
    let (entries, _) = pages.as_chunks_mut();
    let (pml4, pdpt) = entries.split_at_mut_checked(ENTRIES).unwrap_or_default();
    let pdpt_address = address.wrapping_add(PAGE_SIZE);
    for (index, entry) in pml4.iter_mut().enumerate() {
        let value = if index == 0 { pdpt_address | private | PRESENT | WRITABLE } else { 0 };
        *entry = value.to_le_bytes();
    }
    for (entry, number) in pdpt.iter_mut().zip(0..) {
        let page = number * GIB;
        let private = if page == GAP_START { 0 } else { private };
        let value = if number < gib { page | private | PRESENT | WRITABLE | LARGE } else { 0 };
        *entry = value.to_le_bytes();
    }
}

/// An image's own tables, for [`layout::STAGE_PAGE_TABLES`](crate::layout::STAGE_PAGE_TABLES); `private` is as in
/// [`fill`].
pub fn entry_tables(private: u64) -> [[u8; PAGE_SIZE as usize]; 2] {
    let mut tables = [[0; _]; 2];
    fill(tables.as_flattened_mut(), crate::layout::STAGE_PAGE_TABLES, ENTRY_GIB, private);
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = 1 << 51;

    fn words(page: &[u8; 4096]) -> Vec<u64> {
        page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn an_image_maps_4_gib_of_which_the_last_is_shared() {
        let [pml4, pdpt] = entry_tables(C).map(|page| words(&page));
        assert_eq!(pml4[0], C | 0x1_c003);
        assert_eq!(pdpt[..5], [C | 0x83, C | 0x4000_0083, C | 0x8000_0083, 0xc000_0083, 0]);
        assert!(pml4[1..].iter().chain(&pdpt[5..]).all(|&entry| entry == 0));
        let [pml4, pdpt] = entry_tables(0).map(|page| words(&page));
        assert_eq!((pml4[0], pdpt[2], pdpt[3]), (0x1_c003, 0x8000_0083, 0xc000_0083));
    }

    #[test]
    fn old_content_goes_and_memory_above_4_gib_is_private() {
        let mut tables = [[0xFF; 4096]; 2];
        fill(tables.as_flattened_mut(), 0x9000, 65, C);
        let [pml4, pdpt] = tables.map(|page| words(&page));
        assert_eq!(pml4[..2], [C | 0xa003, 0]);
        assert_eq!(pdpt[63..66], [C | 63 << 30 | 0x83, C | 64 << 30 | 0x83, 0]);
    }
}
