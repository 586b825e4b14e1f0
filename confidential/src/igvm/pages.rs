//! The pages that an image fills, and how much of that a file may ask for.

use std::collections::BTreeMap;

/// Ranges of guest-physical addresses that do not overlap.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Start to end of each range. Neighbours are joined where they are added in ascending
    /// order, as they mostly are, so that this stays small.
    ranges: BTreeMap<u64, u64>,
    /// The range that was added or extended last, so that its extension needs no search: its start and
    /// end, and the start of the next range.
    last: Option<(u64, u64, u64)>,
}

impl Pages {
    /// Adds `start..end`, which is not empty. Returns false, and adds nothing, if a part of it is there already.
    pub fn insert(&mut self, start: u64, end: u64) -> bool {
        if let Some((first, last_end, next)) = self.last
            && last_end == start
            && end <= next
        {
            self.ranges.insert(first, end);
            self.last = Some((first, end, next));
            return true;
        }
        let next = self.ranges.range(start..).next().map_or(u64::MAX, |range| *range.0);
        let before = self.ranges.range(..start).next_back().map(|(start, end)| (*start, *end));
        if end > next || before.is_some_and(|before| before.1 > start) {
            return false;
        }
        let first = before.filter(|before| before.1 == start).map_or(start, |before| before.0);
        self.ranges.insert(first, end);
        self.last = Some((first, end, next));
        true
    }
}

/// What the work and the memory that a file asks for are bounded by.
///
/// A page of 4 KiB needs a header of 32 bytes, so a file of those stays below the limit whatever is in it.
/// What can exceed it are pages of 2 MiB and parameter areas without data.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    left: u64,
}

impl Budget {
    /// What every file may fill, bytes.
    const BASE: u64 = 16 << 20;
    /// What a file may fill for each of its own bytes.
    const PER_BYTE: u64 = 256;

    /// The budget of a file of `length` bytes.
    pub fn new(length: u64) -> Self {
        let limit = length.saturating_mul(Self::PER_BYTE).saturating_add(Self::BASE);
        Self { limit, left: limit }
    }

    /// Takes `bytes` out of it.
    ///
    /// # Errors
    /// The limit, where it is exceeded.
    pub fn take(&mut self, bytes: u64) -> Result<(), u64> {
        self.left = self.left.checked_sub(bytes).ok_or(self.limit)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn says_the_same_as_a_set_of_pages(ranges in proptest::collection::vec((0_u64..40, 1_u64..5), 0..30)) {
            let mut pages = Pages::default();
            let mut model = std::collections::HashSet::new();
            for (start, length) in ranges {
                let free = (start..start + length).all(|page| !model.contains(&page));
                prop_assert_eq!(pages.insert(start, start + length), free);
                if free {
                    model.extend(start..start + length);
                }
            }
        }
    }

    #[test]
    fn ascending_pages_are_one_range() {
        let mut pages = Pages::default();
        assert!((10..1000).all(|page| pages.insert(page, page + 1)));
        assert_eq!(pages.ranges.len(), 1);
        assert!(!pages.insert(500, 501));
    }

    #[test]
    fn a_budget_ends() {
        let mut budget = Budget::new(1);
        assert_eq!(budget.take((16 << 20) + 256), Ok(()));
        assert_eq!(budget.take(1), Err((16 << 20) + 256));
    }
}
