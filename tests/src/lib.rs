//! The harness of the tests that cross crates: it runs `cofferdam` as a user
//! does, and looks at what a user sees.
//!
//! The binaries under test are the shipped ones, `make build`; the payload
//! guests come from `make payloads`.

// A harness that meets the unexpected fails its test.
#![allow(clippy::expect_used, clippy::panic)]

pub mod api;
pub mod container;
pub mod guest;
pub mod held;
pub mod host;
pub mod image;
pub mod kernels;
pub mod place;
pub mod run;
pub mod snp;
pub mod tamper;

pub use guest::Guest;
pub use run::{Finished, Run, Running};

/// `bytes` in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
