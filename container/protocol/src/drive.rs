//! The drives of a container's domain, which the guest knows by their serial numbers, and what is on the manifest's.
//!
//! ```text
//! manifest        the manifest's bytes, then NULs (one at least) to a multiple of 4,096 bytes
//! start document  {"env":{"NAME":"value", …}}, then NULs (one at least) to a multiple of 4,096 bytes; or nothing
//! ```
//!
//! A manifest is JSON and has no NUL. Its digest is over its bytes alone. The start document is what the host gives
//! beyond what the manifest fixes, and all of it is checked against the manifest by whoever reads it.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Serial number of the manifest's drive.
pub const MANIFEST: &str = "manifest";
/// Serial number of the scratch device.
pub const SCRATCH: &str = "scratch";

/// Serial number of the drive with layer `index`.
pub fn layer(index: usize) -> String {
    format!("layer{index}")
}

/// Serial number of the drive with data volume `index`.
pub fn volume(index: usize) -> String {
    format!("volume{index}")
}

/// Parts of the drive begin at multiples of this, in bytes.
pub const BLOCK: usize = 4096;
/// Longest manifest, in bytes.
pub const MAX_MANIFEST: usize = 1 << 20;
/// Longest start document, in bytes.
pub const MAX_START: usize = 1 << 20;
/// Largest drive, in bytes.
pub const MAX_DRIVE: usize = MAX_MANIFEST + MAX_START + 2 * BLOCK;

/// Why there is no such drive, or nothing on it. Values are not quoted: they may be confidential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriveError {
    /// The manifest has no length that a manifest can have.
    #[error("a manifest of {0} bytes; it has 1 to {MAX_MANIFEST}")]
    ManifestLength(usize),
    /// There is a NUL in the manifest, or something other than NULs behind it.
    #[error("the manifest has a NUL at byte {0}")]
    Nul(usize),
    /// The start document is too long.
    #[error("values for a start of {0} bytes; the most is {MAX_START}")]
    StartLength(usize),
    /// What follows the manifest is no start document.
    #[error("the start document at line {line}, column {column}: not what one has there")]
    Start {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
}

/// What is on the manifest's drive.
#[derive(Debug, PartialEq, Eq)]
pub struct Content<'a> {
    /// The manifest's bytes.
    pub manifest: &'a [u8],
    /// Values for environment variables, in the order that the host gives them in.
    pub env: Vec<(String, String)>,
}

#[derive(Serialize)]
struct WrittenStart<'a> {
    env: &'a BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    #[serde(deserialize_with = "pairs")]
    env: Vec<(String, String)>,
}

/// An object as its pairs, so that a name that comes twice is not lost.
fn pairs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    struct Pairs;
    impl<'de> Visitor<'de> for Pairs {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut pairs = Vec::new();
            while let Some(pair) = map.next_entry()? {
                pairs.push(pair);
            }
            Ok(pairs)
        }
    }
    deserializer.deserialize_map(Pairs)
}

/// The drive's bytes: `manifest`, and the values `env` of this start.
///
/// # Errors
/// If `manifest` can be no manifest, or something is too long.
pub fn write(manifest: &[u8], env: &BTreeMap<String, String>) -> Result<Vec<u8>, DriveError> {
    if manifest.is_empty() || manifest.len() > MAX_MANIFEST {
        return Err(DriveError::ManifestLength(manifest.len()));
    }
    if let Some(at) = manifest.iter().position(|byte| *byte == 0) {
        return Err(DriveError::Nul(at));
    }
    let mut drive = manifest.to_vec();
    pad(&mut drive);
    if !env.is_empty() {
        // Strings in a map cannot fail to be written.
        let start = serde_json::to_vec(&WrittenStart { env }).unwrap_or_default();
        if start.len() > MAX_START {
            return Err(DriveError::StartLength(start.len()));
        }
        drive.extend(start);
        pad(&mut drive);
    }
    Ok(drive)
}

/// NULs to the next multiple of a block: one at least.
fn pad(drive: &mut Vec<u8>) {
    drive.resize(next_block(drive.len()), 0);
}

/// The first multiple of a block above `length`.
fn next_block(length: usize) -> usize {
    (length / BLOCK).saturating_add(1).saturating_mul(BLOCK)
}

/// What is on a drive with these bytes, which are all that it has.
///
/// # Errors
/// If that is no manifest with, perhaps, a start document. Whether the manifest is a good one is another question.
pub fn read(drive: &[u8]) -> Result<Content<'_>, DriveError> {
    let (manifest, rest) = part(drive)?;
    if manifest.is_empty() || manifest.len() > MAX_MANIFEST {
        return Err(DriveError::ManifestLength(manifest.len()));
    }
    let (start, rest) = part(rest)?;
    if start.len() > MAX_START {
        return Err(DriveError::StartLength(start.len()));
    }
    if let Some(at) = rest.iter().position(|byte| *byte != 0) {
        return Err(DriveError::Nul(drive.len().saturating_sub(rest.len()).saturating_add(at)));
    }
    let env = match start {
        [] => Vec::new(),
        start => {
            let read = serde_json::from_slice::<Start>(start);
            read.map_err(|error| DriveError::Start { line: error.line(), column: error.column() })?.env
        }
    };
    Ok(Content { manifest, env })
}

/// The part that `bytes` begin with, without the NULs that follow it, and what is behind them.
fn part(bytes: &[u8]) -> Result<(&[u8], &[u8]), DriveError> {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (part, rest) = bytes.split_at(length);
    let nuls = next_block(length).saturating_sub(length).min(rest.len());
    let (nuls, rest) = rest.split_at(nuls);
    match nuls.iter().all(|byte| *byte == 0) {
        true => Ok((part, rest)),
        false => Err(DriveError::Nul(length)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_drive_is_read_as_it_is_written() {
        for length in [1, BLOCK - 1, BLOCK, BLOCK + 1, MAX_MANIFEST] {
            let manifest = vec![b'm'; length];
            for env in [env(&[]), env(&[("A", "1"), ("B", "\"\n\0é")])] {
                let drive = write(&manifest, &env).unwrap();
                assert!(drive.len().is_multiple_of(BLOCK) && drive.len() <= MAX_DRIVE);
                let content = read(&drive).unwrap();
                assert_eq!(content.manifest, manifest);
                assert!(content.env.into_iter().eq(env));
            }
        }
        let drive = write(b"{}", &env(&[("A", "1")])).unwrap();
        assert_eq!(drive.len(), 2 * BLOCK);
        assert!(drive[BLOCK..].starts_with(br#"{"env":{"A":"1"}}"#) && drive.ends_with(&[0]));
    }

    #[test]
    fn what_can_be_no_manifest_is_not_written() {
        let none = env(&[]);
        assert_eq!(write(b"", &none), Err(DriveError::ManifestLength(0)));
        let long = vec![b'm'; MAX_MANIFEST + 1];
        assert_eq!(write(&long, &none), Err(DriveError::ManifestLength(MAX_MANIFEST + 1)));
        assert_eq!(write(b"a\0b", &none), Err(DriveError::Nul(1)));
        let long = env(&[("A", &"v".repeat(MAX_START))]);
        assert_eq!(write(b"m", &long), Err(DriveError::StartLength(MAX_START + 16)));
    }

    #[test]
    fn bad_drives_are_refused() {
        let block = |text: &str| {
            let mut block = text.as_bytes().to_vec();
            pad(&mut block);
            block
        };
        let with = |start: &str| [block("m"), block(start)].concat();
        assert_eq!(read(&[]), Err(DriveError::ManifestLength(0)));
        assert_eq!(read(&vec![0; BLOCK]), Err(DriveError::ManifestLength(0)));
        let long = vec![b'm'; MAX_MANIFEST + 1];
        assert_eq!(read(&long), Err(DriveError::ManifestLength(MAX_MANIFEST + 1)));
        let mut hidden = block("m");
        hidden[100] = 1;
        assert_eq!(read(&hidden), Err(DriveError::Nul(1)));
        let long = with(&"s".repeat(MAX_START + 1));
        assert_eq!(read(&long), Err(DriveError::StartLength(MAX_START + 1)));
        let third = [with(r#"{"env":{}}"#), block("x")].concat();
        assert_eq!(read(&third), Err(DriveError::Nul(2 * BLOCK)));
        for start in
            ["x", "{}", r#"{"env":{"A":1}}"#, r#"{"env":{},"a":1}"#, r#"{"env":{}} x"#, r#"{"env":[]}"#]
        {
            assert!(matches!(read(&with(start)), Err(DriveError::Start { .. })), "{start}");
        }
        // Blocks of NULs are nothing, and a name that comes twice is not hidden.
        assert_eq!(read(&[block("m"), vec![0; BLOCK]].concat()).unwrap().env, []);
        let twice = with(r#"{"env":{"A":"1","A":"2"}}"#);
        assert_eq!(read(&twice).unwrap().env.len(), 2);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(parts in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..20), 0_usize..3), 0..4)) {
            let mut bytes = vec![];
            for (part, blocks) in parts {
                bytes.extend(part);
                bytes.resize(bytes.len().next_multiple_of(BLOCK) + blocks * BLOCK, 0);
            }
            if let Ok(content) = read(&bytes) {
                prop_assert!(bytes.starts_with(content.manifest) && !content.manifest.contains(&0));
            }
        }
    }
}
