//! The types in which the monitor is configured and reports on itself, shared
//! by the configuration file, the REST API and the command line.
//!
//! Field names and defaults are Firecracker's where the meaning is the same,
//! so that its configuration files are read unchanged.

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

pub mod config;
pub mod status;
pub mod validate;
mod wire;
