//! What can be said of a configuration without touching the host: ranges,
//! names, lengths. Messages name the field as it stands in the JSON.

mod checks;
mod error;
mod parts;

use std::collections::{HashMap, HashSet};
use std::path::Path;

pub use checks::check_id;
pub(crate) use checks::{check_path, check_range, check_text};
pub use error::ConfigError;

use crate::config::{Container, DomainConfig};
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::source::Source;

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

impl DomainConfig {
    /// Checks everything that can be checked without touching the host. The
    /// first field at fault is named.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.machine.validate()?;
        self.boot.validate()?;
        self.validate_command_line()?;
        self.validate_drives()?;
        self.validate_container()?;
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        self.confidential.validate(self.boot.mode())?;
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
            ("confidential.snp.id_block", self.confidential.snp.id_block.as_ref()),
            ("confidential.snp.id_auth", self.confidential.snp.id_auth.as_ref()),
            ("confidential.snp.certs", self.confidential.snp.certs.as_ref()),
            ("metrics.metrics_path", self.metrics.as_ref().map(|metrics| &metrics.metrics_path)),
        ];
        let named = named.into_iter().filter_map(|(field, path)| Some((field.to_owned(), path?.as_path())));
        let drives = self.drives.iter().enumerate();
        let drives = drives
            .map(|(index, drive)| (format!("drives[{index}].path_on_host"), drive.path_on_host.as_path()));
        let container = self.container.as_ref().map(Container::paths).unwrap_or_default();
        named.chain(drives).chain(container).collect()
    }

    /// The guest refuses drives that the manifest does not have.
    fn validate_container(&self) -> Result<(), ConfigError> {
        let Some(container) = &self.container else { return Ok(()) };
        let conflict = |field: &str, reason| Err(ConfigError::Conflict { field: field.to_owned(), reason });
        if self.boot.image_path.is_none() {
            return conflict("container", "needs an image: boot-source.image_path");
        }
        if !self.drives.is_empty() {
            return conflict("drives", "the domain of a container has its container's drives only");
        }
        container.validate()
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
        let count = self.device_count();
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

#[cfg(test)]
mod tests;
