//! Numbers, ids, paths and texts.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{ConfigError, MAX_ID};
use crate::source::Source;

/// Checks the id of a drive or a domain: 1 to 64 letters, digits, `_` and `-`.
/// `field` is what the message names.
pub fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    if id.is_empty() {
        return Err(ConfigError::Empty { field: field.to_owned() });
    }
    check_text(field, id.as_bytes(), MAX_ID)?;
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
        return Err(ConfigError::BadId { field: field.to_owned(), id: id.to_owned() });
    }
    Ok(())
}

pub(crate) fn check_range(field: &str, value: u64, (min, max): (u64, u64)) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::OutOfRange { field: field.to_owned(), value, min, max })
}

/// Checks a path, or `fd:N`. `PATH_MAX` of Linux counts the terminating NUL.
pub(crate) fn check_path(field: &str, path: &Path) -> Result<(), ConfigError> {
    if path.as_os_str().is_empty() {
        return Err(ConfigError::Empty { field: field.to_owned() });
    }
    check_text(field, path.as_os_str().as_bytes(), 4095)?;
    Source::of(path).map(drop).map_err(|error| ConfigError::Descriptor { field: field.to_owned(), error })
}

pub(crate) fn check_text(field: &str, text: &[u8], max: usize) -> Result<(), ConfigError> {
    if text.len() > max {
        return Err(ConfigError::TooLong { field: field.to_owned(), length: text.len(), max });
    }
    match text.iter().position(|&byte| byte == 0) {
        Some(position) => Err(ConfigError::Nul { field: field.to_owned(), position }),
        None => Ok(()),
    }
}
