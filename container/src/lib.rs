//! Container images: what makes verified layers of them.
//!
//! ```text
//! tree + spool ── erofs ──▶ blocks ── verity ──▶ layer.erofs: file system, superblock and hash tree of dm-verity
//! ```
//!
//! A [tree](tree) has names and attributes in memory; the content of its files is in a [spool](spool), a temporary file.
//! The image is laid out in memory and then written once, hashed on its way.

pub mod erofs;
pub mod spool;
pub mod tree;
pub mod verity;
