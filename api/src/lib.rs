//! The types in which the monitor is configured and reports on itself, shared
//! by the configuration file, the REST API and the command line.
//!
//! Field names and defaults are Firecracker's where the meaning is the same,
//! so that its configuration files are read unchanged.
//!
//! | module | what |
//! |---|---|
//! | [`config`], [`container`], [`confidential`], [`validate`], [`source`] | the configuration of a domain |
//! | [`observe`] | where the log and the metrics go |
//! | [`draft`], [`requests`] | how clients put one together; other bodies of requests |
//! | [`actions`] | everything that can be asked of a monitor |
//! | [`router`], [`openapi`] | which request asks for what, and the document that says so |
//! | `server` (a feature), `metrics` | HTTP on a Unix socket; what is counted of it |
//! | `guest` | requests to the init of a container's domain |
//! | `client` (a feature) | a blocking client of it |
//! | [`status`] | what the monitor says of a domain |

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

pub mod actions;
#[cfg(feature = "client")]
pub mod client;
pub mod confidential;
pub mod config;
pub mod container;
pub mod draft;
#[cfg(feature = "server")]
pub mod guest;
pub mod hex;
mod json;
mod lacking;
#[cfg(feature = "server")]
pub mod metrics;
pub mod observe;
pub mod openapi;
pub mod requests;
pub mod router;
#[cfg(feature = "server")]
pub mod server;
pub mod source;
pub mod status;
pub mod validate;
mod wire;
