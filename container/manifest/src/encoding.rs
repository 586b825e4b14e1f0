//! The one encoding of a manifest, and its digest.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::types::Manifest;
use crate::validate::{MAX_BYTES, ManifestError, VERSION};

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// More than [`MAX_BYTES`].
    #[error("the manifest has {0} bytes; at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    /// Of another version of the schema.
    #[error("version: {0} is unknown; this program knows {VERSION}")]
    Version(u64),
    /// Not JSON, or not of the schema.
    #[error("the manifest does not follow the schema: {0}")]
    Schema(#[from] serde_json::Error),
    /// A value that is not allowed.
    #[error(transparent)]
    Invalid(#[from] ManifestError),
    /// The same content can be written differently, and must be.
    #[error("the manifest is not in its canonical form (RFC 8785): byte {0} differs")]
    NotCanonical(usize),
}

/// The only field that all versions have.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

/// Reads a manifest, of whatever origin. Whoever knows its digest compares that first.
///
/// # Errors
/// For everything but the exact bytes that [`encode`] makes of a valid manifest.
pub fn decode(bytes: &[u8]) -> Result<Manifest, DecodeError> {
    if bytes.len() > MAX_BYTES {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let Versioned { version } = serde_json::from_slice(bytes)?;
    if version != u64::from(VERSION) {
        return Err(DecodeError::Version(version));
    }
    let manifest: Manifest = serde_json::from_slice(bytes)?;
    let canonical = encode(&manifest)?;
    if canonical != bytes {
        let same = canonical.iter().zip(bytes).take_while(|(ours, theirs)| ours == theirs).count();
        return Err(DecodeError::NotCanonical(same));
    }
    Ok(manifest)
}

/// Writes a manifest.
///
/// # Errors
/// If it is not valid, or would have more than [`MAX_BYTES`].
pub fn encode(manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
    manifest.validate()?;
    // serde_json writes what RFC 8785 wants: no white space, the shortest escapes, and fields in the order of the
    // types, which is that of their names. Strings and integers cannot fail to be written.
    let bytes = serde_json::to_vec(manifest).unwrap_or_default();
    if bytes.len() > MAX_BYTES { Err(ManifestError::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// The digest that a launch binds: SHA-256 of an encoded manifest.
pub fn digest(encoded: &[u8]) -> [u8; 32] {
    Sha256::digest(encoded).into()
}
