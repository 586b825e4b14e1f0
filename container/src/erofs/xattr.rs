//! Extended attributes, as they stand behind an inode.

use std::collections::BTreeMap;

/// Prefixes that are written as numbers. The access control lists are whole names.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// Tells overlayfs to hide what lower layers have in a folder.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// `struct erofs_xattr_ibody_header`, without shared attributes.
const HEADER: [u8; 12] = [0; 12];
/// The inode counts them in 16 bits, in units of 4 bytes.
const MAX_BYTES: usize = 12 + 4 * 65_534;

/// Why extended attributes cannot be held.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// Not of a kind that the format knows.
    #[error("the extended attribute {0:?} is of no kind that EROFS knows")]
    Name(String),
    /// Name or value is too long.
    #[error("the extended attribute {0:?} is too long")]
    Long(String),
    /// All together are too long.
    #[error("the extended attributes have {0} bytes; at most {MAX_BYTES} are possible")]
    TooMany(usize),
}

/// Whether the format has this attribute.
pub fn is_known(name: &[u8]) -> bool {
    split(name).is_some()
}

/// The attributes, and the mark of a folder that hides what lower layers have in it.
///
/// # Errors
/// If the format cannot hold them.
pub fn encode(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, opaque: bool) -> Result<Vec<u8>, XattrError> {
    let mark: (&[u8], &[u8]) = (OPAQUE, b"y");
    let all = xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
    let mut bytes = Vec::new();
    for (name, value) in all.chain(opaque.then_some(mark)) {
        let text = || String::from_utf8_lossy(name).into_owned();
        let (kind, rest) = split(name).ok_or_else(|| XattrError::Name(text()))?;
        let name_length = u8::try_from(rest.len()).map_err(|_| XattrError::Long(text()))?;
        let value_length = u16::try_from(value.len()).map_err(|_| XattrError::Long(text()))?;
        if bytes.is_empty() {
            bytes.extend(HEADER);
        }
        bytes.extend([name_length, kind]);
        bytes.extend(value_length.to_le_bytes());
        bytes.extend(rest);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    if bytes.len() > MAX_BYTES { Err(XattrError::TooMany(bytes.len())) } else { Ok(bytes) }
}

/// Number of the prefix, and what follows it.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, kind)| {
        let rest = name.strip_prefix(*prefix)?;
        // Nothing follows the name of a list, something every other prefix.
        (rest.is_empty() == prefix.starts_with(b"system.")).then_some((*kind, rest))
    })
}
