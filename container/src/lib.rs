//! Container images: what makes verified layers and a manifest of them.
//!
//! ```text
//! source ──▶ archives ──▶ trees + spool ── erofs ──▶ blocks ── verity ──▶ layers ──▶ manifest
//! ```
//!
//! A [tree](tree) has names and attributes in memory; the content of its files is in a [spool](spool), a temporary file.
//! An image is laid out in memory and then written once, hashed on its way. All that a source says is bounded by a
//! [budget](budget).

pub mod archive;
pub mod budget;
pub mod build;
pub mod digest;
pub mod docker;
pub mod erofs;
pub mod files;
pub mod folder;
pub mod identity;
pub mod image;
pub mod layer;
pub mod process;
pub mod region;
pub mod source;
pub mod spool;
pub mod tree;
pub mod unpack;
pub mod verity;
