//! What a host and the init of a container's domain say to each other.
//!
//! | module | what | direction |
//! |---|---|---|
//! | [`drive`] | the manifest's drive, and the names of all drives | host to guest, before the kernel starts |
//! | [`modules`] | the list of kernel modules in the initial RAM disk | who builds the image to guest |
//! | [`step`] | the step that init has reached, and why it goes no further | guest to host, by a port |
//! | [`frame`], [`message`] | requests to init, by ttrpc over vsock: `container.proto` | host to guest and back |
//!
//! The standard streams are vsock connections of the guest's to ports of the host: see [`STDIN_PORT`].
//!
//! Host and guest link this crate; it does no input and no output. Whoever reads here reads what the other side wrote:
//! everything is bounded, and nothing is believed.

#![cfg_attr(
    not(test),
    warn(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unreachable
    )
)]

pub mod drive;
pub mod frame;
pub mod message;
pub mod modules;
pub mod step;

/// vsock port on which the guest serves requests.
pub const CONTROL_PORT: u32 = 1024;
/// The line by which a program of the host asks the vsock device for that port. The device answers with a line of its own
/// when the guest has accepted: `OK` and a number.
pub const CONNECT: &str = "CONNECT 1024\n";
/// vsock port of the host that the guest connects to for the container's standard input. With a terminal it carries
/// both directions, and the other two are not connected to.
pub const STDIN_PORT: u32 = 1025;
/// The same for standard output.
pub const STDOUT_PORT: u32 = 1026;
/// The same for standard error.
pub const STDERR_PORT: u32 = 1027;
