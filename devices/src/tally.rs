//! Log lines about what a guest can make happen at will: not one each.

use std::sync::atomic::{AtomicU32, Ordering};

/// Counts occasions, of which the first, second, fourth, eighth and so on are worth a line in the log: the first is
/// never missed, a flood shows how large it was, and there are at most 32 lines.
#[derive(Debug, Default)]
pub struct Tally(AtomicU32);

impl Tally {
    /// Counts one more: how many there were, if this one is worth a line.
    pub fn count(&self) -> Option<u32> {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        count.is_power_of_two().then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_worth_few_lines() {
        let tally = Tally::default();
        let lines: Vec<u32> = (0..1000).filter_map(|_| tally.count()).collect();
        assert_eq!(lines, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    }

    #[test]
    fn a_counter_at_its_end_starts_again() {
        let tally = Tally(AtomicU32::new(u32::MAX - 1));
        assert_eq!([tally.count(), tally.count(), tally.count()], [None, None, Some(1)]);
    }
}
