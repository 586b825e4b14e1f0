//! What can be said of a configuration without touching the host: ranges,
//! names, lengths. Messages name the field as it stands in the JSON.

use std::collections::{HashMap, HashSet};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::config::{
    BootMode, BootProtocol, BootSource, DomainConfig, Drive, MachineConfig, Serial, SerialMode, Vsock,
};
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::source::{BadNumber, Source};

/// Smallest and largest number of vCPUs.
pub const VCPU_COUNT: (u64, u64) = (1, 32);
/// Smallest and largest guest memory, MiB.
pub const MEM_SIZE_MIB: (u64, u64) = (32, 65_536);
/// Longest kernel command line, bytes, without the terminating NUL.
pub const MAX_COMMAND_LINE: usize = 2048;
/// Most virtio devices of a domain: one slot and one interrupt pin each.
pub const MAX_DEVICES: usize = 64;
/// Longest drive or domain id, bytes.
pub const MAX_ID: usize = 64;
/// Smallest and largest context id of a guest (vsock(7): 0 to 2 are taken, the last one means "any").
pub const GUEST_CID: (u64, u64) = (3, u32::MAX as u64 - 1);
/// Longest time between the power button and a hard stop, milliseconds: a day.
pub const MAX_STOP_TIMEOUT_MS: u64 = 24 * 60 * 60 * 1000;
/// Longest path of a vsock socket, bytes. `sun_path` of unix(7) has 108 with
/// the terminating NUL, and `_4294967295` must fit behind the path.
pub const MAX_UDS_PATH: usize = 108 - 1 - "_4294967295".len();

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

impl DomainConfig {
    /// Checks everything that can be checked without touching the host. The
    /// first field at fault is named.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.machine.validate()?;
        self.boot.validate()?;
        self.validate_command_line()?;
        self.validate_drives()?;
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        self.serial.validate()?;
        self.logger.as_ref().map_or(Ok(()), LoggerConfig::validate)?;
        self.metrics.as_ref().map_or(Ok(()), MetricsConfig::validate)?;
        self.validate_descriptors()?;
        check_range("stop_timeout_ms", self.stop_timeout_ms, (0, MAX_STOP_TIMEOUT_MS))
    }

    /// Each descriptor can be taken over once.
    fn validate_descriptors(&self) -> Result<(), ConfigError> {
        let mut seen = HashMap::new();
        for (field, path) in self.paths() {
            if let Ok(Source::Descriptor(fd)) = Source::of(path)
                && let Some(other) = seen.insert(fd, field.clone())
            {
                return Err(ConfigError::DescriptorTwice { field, fd, other });
            }
        }
        Ok(())
    }

    /// Everything that is a path or `fd:N`, by its field.
    fn paths(&self) -> Vec<(String, &Path)> {
        let named = [
            ("boot-source.kernel_image_path", self.boot.kernel_image_path.as_ref()),
            ("boot-source.initrd_path", self.boot.initrd_path.as_ref()),
            ("boot-source.image_path", self.boot.image_path.as_ref()),
            ("vsock.uds_path", self.vsock.as_ref().map(|vsock| &vsock.uds_path)),
            ("serial.serial_out_path", self.serial.serial_out_path.as_ref()),
            ("logger.log_path", self.logger.as_ref().and_then(|logger| logger.log_path.as_ref())),
            ("metrics.metrics_path", self.metrics.as_ref().map(|metrics| &metrics.metrics_path)),
        ];
        let named = named.into_iter().filter_map(|(field, path)| Some((field.to_owned(), path?.as_path())));
        let drives = self.drives.iter().enumerate();
        let drives = drives
            .map(|(index, drive)| (format!("drives[{index}].path_on_host"), drive.path_on_host.as_path()));
        named.chain(drives).collect()
    }

    fn validate_command_line(&self) -> Result<(), ConfigError> {
        let given = self.boot.boot_args.as_deref().unwrap_or_default();
        check_text("boot-source.boot_args", given.as_bytes(), MAX_COMMAND_LINE)?;
        let length = self.command_line().len();
        match self.root_arguments() {
            Some(root) if length > MAX_COMMAND_LINE => Err(ConfigError::TooLongWithRoot { length, root }),
            _ => Ok(()),
        }
    }

    fn validate_drives(&self) -> Result<(), ConfigError> {
        let count = self.drives.len().saturating_add(usize::from(self.vsock.is_some()));
        if count > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices { count });
        }
        let mut ids = HashSet::new();
        let mut root = None;
        for (index, drive) in self.drives.iter().enumerate() {
            drive.validate(index)?;
            if drive.is_root_device && self.boot.image_path.is_some() {
                return Err(ConfigError::Conflict {
                    field: format!("drives[{index}].is_root_device"),
                    reason: "would add to the command line, but that of an image is fixed",
                });
            }
            if !ids.insert(drive.drive_id.as_str()) {
                let field = format!("drives[{index}].drive_id");
                return Err(ConfigError::Duplicate { field, id: drive.drive_id.clone() });
            }
            if drive.is_root_device
                && let Some(first) = root.replace(index)
            {
                return Err(ConfigError::SecondRoot { index, first });
            }
        }
        Ok(())
    }
}

impl MachineConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        check_range("machine-config.vcpu_count", self.vcpu_count.into(), VCPU_COUNT)?;
        check_range("machine-config.mem_size_mib", self.mem_size_mib, MEM_SIZE_MIB)
    }
}

impl BootSource {
    fn validate(&self) -> Result<(), ConfigError> {
        let paths = [
            ("boot-source.kernel_image_path", &self.kernel_image_path),
            ("boot-source.initrd_path", &self.initrd_path),
            ("boot-source.image_path", &self.image_path),
        ];
        for (field, path) in paths {
            path.as_deref().map_or(Ok(()), |path| check_path(field, path))?;
        }
        let conflict = |field: &str, reason| Err(ConfigError::Conflict { field: field.to_owned(), reason });
        if self.image_path.is_some() {
            let in_image = "an image has its own; leave it out beside boot-source.image_path";
            if self.kernel_image_path.is_some() {
                return conflict("boot-source.kernel_image_path", in_image);
            }
            if self.initrd_path.is_some() {
                return conflict("boot-source.initrd_path", in_image);
            }
            if self.boot_args.is_some() {
                return conflict("boot-source.boot_args", in_image);
            }
            if self.mode() == BootMode::Direct {
                return conflict(
                    "boot-source.boot_mode",
                    "the kernel of an image is loaded by its first stage",
                );
            }
        } else if self.kernel_image_path.is_none() {
            return conflict("boot-source.kernel_image_path", "is missing, and so is boot-source.image_path");
        }
        if self.mode() == BootMode::Image && self.boot_protocol == BootProtocol::Pvh {
            return conflict("boot-source.boot_protocol", "the first stage enters a kernel by linux64 only");
        }
        Ok(())
    }
}

impl Drive {
    fn validate(&self, index: usize) -> Result<(), ConfigError> {
        let field = |name: &str| format!("drives[{index}].{name}");
        check_id(&field("drive_id"), &self.drive_id)?;
        check_path(&field("path_on_host"), &self.path_on_host)?;
        if !matches!(self.block_size, 512 | 4096) {
            return Err(ConfigError::BlockSize { field: field("block_size"), value: self.block_size });
        }
        Ok(())
    }
}

impl Vsock {
    fn validate(&self) -> Result<(), ConfigError> {
        check_range("vsock.guest_cid", self.guest_cid.into(), GUEST_CID)?;
        check_path("vsock.uds_path", &self.uds_path)?;
        check_text("vsock.uds_path", self.uds_path.as_os_str().as_bytes(), MAX_UDS_PATH)
    }
}

impl Serial {
    fn validate(&self) -> Result<(), ConfigError> {
        match (self.mode, &self.serial_out_path) {
            (SerialMode::File, Some(path)) => check_path("serial.serial_out_path", path),
            (SerialMode::File, None) => Err(ConfigError::SerialPathMissing),
            (_, None) => Ok(()),
            (mode, Some(_)) => Err(ConfigError::SerialPathUnused { mode }),
        }
    }
}

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

fn check_range(field: &str, value: u64, (min, max): (u64, u64)) -> Result<(), ConfigError> {
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

fn check_text(field: &str, text: &[u8], max: usize) -> Result<(), ConfigError> {
    if text.len() > max {
        return Err(ConfigError::TooLong { field: field.to_owned(), length: text.len(), max });
    }
    match text.iter().position(|&byte| byte == 0) {
        Some(position) => Err(ConfigError::Nul { field: field.to_owned(), position }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RateLimiter, TokenBucket};

    fn config() -> DomainConfig {
        DomainConfig::from_json(
            br#"{"boot-source": {"kernel_image_path": "vmlinux"},
                 "drives": [{"drive_id": "a", "path_on_host": "a.img"},
                            {"drive_id": "b", "path_on_host": "b.img"}],
                 "vsock": {"guest_cid": 3, "uds_path": "v.sock"}}"#,
        )
        .unwrap()
    }

    /// What `validate` says of [`config`] after `change`.
    fn refusal(change: impl FnOnce(&mut DomainConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    fn accepted(change: impl FnOnce(&mut DomainConfig)) {
        let mut config = config();
        change(&mut config);
        config.validate().unwrap();
    }

    #[test]
    fn machine_limits() {
        for count in [1, 32] {
            accepted(|c| c.machine.vcpu_count = count);
        }
        for mib in [32, 65_536] {
            accepted(|c| c.machine.mem_size_mib = mib);
        }
        assert_eq!(
            refusal(|c| c.machine.vcpu_count = 33),
            "machine-config.vcpu_count: 33 is not between 1 and 32"
        );
        assert_eq!(
            refusal(|c| c.machine.vcpu_count = 0),
            "machine-config.vcpu_count: 0 is not between 1 and 32"
        );
        for mib in [0, 31, 65_537, u64::MAX] {
            assert_eq!(
                refusal(|c| c.machine.mem_size_mib = mib),
                format!("machine-config.mem_size_mib: {mib} is not between 32 and 65536")
            );
        }
    }

    #[test]
    fn command_line_limits() {
        accepted(|c| c.boot.boot_args = Some("x".repeat(2048)));
        accepted(|c| c.boot.boot_args = Some(String::new()));
        assert_eq!(
            refusal(|c| c.boot.boot_args = Some("x".repeat(2049))),
            "boot-source.boot_args: 2049 bytes long; at most 2048 are possible"
        );
        assert_eq!(
            refusal(|c| c.boot.boot_args = Some("a\0b".into())),
            "boot-source.boot_args: has a NUL byte at position 1"
        );
        // The part that a root device adds counts too.
        let long = refusal(|c| {
            c.boot.boot_args = Some("x".repeat(2040));
            c.drives[0].is_root_device = true;
        });
        assert_eq!(
            long,
            "boot-source.boot_args: 2057 bytes long with the root device's \"root=/dev/vda rw\"; at most 2048 \
             are possible"
        );
    }

    #[test]
    fn an_image_comes_alone() {
        let image = |c: &mut DomainConfig| {
            c.boot = BootSource { image_path: Some("i.igvm".into()), ..BootSource::default() }
        };
        accepted(image);
        accepted(|c| c.boot.boot_mode = Some(BootMode::Image));
        accepted(|c| c.boot.boot_mode = Some(BootMode::Direct));
        let own = "an image has its own; leave it out beside boot-source.image_path";
        type Change = fn(&mut DomainConfig);
        let cases: [(Change, &str, &str); 7] = [
            (|c| c.boot.kernel_image_path = Some("k".into()), "boot-source.kernel_image_path", own),
            (|c| c.boot.initrd_path = Some("i".into()), "boot-source.initrd_path", own),
            (|c| c.boot.boot_args = Some(String::new()), "boot-source.boot_args", own),
            (
                |c| c.boot.boot_mode = Some(BootMode::Direct),
                "boot-source.boot_mode",
                "the kernel of an image is loaded by its first stage",
            ),
            (
                |c| c.boot.image_path = None,
                "boot-source.kernel_image_path",
                "is missing, and so is boot-source.image_path",
            ),
            (
                |c| c.boot.boot_protocol = BootProtocol::Pvh,
                "boot-source.boot_protocol",
                "the first stage enters a kernel by linux64 only",
            ),
            (|c| c.boot.image_path = Some("".into()), "boot-source.image_path", "is empty"),
        ];
        for (change, field, reason) in cases {
            let message = refusal(|c| {
                image(c);
                change(c);
            });
            assert_eq!(message, format!("{field}: {reason}"));
        }
        let message = refusal(|c| {
            image(c);
            c.drives[0].is_root_device = true;
        });
        assert_eq!(
            message,
            "drives[0].is_root_device: would add to the command line, but that of an image is fixed"
        );
    }

    #[test]
    fn boot_files() {
        assert_eq!(
            refusal(|c| c.boot.kernel_image_path = Some("".into())),
            "boot-source.kernel_image_path: is empty"
        );
        assert_eq!(
            refusal(|c| c.boot.initrd_path = Some("i\0".into())),
            "boot-source.initrd_path: has a NUL byte at position 1"
        );
        assert_eq!(
            refusal(|c| c.boot.initrd_path = Some("i".repeat(4096).into())),
            "boot-source.initrd_path: 4096 bytes long; at most 4095 are possible"
        );
    }

    #[test]
    fn drive_ids() {
        accepted(|c| c.drives[1].drive_id = "aZ09_-".into());
        accepted(|c| c.drives[1].drive_id = "x".repeat(64));
        assert_eq!(refusal(|c| c.drives[1].drive_id = String::new()), "drives[1].drive_id: is empty");
        assert_eq!(
            refusal(|c| c.drives[1].drive_id = "x".repeat(65)),
            "drives[1].drive_id: 65 bytes long; at most 64 are possible"
        );
        for id in ["a/b", "é", "a b", ".."] {
            assert!(refusal(|c| c.drives[0].drive_id = id.into()).starts_with("drives[0].drive_id: "));
        }
        assert_eq!(refusal(|c| c.drives[1].drive_id = "a".into()), "drives[1].drive_id: \"a\" is used twice");
    }

    #[test]
    fn drive_fields() {
        accepted(|c| c.drives[0].block_size = 4096);
        assert_eq!(
            refusal(|c| c.drives[1].block_size = 1024),
            "drives[1].block_size: 1024 is neither 512 nor 4096"
        );
        assert_eq!(refusal(|c| c.drives[1].path_on_host = "".into()), "drives[1].path_on_host: is empty");
        accepted(|c| c.drives[1].is_root_device = true);
        let two_roots = refusal(|c| {
            c.drives[0].is_root_device = true;
            c.drives[1].is_root_device = true;
        });
        assert_eq!(two_roots, "drives[1].is_root_device: drives[0] is the root device already");
    }

    #[test]
    fn rate_limits() {
        let bucket = |size, refill_time| Some(TokenBucket { size, one_time_burst: None, refill_time });
        accepted(|c| {
            c.drives[0].rate_limiter = Some(RateLimiter { bandwidth: bucket(1, 1), ops: bucket(1, 1) })
        });
        // As Firecracker's, they limit nothing.
        accepted(|c| {
            c.drives[0].rate_limiter = Some(RateLimiter { bandwidth: bucket(0, 1), ops: bucket(1, 0) });
        });
    }

    #[test]
    fn descriptors_have_numbers_and_one_use() {
        accepted(|c| {
            c.boot.kernel_image_path = Some("fd:3".into());
            c.boot.initrd_path = Some("fd:4".into());
            c.drives[0].path_on_host = "fd:5".into();
            c.drives[1].path_on_host = "./fd:5".into();
            c.vsock.as_mut().unwrap().uds_path = "fd:6".into();
            c.serial = serde_json::from_str(r#"{"serial_out_path": "fd:7"}"#).unwrap();
        });
        for bad in ["fd:", "fd:2", "fd:x", "fd:3/a"] {
            let refused = |field: &str, message: String| {
                assert_eq!(message, format!("{field}: {:?} is not a descriptor from 3 on", &bad[3..]));
            };
            refused(
                "boot-source.kernel_image_path",
                refusal(|c| c.boot.kernel_image_path = Some(bad.into())),
            );
            refused("boot-source.initrd_path", refusal(|c| c.boot.initrd_path = Some(bad.into())));
            refused("drives[1].path_on_host", refusal(|c| c.drives[1].path_on_host = bad.into()));
            refused("vsock.uds_path", refusal(|c| c.vsock.as_mut().unwrap().uds_path = bad.into()));
            let serial = Serial { mode: SerialMode::File, serial_out_path: Some(bad.into()) };
            refused("serial.serial_out_path", refusal(|c| c.serial = serial));
        }
        let twice = refusal(|c| {
            c.boot.initrd_path = Some("fd:5".into());
            c.drives[1].path_on_host = "fd:5".into();
        });
        assert_eq!(twice, "drives[1].path_on_host: fd:5 is given twice; boot-source.initrd_path has it");
    }

    #[test]
    fn device_count() {
        let drives = |count: usize| -> Vec<Drive> {
            let one = config().drives[0].clone();
            (0..count).map(|n| Drive { drive_id: format!("d{n}"), ..one.clone() }).collect()
        };
        accepted(|c| c.drives = drives(63));
        assert_eq!(
            refusal(|c| c.drives = drives(64)),
            "drives: 65 devices with the vsock device; at most 64 are possible"
        );
        accepted(|c| {
            c.drives = drives(64);
            c.vsock = None;
        });
    }

    #[test]
    fn vsock_limits() {
        fn vsock(c: &mut DomainConfig) -> &mut Vsock {
            c.vsock.as_mut().unwrap()
        }
        accepted(|c| vsock(c).uds_path = "s".repeat(96).into());
        assert_eq!(
            refusal(|c| vsock(c).uds_path = "s".repeat(97).into()),
            "vsock.uds_path: 97 bytes long; at most 96 are possible"
        );
        assert_eq!(refusal(|c| vsock(c).uds_path = "".into()), "vsock.uds_path: is empty");
        accepted(|c| vsock(c).guest_cid = u32::MAX - 1);
        for cid in [0, 2, u32::MAX] {
            assert_eq!(
                refusal(|c| vsock(c).guest_cid = cid),
                format!("vsock.guest_cid: {cid} is not between 3 and 4294967294")
            );
        }
    }

    #[test]
    fn serial_and_stop() {
        let file = |mode, path: Option<&str>| Serial { mode, serial_out_path: path.map(Into::into) };
        accepted(|c| c.serial = file(SerialMode::File, Some("log")));
        accepted(|c| c.serial = file(SerialMode::None, None));
        assert_eq!(
            refusal(|c| c.serial = file(SerialMode::File, None)),
            "serial.serial_out_path: is missing, and serial.mode is \"File\""
        );
        assert_eq!(
            refusal(|c| c.serial = file(SerialMode::File, Some(""))),
            "serial.serial_out_path: is empty"
        );
        assert_eq!(
            refusal(|c| c.serial = file(SerialMode::None, Some("log"))),
            "serial.serial_out_path: is given, but serial.mode is None"
        );
        accepted(|c| c.stop_timeout_ms = 0);
        assert!(refusal(|c| c.stop_timeout_ms = u64::MAX).starts_with("stop_timeout_ms: "));
    }

    #[test]
    fn domain_ids() {
        assert!(check_id("--id", "web-1_a").is_ok());
        assert_eq!(
            check_id("--id", "a.b").unwrap_err().to_string(),
            "--id: \"a.b\" may only have letters, digits, \"_\" and \"-\""
        );
    }
}
