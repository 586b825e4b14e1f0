//! How a domain is protected: one trait with an implementation per platform,
//! and the order in which a launch calls it.
//!
//! A launch is a one-shot sequence of typed states, so that a wrong order does
//! not compile:
//!
//! ```text
//! Launch<Created>     VM of the platform's type, capabilities enabled
//!   .add_memory()     every slot of RAM
//! Launch<Populated>
//!   .create_vcpus()   all of them
//! Launch<WithVcpus>   pages are filled and registers set here: TDX adds pages through a vCPU
//!   .finish()         the platform seals the launch
//! Launched            what runs, and what may be said of it
//! ```
//!
//! Only [`Launched`] says whether a domain is protected, and only
//! [`Launch::finish`] makes one.

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

pub mod digest;
pub mod host;
pub mod igvm;
pub mod image;
pub mod launch;
pub mod plain;
pub mod platform;
pub mod stage;

pub use launch::{Launch, Launched};
pub use platform::{LaunchError, MemorySlot, Platform, choose};
