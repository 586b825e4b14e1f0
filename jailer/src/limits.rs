//! Resource limits of the program.

use rustix::process::{Resource, Rlimit, setrlimit};

/// Open files that are allowed unless said otherwise, as in Firecracker.
const DEFAULT_NO_FILE: u64 = 2048;

/// One `--resource-limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Largest size of a file that is written, in bytes.
    FileSize(u64),
    /// One more than the highest descriptor.
    NoFile(u64),
}

/// A limit could not be set.
#[derive(Debug, thiserror::Error)]
#[error("limits: setrlimit {name}={value}: {error}")]
pub struct LimitError {
    name: &'static str,
    value: u64,
    error: rustix::io::Errno,
}

impl Limit {
    /// Reads `fsize=N` or `no-file=N`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("it is fsize=BYTES or no-file=N")?;
        let value = value.parse().map_err(|_| format!("{value:?} is not a number"))?;
        match name {
            "fsize" => Ok(Self::FileSize(value)),
            "no-file" => Ok(Self::NoFile(value)),
            _ => Err(format!("there is no limit {name:?}, only fsize and no-file")),
        }
    }

    fn apply(self) -> Result<(), LimitError> {
        match self {
            Self::FileSize(value) => set("fsize", Resource::Fsize, value),
            Self::NoFile(value) => set("no-file", Resource::Nofile, value),
        }
    }
}

/// Sets `limits`, the default number of files, and that there be no core dump: it would hold the guest's memory.
pub fn apply(limits: &[Limit]) -> Result<(), LimitError> {
    set("core", Resource::Core, 0)?;
    if !limits.iter().any(|limit| matches!(limit, Limit::NoFile(_))) {
        Limit::NoFile(DEFAULT_NO_FILE).apply()?;
    }
    limits.iter().try_for_each(|limit| limit.apply())
}

fn set(name: &'static str, resource: Resource, value: u64) -> Result<(), LimitError> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(|error| LimitError {
        name,
        value,
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_a_name_and_a_number() {
        assert_eq!(Limit::parse("fsize=100"), Ok(Limit::FileSize(100)));
        assert_eq!(Limit::parse("no-file=5"), Ok(Limit::NoFile(5)));
        for bad in ["", "fsize", "fsize=", "fsize=-1", "fsize=1M", "core=0", "=1"] {
            assert!(Limit::parse(bad).is_err(), "{bad:?}");
        }
    }
}
