//! Domain images: what is in a domain before its first instruction.
//!
//! Whatever an image is made of, it reaches its three sinks (the live domain,
//! an image file, a launch digest) through one trait, [`importer::Importer`].

pub mod compose;
pub mod importer;
pub mod inspect;
pub mod manifest;
#[cfg(test)]
pub(crate) mod testing;
pub mod walk;
