//! The Cofferdam monitor, as a library: [`domain::Domain`] takes a domain from its
//! configuration to its end.
//!
//! | module | what |
//! |---|---|
//! | [`start`] | what can be refused before anything starts |
//! | [`domain`] | the order of a launch, the event loop, the end |
//! | [`memory`], [`boot`], [`arch`] | guest memory, what is in it at entry, registers |
//! | [`board`] | which device is where |
//! | [`vcpu`], [`exit`], [`gate`], [`kick`] | vCPU threads, what they exit with, how they are held and stopped |
//! | [`control`], [`supervisor`] | what is known and wanted of a running domain; its lifecycle |
//! | [`container`], [`stop_request`] | what a container's domain is given; its orderly stop |
//! | [`api`] | what clients of the REST API may do, before the start and after it |
//! | [`observer`], [`logger`], [`metrics`], [`lines`] | what is said, counted and timed, and the files that it goes to |
//! | [`seccomp`] | what the kernel lets each thread ask of it |
//! | [`arguments`], [`phases`], [`status`], [`run_entry`], [`signals`], [`descriptor`] | the world around the monitor |

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

pub mod activation;
pub mod api;
pub mod arch;
pub mod arguments;
pub mod board;
pub mod boot;
pub mod certificates;
pub mod container;
pub mod control;
pub mod descriptor;
pub mod domain;
pub mod exit;
pub mod gate;
pub mod image;
pub mod kick;
pub mod lines;
pub mod logger;
pub mod memory;
pub mod metrics;
pub mod observer;
pub mod page_state;
pub mod phases;
pub mod prefault;
pub mod run_entry;
pub mod seccomp;
pub mod signals;
pub mod start;
pub mod status;
pub mod stop_request;
pub mod supervisor;
pub mod vcpu;
