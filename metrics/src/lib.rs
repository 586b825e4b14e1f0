//! What the monitor counts and times, and the two forms in which that is written.
//!
//! Whoever does something owns an `Arc` of a small struct of atomics, made by [`group!`], and counts there:
//! no lock, no allocation, no global. Whoever writes metrics holds the other end of the `Arc`, reads all
//! [`Field`]s of a struct at once into a [`Group`], and writes groups as one line of JSON ([`JsonLine`],
//! Firecracker's form: what has changed since the last line) or as Prometheus text ([`prometheus`], totals).

// Nothing that a guest, a file or a client chooses may panic the monitor. (`unwrap` and its like are the workspace's.)
#![cfg_attr(
    not(test),
    warn(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unreachable
    )
)]

#[cfg(any(test, feature = "test-support"))]
pub mod exposition;
mod group;
mod json;
mod latency;
pub mod prometheus;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use group::{Field, Group, Metrics, Reading};
pub use json::JsonLine;
pub use latency::{BUCKETS, Distribution, Latency};

/// Counts up, from any thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more.
    pub fn count(&self) {
        self.add(1);
    }

    /// Counts `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// For [`group!`].
    pub fn read(&self) -> Reading {
        Reading::Counter(self.total())
    }
}

/// How long something took the last time.
#[derive(Debug, Default)]
pub struct LastTime(AtomicU64);

impl LastTime {
    /// It took `time` now.
    pub fn set(&self, time: Duration) {
        self.0.store(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// For [`group!`].
    pub fn read(&self) -> Reading {
        Reading::Micros(self.0.load(Ordering::Relaxed))
    }
}
