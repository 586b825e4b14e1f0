//! The schema, version 1. Fields stand in the order of their names, which is the order in which they are encoded.

use serde::{Deserialize, Serialize};

use crate::hex::{RootHash, Salt};
use crate::names::Signal;

/// Everything that runs in a container's domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// What the host may do to the container beyond starting and ending its domain.
    pub host: Host,
    /// Host name: 1 to 64 letters, digits, hyphens and dots.
    pub hostname: String,
    /// The layers of the root file system, the lowest first: 1 to 32.
    pub layers: Vec<Layer>,
    /// What is mounted above the root file system, in this order: at most 64, of which at most 16 data volumes.
    pub mounts: Vec<Mount>,
    /// What becomes of the domain when a block of a layer or data volume is not what its root hash says.
    pub on_verity_failure: OnVerityFailure,
    /// The process.
    pub process: Process,
    /// The scratch device; null: there is none, and what the container writes is kept in memory.
    pub scratch: Option<Scratch>,
    /// Version of this schema: 1.
    pub version: u32,
}

/// What the host may do to the container. All else that it asks for is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Commands that may be run beside the process, each with exactly these arguments: at most 64.
    pub exec: Vec<Vec<String>>,
    /// Signals that may be sent to the process, sorted by name.
    pub signals: Vec<Signal>,
    /// Whether the host gets what is written to standard error.
    pub stderr: bool,
    /// Whether the host may write to standard input. Without it the process reads /dev/null.
    pub stdin: bool,
    /// Whether the host gets what is written to standard output.
    pub stdout: bool,
    /// What an orderly stop does; null: a stop ends the domain at once.
    pub stop: Option<Stop>,
}

/// An orderly stop: a signal, and the end of the domain some time later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// The signal that the process gets.
    pub signal: Signal,
    /// How long the process has after that, in milliseconds: at most 3,600,000.
    pub timeout_ms: u64,
}

/// A read-only EROFS file system with a dm-verity tree (format 1, SHA-256, blocks of 4,096 bytes) behind it: after
/// `size` bytes follow one block with dm-verity's superblock, then the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Root hash of the tree: 64 lower-case hexadecimal digits.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = r"^[0-9a-f]{64}$")))]
    pub root_hash: RootHash,
    /// Salt of the tree, in lower-case hexadecimal digits.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = r"^([0-9a-f]{2}){0,256}$")))]
    pub salt: Salt,
    /// Size of the file system without the tree, in bytes: a multiple of 4,096.
    pub size: u64,
}

/// Something mounted above the root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Mount {
    /// A read-only volume with a root hash.
    Data(DataVolume),
    /// A folder of the scratch device.
    Scratch(ScratchVolume),
    /// A file system in memory.
    Tmpfs(Tmpfs),
}

impl Mount {
    /// Where it is mounted.
    pub fn path(&self) -> &str {
        match self {
            Self::Data(volume) => &volume.path,
            Self::Scratch(volume) => &volume.path,
            Self::Tmpfs(tmpfs) => &tmpfs.path,
        }
    }
}

/// A read-only EROFS file system with a dm-verity tree behind it, as a layer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DataVolume {
    /// Where: an absolute path without `.`, `..` and empty parts.
    pub path: String,
    /// Root hash of the tree: 64 lower-case hexadecimal digits.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = r"^[0-9a-f]{64}$")))]
    pub root_hash: RootHash,
    /// Salt of the tree, in lower-case hexadecimal digits.
    #[cfg_attr(test, schemars(with = "String", regex(pattern = r"^([0-9a-f]{2}){0,256}$")))]
    pub salt: Salt,
    /// Size of the file system without the tree, in bytes: a multiple of 4,096.
    pub size: u64,
}

/// A folder of the scratch device, empty at the start, with owner and mode of the folder below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ScratchVolume {
    /// Where: an absolute path without `.`, `..` and empty parts.
    pub path: String,
}

/// A file system in memory, with owner and mode of the folder below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    /// Where: an absolute path without `.`, `..` and empty parts.
    pub path: String,
    /// Most that it holds, in bytes.
    pub size: u64,
}

/// What a wrong block in a layer or data volume leads to, beside the I/O error that its reader gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnVerityFailure {
    /// Nothing else.
    Continue,
    /// The end of the domain.
    Kill,
}

/// The process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Program and arguments. A program without `/` is searched for in the folders of `PATH`, as `env` gives it.
    pub args: Vec<String>,
    /// Capabilities that the process and its children can ever have, sorted. With `uid` 0 it has them at its start.
    pub capabilities: Vec<String>,
    /// Working directory: an absolute path without `.`, `..` and empty parts.
    pub cwd: String,
    /// Environment, as `NAME=value`; each name once.
    pub env: Vec<String>,
    /// Group.
    pub gid: u32,
    /// Further groups, sorted: at most 64.
    pub groups: Vec<u32>,
    /// Whether programs gain nothing from set-user-ID, set-group-ID and file capabilities.
    pub no_new_privs: bool,
    /// Whether the root file system is read-only.
    pub read_only_root: bool,
    /// Resource limits, sorted by name.
    pub rlimits: Vec<Rlimit>,
    /// Environment variables to which the host gives a value at each start, sorted by name: at most 64.
    pub start_env: Vec<StartVariable>,
    /// Whether the standard streams are one terminal.
    pub terminal: bool,
    /// User.
    pub uid: u32,
}

/// A resource limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// Hard limit; null: none.
    pub hard: Option<u64>,
    /// Its name, as `RLIMIT_NOFILE`.
    pub name: String,
    /// Soft limit, at most the hard one; null: none.
    pub soft: Option<u64>,
}

/// An environment variable whose value may differ per start. Without a value from the host it is as `env` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct StartVariable {
    /// Its name.
    pub name: String,
    /// A regular expression that the whole value must match.
    pub pattern: String,
}

/// The scratch device: empty at each start, gone at the end of the domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Scratch {
    /// How it is kept from the host.
    pub protection: Protection,
    /// Its size, in bytes: a multiple of 4,096.
    pub size: u64,
}

/// How the scratch device is kept from the host. The key is made in the guest and never leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// Encrypted, and a changed block gives its reader an I/O error.
    Authenticated,
    /// Encrypted only.
    Encrypted,
    /// Not at all.
    None,
}
