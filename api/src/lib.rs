//! The types in which the monitor is configured and reports on itself, shared
//! by the configuration file, the REST API and the command line.
//!
//! Field names and defaults are Firecracker's where the meaning is the same,
//! so that its configuration files are read unchanged.

pub mod config;
pub mod status;
pub mod validate;
mod wire;
