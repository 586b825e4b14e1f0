//! What the types alone do not say: limits, and values that are not allowed.

use std::collections::BTreeSet;

use crate::names::{CAPABILITIES, RLIMITS};
use crate::start::compile;
use crate::types::{Host, Layer, Manifest, Mount, Process, Rlimit, StartVariable};

/// The version of the schema.
pub const VERSION: u32 = 1;
/// Most bytes of an encoded manifest.
pub const MAX_BYTES: usize = 1 << 20;
/// Most layers. With 16 data volumes, manifest, scratch and vsock they fit into a domain's 64 devices.
pub const MAX_LAYERS: usize = 32;
/// Most mounts.
pub const MAX_MOUNTS: usize = 64;
/// Most data volumes among the mounts.
pub const MAX_VOLUMES: usize = 16;
/// Most arguments of a command, and most environment variables.
pub const MAX_WORDS: usize = 4096;
/// Most bytes of a command's arguments, and of an environment, each with one byte more per word.
pub const MAX_WORDS_BYTES: usize = 128 << 10;
/// Most commands that the host may run.
pub const MAX_COMMANDS: usize = 64;
/// Most further groups.
pub const MAX_GROUPS: usize = 64;
/// Most variables that a start may set.
pub const MAX_START_VARIABLES: usize = 64;
/// Most bytes of a value that a start gives.
pub(crate) const MAX_START_VALUE: usize = 4096;
/// Size of blocks of layers, data volumes and scratch, in bytes.
pub const BLOCK: u64 = 4096;

/// Longest pattern, in bytes.
const MAX_PATTERN: usize = 1024;
/// PATH_MAX of Linux without the final zero byte.
const MAX_PATH: usize = 4095;
/// NAME_MAX of Linux.
const MAX_NAME: usize = 255;
/// HOST_NAME_MAX of Linux.
const MAX_HOSTNAME: usize = 64;
/// The longest orderly stop: one hour.
const MAX_STOP_MS: u64 = 3_600_000;
/// The largest integer that every reader of JSON keeps: 2^53-1.
const MAX_INTEGER: u64 = (1 << 53) - 1;

/// Why a manifest is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A field's value is not allowed.
    #[error("{field}: {problem}")]
    Field {
        /// The field, as `process.args[2]`.
        field: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// More than [`MAX_BYTES`] when encoded.
    #[error("the manifest would have {0} bytes; at most {MAX_BYTES} are allowed")]
    TooLong(usize),
}

/// What is wrong with a field.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Of another version.
    #[error("{0} is unknown; this program knows {VERSION}")]
    Version(u32),
    /// Too many or too few.
    #[error("{count} elements; {min} to {max} are allowed")]
    Count {
        /// How many there are.
        count: usize,
        /// Least number.
        min: usize,
        /// Greatest number.
        max: usize,
    },
    /// Arguments or environment are too long together.
    #[error("{0} bytes with one more per element; at most {MAX_WORDS_BYTES} are allowed")]
    WordsBytes(usize),
    /// A string is too long.
    #[error("{length} bytes; at most {max} are allowed")]
    Length {
        /// How many bytes it has.
        length: usize,
        /// The most.
        max: usize,
    },
    /// A string is empty that must not be.
    #[error("it is empty")]
    Empty,
    /// A zero byte, which ends a string for Linux.
    #[error("it has a zero byte")]
    ZeroByte,
    /// A path that is not absolute, or has parts that are empty, `.` or `..`.
    #[error("{0:?} is not an absolute path without empty parts, \".\" and \"..\"")]
    Path(String),
    /// The root itself.
    #[error("nothing can be mounted on /")]
    Root,
    /// Something is mounted there already.
    #[error("{0:?} is mounted already")]
    MountedTwice(String),
    /// A mount would hide one that was made before it.
    #[error("it would hide what is mounted on {0:?} before it")]
    Hides(String),
    /// A folder of a device that the domain does not have.
    #[error("the manifest has no scratch device")]
    NoScratch,
    /// A size of zero, too large, or not of whole blocks.
    #[error("{0} is not a size from 4096 to 2^53-1 that is a multiple of 4096")]
    Size(u64),
    /// A number that is too large.
    #[error("{value} is more than {max}")]
    TooLarge {
        /// The number.
        value: u64,
        /// The most.
        max: u64,
    },
    /// No host name.
    #[error(
        "{0:?} is not 1 to 64 letters, digits, hyphens and dots that begin and end with a letter or digit"
    )]
    Hostname(String),
    /// No environment variable.
    #[error("it is not NAME=value")]
    Variable,
    /// A name that no variable can have.
    #[error("{0:?} is not the name of a variable")]
    VariableName(String),
    /// Twice the same, where each must be different.
    #[error("{0:?} is there already")]
    Twice(String),
    /// Not sorted, or twice the same, in a list that is a set.
    #[error("the list is not sorted, or has an element twice")]
    NotSorted,
    /// Not known to Linux.
    #[error("{0:?} is unknown")]
    Unknown(String),
    /// The soft limit is above the hard one.
    #[error("the soft limit is above the hard one")]
    SoftAboveHard,
    /// -1, which means "no change" to Linux.
    #[error("{0} is no user or group")]
    NoId(u32),
    /// No regular expression, or a too large one.
    #[error("{0:?} is not a regular expression, or takes too much memory")]
    Pattern(String),
}

impl Manifest {
    /// Looks at every value.
    ///
    /// # Errors
    /// For the first that is not allowed.
    pub fn validate(&self) -> Result<(), ManifestError> {
        if self.version != VERSION {
            return fail("version", Problem::Version(self.version));
        }
        check_hostname(&self.hostname)?;
        count("layers", self.layers.len(), 1, MAX_LAYERS)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let Layer { root_hash: _, salt: _, size } = layer;
            check_size(&format!("layers[{index}].size"), *size)?;
        }
        self.check_mounts()?;
        self.process.validate()?;
        self.host.validate()?;
        self.scratch.iter().try_for_each(|scratch| check_size("scratch.size", scratch.size))
    }

    fn check_mounts(&self) -> Result<(), ManifestError> {
        count("mounts", self.mounts.len(), 0, MAX_MOUNTS)?;
        let volumes = self.mounts.iter().filter(|mount| matches!(mount, Mount::Data(_))).count();
        count("mounts (data volumes)", volumes, 0, MAX_VOLUMES)?;
        for (index, mount) in self.mounts.iter().enumerate() {
            let (field, path) = (format!("mounts[{index}].path"), mount.path());
            check_path(&field, path)?;
            if path == "/" {
                return fail(&field, Problem::Root);
            }
            for earlier in self.mounts.iter().take(index).map(Mount::path) {
                match earlier.strip_prefix(path) {
                    Some("") => return fail(&field, Problem::MountedTwice(path.to_owned())),
                    Some(rest) if rest.starts_with('/') => {
                        return fail(&field, Problem::Hides(earlier.to_owned()));
                    }
                    _ => {}
                }
            }
            match mount {
                Mount::Data(volume) => check_size(&format!("mounts[{index}].size"), volume.size)?,
                Mount::Tmpfs(tmpfs) => check_size(&format!("mounts[{index}].size"), tmpfs.size)?,
                Mount::Scratch(_) if self.scratch.is_none() => {
                    return fail(&format!("mounts[{index}]"), Problem::NoScratch);
                }
                Mount::Scratch(_) => {}
            }
        }
        Ok(())
    }
}

impl Host {
    fn validate(&self) -> Result<(), ManifestError> {
        count("host.exec", self.exec.len(), 0, MAX_COMMANDS)?;
        for (index, command) in self.exec.iter().enumerate() {
            check_command(&format!("host.exec[{index}]"), command)?;
        }
        sorted("host.signals", &self.signals)?;
        self.stop.iter().try_for_each(|stop| at_most("host.stop.timeout_ms", stop.timeout_ms, MAX_STOP_MS))
    }
}

impl Process {
    fn validate(&self) -> Result<(), ManifestError> {
        check_command("process.args", &self.args)?;
        check_path("process.cwd", &self.cwd)?;
        self.check_environment()?;
        sorted("process.capabilities", &self.capabilities)?;
        for (index, name) in self.capabilities.iter().enumerate() {
            known(&format!("process.capabilities[{index}]"), name, &CAPABILITIES)?;
        }
        check_id("process.uid", self.uid)?;
        check_id("process.gid", self.gid)?;
        count("process.groups", self.groups.len(), 0, MAX_GROUPS)?;
        sorted("process.groups", &self.groups)?;
        self.groups.iter().try_for_each(|group| check_id("process.groups", *group))?;
        let names: Vec<&str> = self.rlimits.iter().map(|limit| limit.name.as_str()).collect();
        sorted("process.rlimits", &names)?;
        for (index, limit) in self.rlimits.iter().enumerate() {
            limit.validate(&format!("process.rlimits[{index}]"))?;
        }
        count("process.start_env", self.start_env.len(), 0, MAX_START_VARIABLES)?;
        let names: Vec<&str> = self.start_env.iter().map(|variable| variable.name.as_str()).collect();
        sorted("process.start_env", &names)?;
        for (index, variable) in self.start_env.iter().enumerate() {
            variable.validate(&format!("process.start_env[{index}]"))?;
        }
        Ok(())
    }

    fn check_environment(&self) -> Result<(), ManifestError> {
        check_words("process.env", &self.env)?;
        let mut names = BTreeSet::new();
        for (index, entry) in self.env.iter().enumerate() {
            let field = format!("process.env[{index}]");
            let Some((name, _)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                return fail(&field, Problem::Variable);
            };
            if !names.insert(name) {
                return fail(&field, Problem::Twice(name.to_owned()));
            }
        }
        Ok(())
    }
}

impl Rlimit {
    fn validate(&self, field: &str) -> Result<(), ManifestError> {
        known(&format!("{field}.name"), &self.name, &RLIMITS)?;
        for limit in [self.soft, self.hard].into_iter().flatten() {
            at_most(field, limit, MAX_INTEGER)?;
        }
        // No limit is above every limit.
        if self.hard.is_some_and(|hard| self.soft.is_none_or(|soft| soft > hard)) {
            return fail(field, Problem::SoftAboveHard);
        }
        Ok(())
    }
}

impl StartVariable {
    fn validate(&self, field: &str) -> Result<(), ManifestError> {
        let name = format!("{field}.name");
        length(&name, &self.name, MAX_NAME)?;
        if self.name.is_empty() || self.name.contains(['=', '\0']) {
            return fail(&name, Problem::VariableName(self.name.clone()));
        }
        let pattern = format!("{field}.pattern");
        length(&pattern, &self.pattern, MAX_PATTERN)?;
        if compile(&self.pattern).is_none() {
            return fail(&pattern, Problem::Pattern(self.pattern.clone()));
        }
        Ok(())
    }
}

fn fail(field: &str, problem: Problem) -> Result<(), ManifestError> {
    Err(ManifestError::Field { field: field.to_owned(), problem })
}

fn count(field: &str, count: usize, min: usize, max: usize) -> Result<(), ManifestError> {
    if (min..=max).contains(&count) { Ok(()) } else { fail(field, Problem::Count { count, min, max }) }
}

fn length(field: &str, text: &str, max: usize) -> Result<(), ManifestError> {
    if text.len() <= max { Ok(()) } else { fail(field, Problem::Length { length: text.len(), max }) }
}

fn at_most(field: &str, value: u64, max: u64) -> Result<(), ManifestError> {
    if value <= max { Ok(()) } else { fail(field, Problem::TooLarge { value, max }) }
}

fn sorted<T: PartialOrd>(field: &str, list: &[T]) -> Result<(), ManifestError> {
    if list.is_sorted_by(|a, b| a < b) { Ok(()) } else { fail(field, Problem::NotSorted) }
}

fn known(field: &str, name: &str, names: &[&str]) -> Result<(), ManifestError> {
    if names.contains(&name) { Ok(()) } else { fail(field, Problem::Unknown(name.to_owned())) }
}

fn check_id(field: &str, id: u32) -> Result<(), ManifestError> {
    if id == u32::MAX { fail(field, Problem::NoId(id)) } else { Ok(()) }
}

fn check_size(field: &str, size: u64) -> Result<(), ManifestError> {
    let good = size > 0 && size <= MAX_INTEGER && size.is_multiple_of(BLOCK);
    if good { Ok(()) } else { fail(field, Problem::Size(size)) }
}

fn check_command(field: &str, args: &[String]) -> Result<(), ManifestError> {
    count(field, args.len(), 1, MAX_WORDS)?;
    if args.first().is_some_and(String::is_empty) {
        return fail(&format!("{field}[0]"), Problem::Empty);
    }
    check_words(field, args)
}

fn check_words(field: &str, words: &[String]) -> Result<(), ManifestError> {
    count(field, words.len(), 0, MAX_WORDS)?;
    let bytes = words.iter().fold(words.len(), |sum, word| sum.saturating_add(word.len()));
    if bytes > MAX_WORDS_BYTES {
        return fail(field, Problem::WordsBytes(bytes));
    }
    match words.iter().position(|word| word.contains('\0')) {
        Some(index) => fail(&format!("{field}[{index}]"), Problem::ZeroByte),
        None => Ok(()),
    }
}

fn check_path(field: &str, path: &str) -> Result<(), ManifestError> {
    length(field, path, MAX_PATH)?;
    if path.contains('\0') {
        return fail(field, Problem::ZeroByte);
    }
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= MAX_NAME;
    match path.strip_prefix('/') {
        Some(rest) if rest.is_empty() || rest.split('/').all(good) => Ok(()),
        _ => fail(field, Problem::Path(path.to_owned())),
    }
}

fn check_hostname(name: &str) -> Result<(), ManifestError> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let good = name.len() <= MAX_HOSTNAME && name.split('.').all(label);
    if good { Ok(()) } else { fail("hostname", Problem::Hostname(name.to_owned())) }
}
