//! The page tables that an image brings for the first stage: they map the first 4 GiB onto themselves, RAM up to the gap
//! and the gap. The kernel is entered with them too.
//!
//! CR3 is [`STAGE_PAGE_TABLES`] on every platform: the PML4, and the PDPT behind it. Where pages are measured there are no
//! more than these two, with pages of 1 GiB, which every processor with SEV-SNP or TDX has. An ordinary virtual machine
//! may lack them, so an image for those brings four page directories as well, with pages of 2 MiB.
//!
//! The first stage of a SEV-SNP domain knows by the private bit in CR3, which is measured, that it is in one. There the tables
//! also map the RAM above 4 GiB, as a page is validated by its virtual address, and the first GiB once more, shared
//! ([`SHARED_ALIAS`]).

use crate::layout::{
    GAP_END, GAP_START, GIB, MAX_MEMORY, MIB, PAGE_SIZE, STAGE_PAGE_DIRECTORIES, STAGE_PAGE_TABLES, ram_end,
};

/// The bit of an address that makes a page private to a SEV-SNP domain. The first stage refuses a processor with another.
pub const SNP_PRIVATE: u64 = 1 << 51;
/// Where the first GiB of physical memory is mapped as shared memory, in a SEV-SNP domain.
pub const SHARED_ALIAS: u64 = ALIAS_ENTRY as u64 * GIB;

/// The last entry of the PDPT.
const ALIAS_ENTRY: usize = 511;

/// A table.
pub type Page = [u8; PAGE_SIZE as usize];

/// What is mapped, GiB.
const MAPPED: u64 = 4;
/// Size of a page in a page directory.
const LARGE_PAGE: u64 = 2 * MIB;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// A table with these entries at its start.
fn table(entries: impl Iterator<Item = u64>) -> Page {
    let mut page = [0; _];
    for (place, entry) in page.as_chunks_mut().0.iter_mut().zip(entries) {
        *place = entry.to_le_bytes();
    }
    page
}

/// PML4 and PDPT of a SEV-SNP domain, for [`STAGE_PAGE_TABLES`]. The GiB with the load window is shared.
pub fn snp() -> [Page; 2] {
    let pml4 = [(STAGE_PAGE_TABLES + PAGE_SIZE) | SNP_PRIVATE | PRESENT | WRITABLE];
    let pdpt = (0..=ALIAS_ENTRY).map(|entry| {
        let page = entry as u64 * GIB;
        let flags = PRESENT | WRITABLE | LARGE;
        match page {
            SHARED_ALIAS => flags,
            GAP_START..GAP_END => page | flags,
            _ if page < ram_end(MAX_MEMORY) => page | SNP_PRIVATE | flags,
            _ => 0,
        }
    });
    [table(pml4.into_iter()), table(pdpt)]
}

/// Four page directories, PML4 and PDPT, for [`STAGE_PAGE_DIRECTORIES`].
pub fn plain() -> [Page; 6] {
    let directory = |number: u64| {
        let pages = (number * GIB..).step_by(LARGE_PAGE as usize);
        table(pages.map(|page| page | PRESENT | WRITABLE | LARGE))
    };
    let pml4 = [(STAGE_PAGE_TABLES + PAGE_SIZE) | PRESENT | WRITABLE];
    let pdpt = (0..MAPPED).map(|number| (STAGE_PAGE_DIRECTORIES + number * PAGE_SIZE) | PRESENT | WRITABLE);
    [directory(0), directory(1), directory(2), directory(3), table(pml4.into_iter()), table(pdpt)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(page: &Page) -> Vec<u64> {
        page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn two_tables_map_all_ram_as_private_and_the_gap_as_shared() {
        const C: u64 = 1 << 51;
        let [pml4, pdpt] = snp().map(|page| words(&page));
        assert_eq!(pml4[0], C | 0x1_c003);
        assert_eq!(pdpt[..5], [C | 0x83, C | 0x4000_0083, C | 0x8000_0083, 0xc000_0083, C | 0x1_0000_0083]);
        assert_eq!(pdpt[64], C | 64 << 30 | 0x83, "the last GiB of 64");
        assert_eq!(pdpt[511], 0x83, "the first GiB once more");
        assert_eq!(SHARED_ALIAS, 511 << 30);
        assert!(pml4[1..].iter().chain(&pdpt[65..511]).all(|&entry| entry == 0));
    }

    #[test]
    fn six_tables_map_4_gib_by_pages_of_2_mib() {
        let [first, second, third, fourth, pml4, pdpt] = plain().map(|page| words(&page));
        assert_eq!(pml4[..2], [0x1_c003, 0]);
        assert_eq!(pdpt[..5], [0x1_7003, 0x1_8003, 0x1_9003, 0x1_a003, 0]);
        let pages = [first, second, third, fourth].concat();
        assert!(pages.iter().zip(0..).all(|(&page, number)| page == number << 21 | 0x83));
        assert_eq!(pages.len(), 2048);
    }
}
