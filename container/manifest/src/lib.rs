//! The container manifest: one small file that fixes everything that runs in a container's domain.
//!
//! ```text
//! bytes ── decode ──▶ Manifest ── encode ──▶ the same bytes ── SHA-256 ──▶ digest, which the launch binds
//! ```
//!
//! A manifest has exactly one encoding: JSON as RFC 8785 (JSON Canonicalization Scheme) writes it, of which the
//! manifest uses only what cannot be written in two ways: objects with every field present and in the order of their
//! names, arrays, strings, booleans, null, and integers from 0 to 2^53-1. [`decode`] refuses every other form, so the
//! digest of a manifest is the SHA-256 of its file, whoever computes it, and nothing is implied by what is not there.
//!
//! Lists that are sets (capabilities, signals, groups) are sorted and have no element twice.
//!
//! Host and guest link this crate; it does no input and no output.

#![cfg_attr(
    not(test),
    warn(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unreachable
    )
)]

mod encoding;
mod hex;
mod names;
#[cfg(test)]
mod schema;
mod start;
mod types;
mod validate;

pub use encoding::{DecodeError, decode, digest, encode};
pub use hex::{RootHash, Salt};
pub use names::{CAPABILITIES, Signal};
pub use start::StartError;
pub use types::{
    DataVolume, Host, Layer, Manifest, Mount, OnVerityFailure, Process, Protection, Rlimit, Scratch,
    ScratchVolume, StartVariable, Stop, Tmpfs,
};
pub use validate::{
    BLOCK, MAX_BYTES, MAX_COMMANDS, MAX_GROUPS, MAX_LAYERS, MAX_MOUNTS, MAX_START_VARIABLES, MAX_VOLUMES,
    MAX_WORDS, MAX_WORDS_BYTES, ManifestError, Problem, VERSION,
};
