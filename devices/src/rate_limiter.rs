//! Limits on bandwidth and operations: two token buckets.
//!
//! A bucket holds `size` tokens and refills at the steady rate of `size` per
//! `refill_time`. On top of that it may start with a burst that is spent first
//! and never refilled. A request may start while every bucket has at least one
//! token, and then takes all that it costs, into debt if need be; the next
//! request waits until the debt is paid. So the long-term rate is exact, and a
//! request that costs more than a full bucket still makes progress.
//!
//! The limiter has no clock and no timer: its user passes the time, and waits.

use std::time::{Duration, Instant};

use thiserror::Error;

/// A limit that means nothing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RateLimitError {
    /// A bucket without tokens would never let anything pass.
    #[error("size of the token bucket is 0")]
    NoTokens,
    /// A bucket that refills in no time limits nothing.
    #[error("refill time of the token bucket is 0")]
    NoRefillTime,
}

/// Configuration of one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Tokens in the full bucket; not 0.
    pub size: u64,
    /// Tokens beyond `size` at the start; they are not refilled.
    pub one_time_burst: u64,
    /// Time in which an empty bucket refills; not 0.
    pub refill_time: Duration,
}

/// Configuration of both buckets; one that is left out does not limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    pub operations: Option<TokenBucket>,
}

/// A change of limits. Of each bucket, `None` leaves it as it is; `Some` puts another in its place, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimitChange {
    /// Tokens are bytes.
    pub bandwidth: Option<Option<TokenBucket>>,
    /// Tokens are operations.
    pub operations: Option<Option<TokenBucket>>,
}

/// One bucket as it is now.
#[derive(Debug)]
struct Bucket {
    size: u64,
    burst: u64,
    refill_nanoseconds: u128,
    /// Tokens, at most `size`.
    level: u64,
    /// Tokens that were taken and not there; `level` and `burst` are 0 meanwhile.
    debt: u64,
    /// Up to when the refill was counted.
    filled: Instant,
}

impl Bucket {
    fn new(limit: TokenBucket, now: Instant) -> Result<Self, RateLimitError> {
        if limit.size == 0 {
            return Err(RateLimitError::NoTokens);
        }
        if limit.refill_time.is_zero() {
            return Err(RateLimitError::NoRefillTime);
        }
        Ok(Self {
            size: limit.size,
            burst: limit.one_time_burst,
            refill_nanoseconds: limit.refill_time.as_nanos(),
            level: limit.size,
            debt: 0,
            filled: now,
        })
    }

    /// Adds the whole tokens that have come since the last time.
    fn refill(&mut self, now: Instant) {
        let now = now.max(self.filled);
        let elapsed = now.duration_since(self.filled).as_nanos();
        let size = u128::from(self.size);
        let tokens = elapsed.saturating_mul(size).checked_div(self.refill_nanoseconds).unwrap_or(0);
        let gained = u64::try_from(tokens).unwrap_or(u64::MAX);
        let paid = self.debt.min(gained);
        self.debt = self.debt.saturating_sub(paid);
        let room = self.size.saturating_sub(self.level);
        let added = gained.saturating_sub(paid).min(room);
        self.level = self.level.saturating_add(added);
        if self.level == self.size {
            self.filled = now;
        } else {
            // The time of the fraction of a token that is under way stays uncounted.
            let counted = tokens.saturating_mul(self.refill_nanoseconds).div_ceil(size);
            self.filled = after(self.filled, counted).min(now);
        }
    }

    /// Takes `tokens`, from the burst first.
    fn take(&mut self, tokens: u64) {
        let from_burst = self.burst.min(tokens);
        self.burst = self.burst.saturating_sub(from_burst);
        let rest = tokens.saturating_sub(from_burst);
        let from_level = self.level.min(rest);
        self.level = self.level.saturating_sub(from_level);
        self.debt = self.debt.saturating_add(rest.saturating_sub(from_level));
    }

    /// Time until there is a token, counted from the last refill; `None` if there is one.
    fn wait(&self, now: Instant) -> Option<Duration> {
        if self.debt == 0 && (self.level > 0 || self.burst > 0) {
            return None;
        }
        let missing = u128::from(self.debt).saturating_add(1);
        let nanoseconds = missing.saturating_mul(self.refill_nanoseconds).div_ceil(u128::from(self.size));
        Some(after(self.filled, nanoseconds).saturating_duration_since(now).max(Duration::from_nanos(1)))
    }
}

/// Longest wait; a longer one is several.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

fn after(start: Instant, nanoseconds: u128) -> Instant {
    let wait = u64::try_from(nanoseconds).map_or(LONGEST_WAIT, Duration::from_nanos);
    start.checked_add(wait).or_else(|| start.checked_add(LONGEST_WAIT)).unwrap_or(start)
}

/// The buckets of one device.
#[derive(Debug, Default)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl RateLimiter {
    /// Full buckets at `now`.
    pub fn new(limits: RateLimits, now: Instant) -> Result<Self, RateLimitError> {
        let bucket = |limit: Option<TokenBucket>| limit.map(|l| Bucket::new(l, now)).transpose();
        Ok(Self { bandwidth: bucket(limits.bandwidth)?, operations: bucket(limits.operations)? })
    }

    /// Changes the limits; new buckets are full at `now`. An error changes nothing.
    pub fn change(&mut self, change: RateLimitChange, now: Instant) -> Result<(), RateLimitError> {
        let limits =
            RateLimits { bandwidth: change.bandwidth.flatten(), operations: change.operations.flatten() };
        let new = Self::new(limits, now)?;
        if change.bandwidth.is_some() {
            self.bandwidth = new.bandwidth;
        }
        if change.operations.is_some() {
            self.operations = new.operations;
        }
        Ok(())
    }

    /// Whether nothing is limited, so that nobody needs to ask for the time.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }

    /// Time from `now` until a request may start; `None` if one may start at once.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let wait = |bucket: &mut Bucket| {
            bucket.refill(now);
            bucket.wait(now)
        };
        self.bandwidth.as_mut().and_then(wait).max(self.operations.as_mut().and_then(wait))
    }

    /// Takes the tokens of `operations` that move `bytes`, into debt if they are not there.
    pub fn take(&mut self, operations: u64, bytes: u64) {
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, milliseconds: u64) -> TokenBucket {
        TokenBucket { size, one_time_burst, refill_time: Duration::from_millis(milliseconds) }
    }

    fn bytes_only(limit: TokenBucket, now: Instant) -> RateLimiter {
        RateLimiter::new(RateLimits { bandwidth: Some(limit), operations: None }, now).unwrap()
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn meaningless_limits_are_refused() {
        let now = Instant::now();
        let operations = |limit| RateLimits { bandwidth: None, operations: Some(limit) };
        assert_eq!(RateLimiter::new(operations(bucket(0, 5, 1)), now).unwrap_err(), RateLimitError::NoTokens);
        assert_eq!(
            RateLimiter::new(operations(bucket(1, 0, 0)), now).unwrap_err(),
            RateLimitError::NoRefillTime
        );
        assert!(RateLimiter::new(RateLimits::default(), now).unwrap().is_unlimited());
    }

    #[test]
    fn an_empty_bucket_makes_the_next_wait_for_one_token() {
        let start = Instant::now();
        let mut limiter = bytes_only(bucket(100, 0, 1000), start);
        assert_eq!(limiter.wait(start), None);
        limiter.take(1, 100);
        assert_eq!(limiter.wait(start), Some(ms(10)));
        assert_eq!(limiter.wait(start + ms(4)), Some(ms(6)));
        assert_eq!(limiter.wait(start + ms(10)), None);
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_into_debt() {
        let start = Instant::now();
        let mut limiter = bytes_only(bucket(100, 0, 1000), start);
        limiter.take(1, 1100);
        // 1000 tokens of debt at 100 a second, and one more to start.
        assert_eq!(limiter.wait(start), Some(ms(10_010)));
        assert_eq!(limiter.wait(start + ms(10_009)), Some(ms(1)));
        assert_eq!(limiter.wait(start + ms(10_010)), None);
    }

    #[test]
    fn a_burst_is_spent_first_and_never_refilled() {
        let start = Instant::now();
        let mut limiter = bytes_only(bucket(10, 90, 10), start);
        limiter.take(1, 95);
        assert_eq!(limiter.wait(start), None);
        limiter.take(1, 5);
        assert_eq!(limiter.wait(start), Some(ms(1)));
        // A long time later there is one bucket, not more.
        let later = start + ms(100_000);
        assert_eq!(limiter.wait(later), None);
        limiter.take(1, 10);
        assert_eq!(limiter.wait(later), Some(ms(1)));
    }

    #[test]
    fn the_slower_bucket_decides() {
        let start = Instant::now();
        let limits =
            RateLimits { bandwidth: Some(bucket(1000, 0, 1000)), operations: Some(bucket(2, 0, 1000)) };
        let mut limiter = RateLimiter::new(limits, start).unwrap();
        limiter.take(1, 10);
        assert_eq!(limiter.wait(start), None);
        limiter.take(1, 0);
        assert_eq!(limiter.wait(start), Some(ms(500)));
        limiter.take(0, 1990);
        assert_eq!(limiter.wait(start), Some(ms(1001)));
    }

    #[test]
    fn a_clock_that_goes_back_gives_no_tokens() {
        let start = Instant::now() + ms(1000);
        let mut limiter = bytes_only(bucket(1, 0, 10), start);
        limiter.take(1, 1);
        assert_eq!(limiter.wait(start - ms(500)), Some(ms(510)));
        assert_eq!(limiter.wait(start), Some(ms(10)));
    }

    #[test]
    fn extreme_numbers_neither_overflow_nor_starve() {
        let start = Instant::now();
        let largest = TokenBucket {
            size: u64::MAX,
            one_time_burst: u64::MAX,
            refill_time: Duration::from_secs(u64::MAX),
        };
        let mut limiter = bytes_only(largest, start);
        for _ in 0..4 {
            limiter.take(u64::MAX, u64::MAX);
        }
        assert!(limiter.wait(start).is_some());
        let mut tiny = bytes_only(bucket(u64::MAX, 0, 1), start);
        tiny.take(1, u64::MAX);
        assert_eq!(tiny.wait(start + ms(1)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the costs and the times at which it is asked, what passes in a period is at most what
        /// the buckets held and got, plus one request that went into debt.
        #[test]
        fn the_long_term_rate_is_kept(
            size in 1u64..5000,
            burst in 0u64..5000,
            refill in 1u64..2000,
            steps in proptest::collection::vec((0u64..3000, 0u64..700_000), 1..200),
        ) {
            let start = Instant::now();
            let mut limiter = bytes_only(bucket(size, burst, refill), start);
            let (mut now, mut passed, mut largest) = (start, 0u64, 0u64);
            for (cost, microseconds) in steps {
                now += Duration::from_micros(microseconds);
                if limiter.wait(now).is_none() {
                    limiter.take(1, cost);
                    passed += cost;
                    largest = largest.max(cost);
                }
                let elapsed = now.duration_since(start).as_micros() as u64;
                let allowed = size + burst + elapsed * size / (refill * 1000) + 1;
                prop_assert!(passed <= allowed + largest);
            }
            // It never stops for good.
            let wait = limiter.wait(now).unwrap_or_default();
            prop_assert_eq!(limiter.wait(now + wait), None);
        }
    }
}
