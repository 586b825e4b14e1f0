//! Why a configuration is refused, in words that name the field.

use std::os::fd::RawFd;

use super::{MAX_COMMAND_LINE, MAX_DEVICES};
use crate::config::SerialMode;
use crate::source::BadNumber;

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The JSON is too large to be a configuration.
    #[error("the configuration is {size} bytes long; at most {max} are read")]
    TooLarge {
        /// Its size, bytes.
        size: usize,
        /// The limit, bytes.
        max: usize,
    },
    /// Not JSON, or not of this schema; the message names field, line and column.
    #[error("{0}")]
    Json(String),
    /// A number outside its range.
    #[error("{field}: {value} is not between {min} and {max}")]
    OutOfRange {
        /// The field.
        field: String,
        /// What it says.
        value: u64,
        /// The smallest good value.
        min: u64,
        /// The largest good value.
        max: u64,
    },
    /// A text or path that is longer than what takes it.
    #[error("{field}: {length} bytes long; at most {max} are possible")]
    TooLong {
        /// The field.
        field: String,
        /// Its length, bytes.
        length: usize,
        /// The limit, bytes.
        max: usize,
    },
    /// A command line that the root device makes too long.
    #[error(
        "boot-source.boot_args: {length} bytes long with the root device's {root:?}; at most \
         {MAX_COMMAND_LINE} are possible"
    )]
    TooLongWithRoot {
        /// Length of the whole command line, bytes.
        length: usize,
        /// What the root device adds.
        root: String,
    },
    /// A text or path that is empty.
    #[error("{field}: is empty")]
    Empty {
        /// The field.
        field: String,
    },
    /// A NUL byte in a text or path.
    #[error("{field}: has a NUL byte at position {position}")]
    Nul {
        /// The field.
        field: String,
        /// Offset of the byte.
        position: usize,
    },
    /// A character that an id cannot have.
    #[error("{field}: {id:?} may only have letters, digits, \"_\" and \"-\"")]
    BadId {
        /// The field.
        field: String,
        /// The id.
        id: String,
    },
    /// An id used by two drives.
    #[error("{field}: {id:?} is used twice")]
    Duplicate {
        /// The field of the second drive.
        field: String,
        /// The id.
        id: String,
    },
    /// A second root device.
    #[error("drives[{index}].is_root_device: drives[{first}] is the root device already")]
    SecondRoot {
        /// Position of the second one.
        index: usize,
        /// Position of the first one.
        first: usize,
    },
    /// More devices than slots.
    #[error("drives: {count} devices with the vsock device; at most {MAX_DEVICES} are possible")]
    TooManyDevices {
        /// Devices asked for.
        count: usize,
    },
    /// A block size that no driver takes.
    #[error("{field}: {value} is neither 512 nor 4096")]
    BlockSize {
        /// The field.
        field: String,
        /// What it says.
        value: u32,
    },
    /// `fd:` is followed by something else than the number of a descriptor.
    #[error("{field}: {error}")]
    Descriptor {
        /// The field.
        field: String,
        /// What is wrong.
        #[source]
        error: BadNumber,
    },
    /// One descriptor for two things.
    #[error("{field}: fd:{fd} is given twice; {other} has it")]
    DescriptorTwice {
        /// The second field.
        field: String,
        /// The descriptor's number.
        fd: RawFd,
        /// The first field.
        other: String,
    },
    /// Two fields that exclude each other, or one that needs another.
    #[error("{field}: {reason}")]
    Conflict {
        /// The field.
        field: String,
        /// What is wrong with it beside the other.
        reason: &'static str,
    },
    /// Serial mode `File` without a file.
    #[error("serial.serial_out_path: is missing, and serial.mode is \"File\"")]
    SerialPathMissing,
    /// A file for a serial mode that writes none.
    #[error("serial.serial_out_path: is given, but serial.mode is {mode:?}")]
    SerialPathUnused {
        /// The mode.
        mode: SerialMode,
    },
}

impl ConfigError {
    /// The field that the message names, where it is about a single one.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::OutOfRange { field, .. }
            | Self::TooLong { field, .. }
            | Self::Empty { field }
            | Self::Nul { field, .. }
            | Self::BadId { field, .. }
            | Self::Duplicate { field, .. }
            | Self::BlockSize { field, .. }
            | Self::Conflict { field, .. }
            | Self::Descriptor { field, .. }
            | Self::DescriptorTwice { field, .. } => Some(field),
            Self::TooLongWithRoot { .. } => Some("boot-source.boot_args"),
            Self::SecondRoot { .. } | Self::TooManyDevices { .. } => Some("drives"),
            Self::SerialPathMissing | Self::SerialPathUnused { .. } => Some("serial.serial_out_path"),
            Self::TooLarge { .. } | Self::Json(_) => None,
        }
    }
}
