//! Cofferdam held against others, side by side: every number here is a ratio of
//! two things that ran in turns on one machine in the same minutes, for an
//! absolute time says more about the machine than about the monitor.
//!
//! | module | what is compared | where |
//! |---|---|---|
//! | [`start_up`] | the monitor with `floor`, the least that a monitor can do | this machine's `/dev/kvm` |
//! | [`api`] | the monitor's API with `small-server`, the least that an HTTP server can do | the same |
//! | [`jail`] | the jailer with `namespaces`, which only enters those of a jail | this machine |
//! | [`crowd`] | many domains with as many of `floor`, and late ones with early ones | this machine's `/dev/kvm` |
//! | [`guests`] | the monitor with QEMU's `microvm` machine | hardware KVM, else the rig |
//! | [`containers`] | containers in domains with direct boots of the same kernels | hardware KVM, else the rig |
//! | [`image`] | a start through an image with a direct one; pages of a launch with their limit | this machine's `/dev/kvm` |
//! | [`hashing`] | the first stage's copying and hashing with the same code on its host | where the guests run |
//! | [`programs`] | what of these runs, as an installation leaves it | |
//! | [`report`] | medians, the table, `bench.json` | |
//!
//! `make bench` runs all and ends with the table. What the numbers mean, and
//! what they do not, stands in docs/performance.md.

// A benchmark that meets the unexpected ends.
#![allow(clippy::expect_used, clippy::panic)]

pub mod api;
pub mod console;
pub mod container_runs;
pub mod containers;
pub mod crowd;
pub mod guests;
pub mod hashing;
pub mod image;
pub mod inside;
pub mod jail;
pub mod machines;
pub mod peers;
pub mod programs;
pub mod report;
pub mod server;
pub mod start_up;

/// What any part of a benchmark may fail with.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Says on stderr what is being done.
pub fn progress(text: impl std::fmt::Display) {
    eprintln!("bench: {text}");
}

/// What both sides of a comparison gave, of which one sample each is taken in turns, `rounds` times. Who is first
/// changes every time. Another round before these warms the caches.
pub fn in_turns<T>(
    rounds: usize,
    mut ours: impl FnMut() -> Result<T>,
    mut theirs: impl FnMut() -> Result<T>,
) -> Result<(Vec<T>, Vec<T>)> {
    let (mut our_samples, mut their_samples) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (own, reference) = if round % 2 == 0 {
            let own = ours()?;
            (own, theirs()?)
        } else {
            let reference = theirs()?;
            (ours()?, reference)
        };
        if round > 0 {
            our_samples.push(own);
            their_samples.push(reference);
        }
    }
    Ok((our_samples, their_samples))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn turns_alternate_and_the_first_round_does_not_count() {
        let order = RefCell::new(String::new());
        let take = |name| {
            order.borrow_mut().push(name);
            Ok(order.borrow().len())
        };
        assert_eq!(in_turns(2, || take('o'), || take('t')).unwrap(), (vec![4, 5], vec![3, 6]));
        assert_eq!(*order.borrow(), "ottoot");
        assert!(in_turns(1, || Err::<(), _>("no".into()), || Ok(())).is_err());
    }
}
