//! The domain tier: Debian's kernel in a domain, on hardware KVM or in the rig (`cargo xtask domain-tests`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod command_line;
mod container;
mod container_drives;
mod curl;
mod disk;
mod hostile_host;
mod image;
mod lifecycle;
mod vsock;
