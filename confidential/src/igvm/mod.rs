//! IGVM files, version 1 and 2 of the format (the `igvm_defs` crate is its specification).
//!
//! ```text
//! fixed header       magic, version, sizes, CRC-32 of the two header parts
//! variable headers   type, length, content; padded to 8 bytes; in three sections, in this order:
//!                      platforms        which ones, and each one's bit in the masks of the others
//!                      initialization   policies
//!                      directives       what to do, in measurement order
//! file data          pages and vCPU contexts, where the headers say
//! ```
//!
//! A file comes from anywhere: [`reader`] checks everything before it says anything, copies no
//! content, and needs time and memory in proportion to the file's size. Nothing here knows what
//! Cofferdam puts into its own images. [`writer`] writes what a walk over an image gives it.

mod context;
mod error;
mod header;
mod pages;
pub mod reader;
#[cfg(test)]
mod tests;
pub mod writer;

pub use context::VpContext;
pub use error::{HeaderError, Problem, ReadError};
pub(crate) use header::FileBytes;
pub use header::{FileData, Header, header_name};
