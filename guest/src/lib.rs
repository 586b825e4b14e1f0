//! The init of a container's domain: PID 1, and all there is in it beside the kernel and the container.
//!
//! ```text
//! pseudo file systems → modules → manifest → layers → scratch → root → process → running → stopping
//! ```
//!
//! It boots with nothing, and each step gives the next what it needs; the first that fails ends the domain. The host sees the
//! step ([`ports`]), and why one failed, by a number; and the container's standard streams, as far as the manifest grants
//! them ([`streams`]). What it asks for is checked against the manifest ([`control`]).
//!
//! | step | module |
//! |---|---|
//! | modules | [`modules`] |
//! | manifest | [`drives`], [`binding`], [`snp`] |
//! | layers | [`verity`], [`dm`] |
//! | scratch | [`scratch`], [`ext4`] |
//! | root | [`root`], [`paths`], [`space`] |
//! | process | [`spawn`], [`identity`], [`streams`] |
//! | running | [`supervise`], [`control`], [`vsock`] |

#![cfg_attr(
    not(test),
    warn(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unreachable
    )
)]

pub mod binding;
pub mod boot;
pub mod control;
pub mod dm;
pub mod drives;
pub mod ext4;
pub mod failure;
pub mod identity;
pub mod loopback;
pub mod modules;
pub mod paths;
pub mod ports;
pub mod root;
pub mod scratch;
pub mod snp;
pub mod space;
pub mod spawn;
pub mod streams;
pub mod supervise;
pub mod verity;
pub mod vsock;
