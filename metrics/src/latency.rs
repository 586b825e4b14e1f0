//! How long things take: a histogram with a fixed number of buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::group::Reading;

/// Number of buckets with a bound: bucket `n` holds what took at most 2^n µs, so the last one ends at 8.4 s. One
/// more holds the rest.
pub const BUCKETS: usize = 24;

/// A histogram of times, written from any thread.
#[derive(Debug, Default)]
pub struct Latency {
    counts: [AtomicU64; BUCKETS + 1],
    /// Nanoseconds.
    sum: AtomicU64,
    /// The bits of the shortest time inverted, so that 0 stands for "none yet"; nanoseconds.
    not_min: AtomicU64,
    /// Nanoseconds.
    max: AtomicU64,
}

impl Latency {
    /// Something took `time`.
    pub fn record(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get(bucket(time)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(time, Ordering::Relaxed);
        self.not_min.fetch_max(!time, Ordering::Relaxed);
        self.max.fetch_max(time, Ordering::Relaxed);
    }

    /// Does something, and records how long it took.
    pub fn time<R>(&self, action: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = action();
        self.record(start.elapsed());
        result
    }

    /// What was recorded so far. Times that are recorded meanwhile may be in one part of it and not in another.
    pub fn distribution(&self) -> Distribution {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Distribution {
            counts: std::array::from_fn(|index| self.counts.get(index).map_or(0, load)),
            sum: load(&self.sum),
            min: Some(!load(&self.not_min)).filter(|min| *min != u64::MAX),
            max: load(&self.max),
        }
    }

    /// For [`crate::group!`].
    pub fn read(&self) -> Reading {
        Reading::Latency(Box::new(self.distribution()))
    }
}

/// The bucket of a time in nanoseconds.
fn bucket(time: u64) -> usize {
    let micros = time.div_ceil(1000).max(1);
    // The number of bits of `micros - 1` is the smallest n with micros <= 2^n.
    let bits = u64::BITS.saturating_sub(micros.saturating_sub(1).leading_zeros());
    (bits as usize).min(BUCKETS)
}

/// A [`Latency`] at one moment. Times are in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// Number of times in each bucket; the last one has no bound.
    pub counts: [u64; BUCKETS + 1],
    /// Their sum.
    pub sum: u64,
    /// The shortest one, if there is one.
    pub min: Option<u64>,
    /// The longest one.
    pub max: u64,
}

impl Distribution {
    /// Adds what `other` has.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(other.counts) {
            *count = count.wrapping_add(more);
        }
        self.sum = self.sum.wrapping_add(other.sum);
        self.min = self.min.into_iter().chain(other.min).min();
        self.max = self.max.max(other.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bounds_belong_to_their_buckets() {
        assert_eq!((bucket(0), bucket(1), bucket(1000), bucket(1001)), (0, 0, 0, 1));
        for n in 1..BUCKETS {
            let bound = 1000 << n;
            assert_eq!((bucket(bound), bucket(bound + 1)), (n, n + 1), "{n}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS);
    }

    #[test]
    fn a_histogram_says_what_was_recorded() {
        let latency = Latency::default();
        assert_eq!(latency.distribution(), Distribution::default());
        for micros in [5, 1, 9_000_000] {
            latency.record(Duration::from_micros(micros));
        }
        assert_eq!(latency.time(|| 7), 7);
        let distribution = latency.distribution();
        assert_eq!(distribution.counts.iter().sum::<u64>(), 4);
        assert_eq!((distribution.counts[3], distribution.counts[BUCKETS]), (1, 1));
        assert!(distribution.min.unwrap() <= 1000);
        assert_eq!(distribution.max, 9_000_000_000);
        assert!(distribution.sum >= 9_000_006_000);
        latency.record(Duration::MAX);
        assert_eq!(latency.distribution().counts[BUCKETS], 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn merged_halves_are_the_whole(times in proptest::collection::vec(0..1_u64 << 40, 0..50), at in 0..50_usize) {
            let recorded = |times: &[u64]| {
                let latency = Latency::default();
                times.iter().for_each(|&time| latency.record(Duration::from_nanos(time)));
                latency.distribution()
            };
            let (left, right) = times.split_at(at.min(times.len()));
            let mut merged = recorded(left);
            merged.merge(&recorded(right));
            prop_assert_eq!(merged, recorded(&times));
        }
    }
}
