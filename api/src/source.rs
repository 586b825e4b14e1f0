//! A file or socket as it is named in the configuration and on the command line: by its path, or, as `fd:N`, by a
//! descriptor that the monitor has inherited. (A file of such a name is `./fd:N`.)

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// A path, or an inherited descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path.
    Path(PathBuf),
    /// `fd:N`, with N from 3 on.
    Descriptor(RawFd),
}

/// What follows `fd:` is not the number of a descriptor that can be inherited for this.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not a descriptor from 3 on")]
pub struct BadNumber(pub String);

impl Source {
    /// What `path` names.
    pub fn of(path: &Path) -> Result<Self, BadNumber> {
        let Some(number) = path.to_str().and_then(|text| text.strip_prefix("fd:")) else {
            return Ok(Self::Path(path.to_owned()));
        };
        match number.parse() {
            Ok(fd) if fd > 2 => Ok(Self::Descriptor(fd)),
            _ => Err(BadNumber(number.to_owned())),
        }
    }
}

impl FromStr for Source {
    type Err = BadNumber;

    fn from_str(text: &str) -> Result<Self, BadNumber> {
        Self::of(Path::new(text))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Descriptor(fd) => write!(f, "fd:{fd}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_paths_or_descriptors() {
        for path in ["/a", "", "./fd:3", "a/fd:3", "FD:3"] {
            assert_eq!(path.parse(), Ok(Source::Path(path.into())));
        }
        assert_eq!("fd:3".parse(), Ok(Source::Descriptor(3)));
        for bad in ["fd:", "fd:0", "fd:2", "fd:-1", "fd:x", "fd:3 ", "fd:99999999999"] {
            assert_eq!(bad.parse::<Source>(), Err(BadNumber(bad[3..].to_owned())));
        }
        for text in ["/a", "fd:3"] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
    }
}
