//! How a domain is protected: one trait with an implementation per platform,
//! and the order in which a launch calls it.
//!
//! A launch is a one-shot sequence of typed states, so that a wrong order does
//! not compile:
//!
//! ```text
//! Launch<Created>     VM of the platform's type, capabilities enabled
//!   .add_memory()     every slot of RAM
//! Launch<Populated>   the image's pages are put in here
//!   .create_vcpus()   all of them
//! Launch<WithVcpus>   registers are set here
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

pub mod choose;
pub mod digest;
pub mod host;
pub mod igvm;
pub mod image;
pub mod launch;
mod memory_slot;
pub mod plain;
pub mod platform;
pub mod private_memory;
pub mod snp;
pub mod stage;
mod sys;

pub use choose::{ChooseError, choose};
pub use launch::{Launch, Launched};
pub use platform::{LaunchError, MemorySlot, Platform};
