//! The CPUID page, which the processor's firmware checks at the launch (SEV-SNP firmware ABI, 8.17.2.6): what CPUID says, without an
//! instruction that would ask the hypervisor.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x00 | 4 | number of entries, at most 64 |
//! | 0x10 | 48 each | entries: EAX and ECX asked for (4 each), XCR0, XSS (8 each), EAX, EBX, ECX, EDX (4 each), reserved (8) |

use crate::fields::Fields;
use crate::layout::PAGE_SIZE;
use crate::reason::Reason;

/// The page.
pub type Page = [u8; PAGE_SIZE as usize];

const MAX_ENTRIES: u32 = 64;
const HEADER: usize = 16;
const ENTRY: usize = 48;

/// "Encrypted Memory Capabilities"; bits 0 to 5 of EBX are the number of the address bit that makes a page private.
const ENCRYPTION: u32 = 0x8000_001F;

/// EAX, EBX, ECX and EDX of a leaf; zeros where the table has none, as the processor has them.
pub fn lookup(page: &Page, leaf: u32, subleaf: u32) -> [u32; 4] {
    let count = Fields(page).u32().min(MAX_ENTRIES) as usize;
    let entries = page.get(HEADER..).unwrap_or_default().as_chunks::<ENTRY>().0;
    for entry in entries.iter().take(count) {
        let mut fields = Fields(entry);
        if (fields.u32(), fields.u32()) == (leaf, subleaf) {
            let _extended_state: [u8; 16] = fields.bytes();
            return [fields.u32(), fields.u32(), fields.u32(), fields.u32()];
        }
    }
    [0; 4]
}

/// Checks that the table can be one, and that the processor makes pages private as the image's page tables do, by the address bit
/// `private`.
///
/// # Errors
/// [`Reason::CpuidTable`], [`Reason::PrivateBit`]
pub fn check(page: &Page, private: u64) -> Result<(), Reason> {
    if !(1..=MAX_ENTRIES).contains(&Fields(page).u32()) {
        return Err(Reason::CpuidTable);
    }
    let [_, ebx, ..] = lookup(page, ENCRYPTION, 0);
    (1 << (ebx & 0x3f) == private).then_some(()).ok_or(Reason::PrivateBit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const C: u64 = 1 << 51;

    fn table(count: u32, entries: &[(u32, u32, [u32; 4])]) -> Page {
        let mut page = [0; PAGE_SIZE as usize];
        page[..4].copy_from_slice(&count.to_le_bytes());
        for (index, (leaf, subleaf, result)) in entries.iter().enumerate() {
            let entry = &mut page[16 + 48 * index..][..48];
            let words =
                [*leaf, *subleaf, 0xE, 0xE, 0xE, 0xE, result[0], result[1], result[2], result[3], 0xE, 0xE];
            for (place, word) in entry.chunks_exact_mut(4).zip(words) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        page
    }

    const SOME: [(u32, u32, [u32; 4]); 4] = [
        (1, 0, [1, 2, 3, 4]),
        (7, 0, [5, 6, 7, 8]),
        (7, 1, [9, 10, 11, 12]),
        (0x8000_001F, 0, [2, 0x73, 0, 0]),
    ];

    #[test]
    fn leaves_are_found_by_both_numbers() {
        let page = table(4, &SOME);
        assert_eq!(lookup(&page, 1, 0), [1, 2, 3, 4]);
        assert_eq!(lookup(&page, 7, 0), [5, 6, 7, 8]);
        assert_eq!(lookup(&page, 7, 1), [9, 10, 11, 12]);
        assert_eq!(lookup(&page, 7, 2), [0; 4]);
        assert_eq!(lookup(&page, 0x4000_0000, 0), [0; 4]);
    }

    #[test]
    fn what_is_behind_the_last_entry_is_none() {
        assert_eq!(lookup(&table(2, &SOME), 7, 1), [0; 4]);
        let many: Vec<_> = (0..70).map(|leaf| (leaf, 0, [leaf; 4])).collect();
        assert_eq!(lookup(&table(u32::MAX, &many), 63, 0), [63; 4]);
        assert_eq!(lookup(&table(u32::MAX, &many), 64, 0), [0; 4]);
    }

    #[test]
    fn tables_that_cannot_be_are_refused() {
        assert_eq!(check(&table(4, &SOME), C), Ok(()));
        assert_eq!(check(&table(64, &SOME), C), Ok(()));
        for count in [0, 65, u32::MAX] {
            assert_eq!(check(&table(count, &SOME), C), Err(Reason::CpuidTable), "{count}");
        }
    }

    #[test]
    fn another_bit_than_the_image_s_is_refused() {
        assert_eq!(check(&table(3, &SOME), C), Err(Reason::PrivateBit), "none is said");
        for other in [(2, 47), (2, 52)] {
            assert_eq!(
                check(&table(1, &[(0x8000_001F, 0, [other.0, other.1, 0, 0])]), C),
                Err(Reason::PrivateBit)
            );
        }
    }

    proptest! {
        #[test]
        fn any_page_can_be_asked(count in any::<u32>(), seed in any::<u8>(), leaf in any::<u32>(), subleaf in any::<u32>()) {
            let mut page = [seed; PAGE_SIZE as usize];
            page[..4].copy_from_slice(&count.to_le_bytes());
            lookup(&page, leaf, subleaf);
            let _ = check(&page, C);
        }
    }
}
