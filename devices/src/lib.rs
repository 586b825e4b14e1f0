//! Device models: what a guest sees on its ports and in its MMIO space.
//!
//! A device knows nothing of the monitor around it. It is reached through
//! [`bus::BusDevice`] from vCPU threads, through `event_manager` from the event
//! loop, raises its pin through [`interrupt::InterruptLine`], and tells the
//! monitor of guest requests through [`platform::GuestRequests`].

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

pub mod bus;
pub mod interrupt;
pub mod platform;
pub mod rate_limiter;
pub mod sink;
mod tally;
pub mod virtio;
