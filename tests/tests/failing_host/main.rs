//! A host that fails under a running domain, one that ends things at the worst moment, and one that is asked for much:
//! the guest sees an I/O error or a reset, or the domain ends with a reason; it is said a few times, and then counted; and
//! nothing is left behind. Long tests are marked `ignore` and run by `make test-all`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

mod limits;
mod numbers;
mod output;
mod signals;
mod storage;
mod vsock;

use cofferdam_tests::{Finished, Run, place};

/// A payload, in a small domain.
fn payload(name: &str) -> Run {
    Run::new(place::payload(name)).with("memory", "32M")
}

/// Messages of one kind that a device logs in a minute.
const MESSAGES: usize = 5;

/// Lines on stderr that have all `words`.
fn lines_with(done: &Finished, words: &[&str]) -> usize {
    done.messages().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}
