//! What the first stage of a SEV-SNP domain does and says, apart from the instructions themselves.
//!
//! A page of a domain is used in this order: the hypervisor makes it private, when the domain asks for it by a page
//! state change, and the domain validates it (PVALIDATE), once. Every answer of the hypervisor may be a lie; the processor
//! is the one that is believed: it lets nobody use a private page that the domain has not validated, and tells
//! when a page was validated before, in which case the hypervisor has exchanged pages.
//!
//! The pages of the image are validated by the launch ([`low_memory`] is all memory around them).

pub mod cc_blob;
pub mod cpuid_table;
pub mod dialogue;
pub mod ghcb;
pub mod msr;
pub mod page_state;

use core::ops::Range;

use crate::acceptance::UNIT;
use crate::layout::{
    LAUNCH_MANIFEST, PAGE_SIZE, PARAMETER_PAGE, SNP_CPUID, SNP_GHCB, SNP_SECRETS, STAGE, STAGE_PAGE_TABLES,
};

/// The memory of the first unit of [`crate::acceptance`] that the launch has not validated, by rising address, without the GHCB's
/// page. The first stage, with its stack, ends at `stage_end`.
pub fn low_memory(stage_end: u64) -> impl Iterator<Item = Range<u64>> {
    let taken = [
        STAGE..stage_end.next_multiple_of(PAGE_SIZE),
        STAGE_PAGE_TABLES..STAGE_PAGE_TABLES + 2 * PAGE_SIZE,
        LAUNCH_MANIFEST..PARAMETER_PAGE + PAGE_SIZE,
        SNP_GHCB..SNP_GHCB + PAGE_SIZE,
        SNP_SECRETS..SNP_CPUID + PAGE_SIZE,
        UNIT..UNIT,
    ];
    let mut start = 0;
    taken.into_iter().map(move |taken| {
        let free = start..taken.start;
        start = taken.end;
        free
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The addresses are those of docs/images.md.
    #[test]
    fn low_memory_is_all_but_the_pages_of_the_image_and_the_ghcb() {
        let launched = [
            0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x1_b000, 0x1_c000, 0x1_e000, 0x1_f000, 0x9_2000,
            0x9_3000,
        ];
        let free: Vec<_> = low_memory(0x1_3010).collect();
        for page in (0..UNIT).step_by(PAGE_SIZE as usize) {
            let times = free.iter().filter(|range| range.contains(&page)).count();
            let expected = usize::from(!launched.contains(&page) && page != SNP_GHCB);
            assert_eq!(times, expected, "{page:#x}");
        }
        assert!(
            free.iter()
                .all(|range| range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE))
        );
    }
}
