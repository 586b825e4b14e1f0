//! Page state changes in lists, and validation.

use core::ops::Range;

use crate::acceptance::UNIT;
use crate::layout::PAGE_SIZE;
use crate::reason::Reason;

/// `SW_EXITCODE` of a page state change, whose list is in the GHCB's shared buffer (GHCB specification, 4.1.6).
pub const EXIT_CODE: u64 = 0x8000_0010;
/// Most entries of a list: what the shared buffer, 2,032 bytes, has room for behind the header.
pub const LIST_MAX: usize = (2032 - 8) / 8;

/// What a page is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Assigned to the domain.
    Private = 1,
    /// The hypervisor's.
    Shared = 2,
}

/// Size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Size {
    /// 4 KiB.
    Small = 0,
    /// 2 MiB.
    Large = 1,
}

/// A page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical address, a multiple of the size.
    pub address: u64,
    /// Its size.
    pub size: Size,
}

impl Page {
    /// Length, bytes.
    const fn length(self) -> u64 {
        match self.size {
            Size::Small => PAGE_SIZE,
            Size::Large => UNIT,
        }
    }

    /// Its entry in a list that makes it private: frame number in bits 12 to 51, operation in bits 52 to 55, size in bit 56.
    pub const fn entry(self) -> u64 {
        (self.size as u64) << 56 | (State::Private as u64) << 52 | self.address
    }
}

/// The pages of a range, whose ends are multiples of 4 KiB: as few as possible.
#[derive(Clone, Debug)]
pub struct Pages(pub Range<u64>);

impl Iterator for Pages {
    type Item = Page;

    fn next(&mut self) -> Option<Page> {
        let Range { start: address, end } = self.0;
        let left = end.checked_sub(address).filter(|left| *left != 0)?;
        let large = address.is_multiple_of(UNIT) && left >= UNIT;
        let page = Page { address, size: if large { Size::Large } else { Size::Small } };
        self.0.start = address.wrapping_add(page.length());
        Some(page)
    }
}

/// The header of a list of `count` entries, 1 to [`LIST_MAX`]: the next entry in bits 0 to 15, the last one in bits 16 to 31.
pub const fn header(count: u16) -> u64 {
    (count.wrapping_sub(1) as u64) << 16
}

/// Reads the header that the hypervisor left in the place of that of `count` entries of which `before` were done. Returns how
/// many are done now.
///
/// # Errors
/// [`Reason::PageState`], if the hypervisor did none, or says anything else.
pub fn done(header: u64, count: u16, before: u16) -> Result<u16, Reason> {
    let next = header as u16;
    let same_list = header & !0xffff == self::header(count);
    let goes_on = before < next && next <= count;
    (same_list && goes_on).then_some(next).ok_or(Reason::PageState)
}

/// What PVALIDATE says (AMD64 manual, volume 3): EAX, and whether the carry flag is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validation {
    /// 0 is success.
    pub code: u32,
    /// Success changed nothing.
    pub unchanged: bool,
}

/// FAIL_SIZEMISMATCH: a page of 2 MiB is made of pages of 4 KiB.
const SIZE_MISMATCH: u32 = 6;

/// Validates a page, in pieces if the hypervisor made it of pieces.
///
/// # Errors
/// [`Reason::PageInvalid`], if the processor refuses; [`Reason::PageValid`], if the page was validated before.
pub fn validate(page: Page, mut pvalidate: impl FnMut(Page) -> Validation) -> Result<(), Reason> {
    let mut check = |page| match pvalidate(page) {
        Validation { code: 0, unchanged: false } => Ok(true),
        Validation { code: 0, unchanged: true } => Err(Reason::PageValid),
        Validation { code: SIZE_MISMATCH, .. } if page.size == Size::Large => Ok(false),
        _ => Err(Reason::PageInvalid),
    };
    if check(page)? {
        return Ok(());
    }
    let mut address = page.address;
    let end = address.wrapping_add(page.length());
    while address != end {
        check(Page { address, size: Size::Small })?;
        address = address.wrapping_add(PAGE_SIZE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::layout::{GIB, MIB};

    #[test]
    fn entries_and_headers_are_the_specification_s() {
        assert_eq!(Page { address: 0x1234_5000, size: Size::Small }.entry(), 0x0010_0000_1234_5000);
        assert_eq!(Page { address: 0x1_0020_0000, size: Size::Large }.entry(), 0x0110_0001_0020_0000);
        assert_eq!((header(1), header(253)), (0, 252 << 16));
        assert_eq!(LIST_MAX, 253);
    }

    #[test]
    fn a_list_must_go_on() {
        assert_eq!(done(2 << 16 | 3, 3, 0), Ok(3));
        assert_eq!(done(2 << 16 | 1, 3, 0), Ok(1));
        let bad = [
            (2 << 16, 0),               // nothing done
            (2 << 16 | 1, 1),           // nothing more done
            (2 << 16 | 1, 2),           // back
            (2 << 16 | 4, 0),           // more than there are
            (1 << 16 | 2, 0),           // a shorter list
            (2 << 16 | 3 | 1 << 32, 0), // a reserved bit
        ];
        for (header, before) in bad {
            assert_eq!(done(header, 3, before), Err(Reason::PageState), "{header:#x} after {before}");
        }
    }

    /// The processor's table of pages: those that the hypervisor made private, in its sizes, and which are validated.
    #[derive(Default)]
    struct Rmp {
        large: BTreeSet<u64>,
        small: BTreeSet<u64>,
        validated: BTreeMap<u64, u32>,
    }

    impl Rmp {
        fn pvalidate(&mut self, page: Page) -> Validation {
            let unit = page.address / UNIT * UNIT;
            let code = match page.size {
                Size::Large if self.large.contains(&unit) => 0,
                Size::Small if self.large.contains(&unit) => SIZE_MISMATCH,
                Size::Large => SIZE_MISMATCH,
                Size::Small if self.small.contains(&page.address) => 0,
                Size::Small => 1,
            };
            let times = self.validated.entry(page.address).or_default();
            *times += u32::from(code == 0);
            Validation { code, unchanged: code == 0 && *times > 1 }
        }
    }

    fn rmp(large: bool) -> Rmp {
        if large {
            Rmp { large: [0].into(), ..Rmp::default() }
        } else {
            Rmp { small: (0..UNIT).step_by(4096).collect(), ..Rmp::default() }
        }
    }

    const UNIT_0: Page = Page { address: 0, size: Size::Large };

    #[test]
    fn a_large_page_is_validated_as_one_or_in_pieces() {
        for (large, pages) in [(true, 1), (false, 512)] {
            let mut rmp = rmp(large);
            assert_eq!(validate(UNIT_0, |page| rmp.pvalidate(page)), Ok(()));
            assert_eq!(rmp.validated.values().filter(|times| **times == 1).count(), pages);
            assert_eq!(rmp.validated.values().max(), Some(&1));
        }
    }

    /// In one piece as in the last of its pieces.
    #[test]
    fn a_validation_that_changes_nothing_ends_the_domain() {
        let mut whole = rmp(true);
        whole.validated.insert(0, 1);
        assert_eq!(validate(UNIT_0, |page| whole.pvalidate(page)), Err(Reason::PageValid));
        for address in [0, UNIT - PAGE_SIZE] {
            let mut pieces = rmp(false);
            pieces.validated.insert(address, 1);
            assert_eq!(validate(UNIT_0, |page| pieces.pvalidate(page)), Err(Reason::PageValid));
        }
    }

    #[test]
    fn a_page_that_cannot_be_validated_ends_the_domain() {
        let mut withheld = rmp(false);
        withheld.small.remove(&0x7000);
        assert_eq!(validate(UNIT_0, |page| withheld.pvalidate(page)), Err(Reason::PageInvalid));
        // A small page inside a large one.
        let small = Page { address: 0x3000, size: Size::Small };
        assert_eq!(validate(small, |page| rmp(true).pvalidate(page)), Err(Reason::PageInvalid));
        for code in [1, 2, 6, u32::MAX] {
            let failing = |_| Validation { code, unchanged: true };
            assert_eq!(validate(small, failing), Err(Reason::PageInvalid));
        }
    }

    proptest! {
        /// Pages lie one behind the other, are as large as they can be, and end where the range does.
        #[test]
        fn pages_tile_their_range(start in 0..3 * MIB / PAGE_SIZE, length in 0..9 * MIB / PAGE_SIZE, base in 0..4_u64) {
            let start = base * GIB + start * PAGE_SIZE;
            let range = start..start + length * PAGE_SIZE;
            let mut at = range.start;
            let (mut small, mut large) = (0, 0);
            for page in Pages(range.clone()) {
                prop_assert_eq!(page.address, at);
                prop_assert!(page.address.is_multiple_of(page.length()));
                match page.size {
                    Size::Small => small += 1,
                    Size::Large => large += 1,
                }
                at += page.length();
            }
            prop_assert_eq!(at, range.end);
            let units = (range.end / UNIT).saturating_sub(range.start.div_ceil(UNIT));
            prop_assert_eq!(large, units);
            prop_assert_eq!(small, length - units * 512);
        }
    }
}
