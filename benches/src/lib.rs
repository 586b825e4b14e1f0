//! Cofferdam held against others, side by side: every number here is a ratio of
//! two things that ran in turns on one machine in the same minutes, for an
//! absolute time says more about the machine than about the monitor.
//!
//! | module | what is compared | where |
//! |---|---|---|
//! | [`start_up`] | the monitor with `floor`, the least that a monitor can do | this machine's `/dev/kvm` |
//! | [`guests`] | the monitor with QEMU's `microvm` machine | hardware KVM, else the rig |
//! | [`report`] | medians, the table, `bench.json` | |
//!
//! `make bench` runs both and ends with the table. What the numbers mean, and
//! what they do not, stands in docs/performance.md.

// A benchmark that meets the unexpected ends.
#![allow(clippy::expect_used, clippy::panic)]

pub mod console;
pub mod guests;
pub mod inside;
pub mod machines;
pub mod peers;
pub mod report;
pub mod start_up;

/// What any part of a benchmark may fail with.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Says on stderr what is being done.
pub fn progress(text: impl std::fmt::Display) {
    eprintln!("bench: {text}");
}
