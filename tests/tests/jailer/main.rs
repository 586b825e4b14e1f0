//! The jailer: what a jailed monitor sees, what it is refused, and that nothing of it stays. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

mod cgroups;
mod ends;
mod jail;
mod refusals;
mod rootless;
mod storm;
mod view;
