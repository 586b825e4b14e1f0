//! Each part of a configuration, looked at by itself.

use std::os::unix::ffi::OsStrExt;

use super::checks::{check_id, check_path, check_range, check_text};
use super::{ConfigError, GUEST_CID, MAX_UDS_PATH, MEM_SIZE_MIB, VCPU_COUNT};
use crate::config::{BootMode, BootProtocol, BootSource, Drive, MachineConfig, Serial, SerialMode, Vsock};

impl MachineConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        check_range("machine-config.vcpu_count", self.vcpu_count.into(), VCPU_COUNT)?;
        check_range("machine-config.mem_size_mib", self.mem_size_mib, MEM_SIZE_MIB)
    }
}

impl BootSource {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self, index: usize) -> Result<(), ConfigError> {
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
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        check_range("vsock.guest_cid", self.guest_cid.into(), GUEST_CID)?;
        check_path("vsock.uds_path", &self.uds_path)?;
        check_text("vsock.uds_path", self.uds_path.as_os_str().as_bytes(), MAX_UDS_PATH)
    }
}

impl Serial {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        match (self.mode, &self.serial_out_path) {
            (SerialMode::File, Some(path)) => check_path("serial.serial_out_path", path),
            (SerialMode::File, None) => Err(ConfigError::SerialPathMissing),
            (_, None) => Ok(()),
            (mode, Some(_)) => Err(ConfigError::SerialPathUnused { mode }),
        }
    }
}
