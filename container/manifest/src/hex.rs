//! Hashes and salts: lower-case hexadecimal digits in JSON.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The root hash of a dm-verity tree with SHA-256: 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootHash(pub [u8; 32]);

/// The salt of a dm-verity tree: an even number of lower-case hexadecimal digits, for at most 256 bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Salt(pub Vec<u8>);

/// Longest salt that dm-verity takes, in bytes.
const MAX_SALT: usize = 256;

impl fmt::Display for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for RootHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Display for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(&self.0, f)
    }
}

impl FromStr for RootHash {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "a root hash is 64 lower-case hexadecimal digits";
        parse(text).and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or(bad)
    }
}

impl FromStr for Salt {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "a salt is an even number of lower-case hexadecimal digits, at most 512";
        parse(text).filter(|bytes| bytes.len() <= MAX_SALT).map(Self).ok_or(bad)
    }
}

impl Serialize for RootHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Salt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Salt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte.wrapping_sub(b'0')),
        b'a'..=b'f' => Some(byte.wrapping_sub(b'a').wrapping_add(10)),
        _ => None,
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_digits_in_pairs() {
        assert_eq!("00ff".parse(), Ok(Salt(vec![0, 255])));
        assert_eq!("".parse(), Ok(Salt(vec![])));
        for bad in ["0", "0g", "FF", "0x00", "+1", " 00", "\u{e9}"] {
            assert!(bad.parse::<Salt>().is_err(), "{bad}");
        }
        assert!("00".repeat(256).parse::<Salt>().is_ok());
        assert!("00".repeat(257).parse::<Salt>().is_err());
        assert!("00".repeat(32).parse::<RootHash>().is_ok());
        for length in [0, 31, 33] {
            assert!("00".repeat(length).parse::<RootHash>().is_err(), "{length}");
        }
    }
}
