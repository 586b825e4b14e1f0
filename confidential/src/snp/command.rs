//! Commands to the secure processor, which KVM passes on for a guest (Linux `Documentation/virt/kvm/x86/amd-memory-encryption.rst`).

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::from_mut;

use kvm_bindings::{
    kvm_sev_cmd, kvm_sev_init, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update, sev_cmd_id_KVM_SEV_INIT2, sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH,
    sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE,
};
use kvm_ioctls::VmFd;
use thiserror::Error;

use crate::platform::LaunchError;
use crate::sys::SignalsBlocked;

/// A command that was refused.
#[derive(Debug, Error)]
#[error("{error}{firmware}")]
pub struct CommandError {
    /// What KVM answered.
    #[source]
    pub error: kvm_ioctls::Error,
    /// What the secure processor answered to KVM.
    pub firmware: FirmwareStatus,
}

/// A status of the secure processor (SNP firmware ABI, "Status Codes"; Linux `include/uapi/linux/psp-sev.h`).
/// 0: it was not asked, or found nothing wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareStatus(pub u32);

/// Statuses by their number.
const STATUSES: [&str; 0x40] = [
    "SUCCESS",
    "INVALID_PLATFORM_STATE",
    "INVALID_GUEST_STATE",
    "INVALID_CONFIG",
    "INVALID_LENGTH",
    "ALREADY_OWNED",
    "INVALID_CERTIFICATE",
    "POLICY_FAILURE",
    "INACTIVE",
    "INVALID_ADDRESS",
    "BAD_SIGNATURE",
    "BAD_MEASUREMENT",
    "ASID_OWNED",
    "INVALID_ASID",
    "WBINVD_REQUIRED",
    "DF_FLUSH_REQUIRED",
    "INVALID_GUEST",
    "INVALID_COMMAND",
    "ACTIVE",
    "HWERROR_PLATFORM",
    "HWERROR_UNSAFE",
    "UNSUPPORTED",
    "INVALID_PARAM",
    "RESOURCE_LIMIT",
    "SECURE_DATA_INVALID",
    "INVALID_PAGE_SIZE",
    "INVALID_PAGE_STATE",
    "INVALID_MDATA_ENTRY",
    "INVALID_PAGE_OWNER",
    "AEAD_OFLOW",
    "",
    "RB_MODE_EXITED",
    "RMP_INIT_REQUIRED",
    "BAD_SVN",
    "BAD_VERSION",
    "SHUTDOWN_REQUIRED",
    "UPDATE_FAILED",
    "RESTORE_REQUIRED",
    "RMP_INITIALIZATION_FAILED",
    "INVALID_KEY",
    "SHUTDOWN_INCOMPLETE",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "INCORRECT_BUFFER_LENGTH",
    "EXPAND_BUFFER_LENGTH_REQUEST",
    "SPDM_REQUEST",
    "SPDM_ERROR",
    "",
    "ERR_IN_DEV_CONN",
    "INVALID_DEV_CTX",
    "INVALID_TDI_CTX",
    "INVALID_TDI",
    "RECLAIM_REQUIRED",
    "IN_USE",
    "INVALID_DEV_STATE",
    "INVALID_TDI_STATE",
    "DEV_CERT_CHANGED",
    "RESYNC_REQ",
    "RESPONSE_TOO_LARGE",
];

impl FirmwareStatus {
    /// A parameter is not one that the firmware takes: of a CPUID page, it then shows what it would take.
    pub const INVALID_PARAM: Self = Self(0x16);
    /// Linux' own: the firmware could not be called.
    const NO_FIRMWARE_CALL: Self = Self(u32::MAX);
}

impl fmt::Display for FirmwareStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NO_FIRMWARE_CALL {
            return f.write_str("; the secure processor could not be asked");
        }
        let name = usize::try_from(self.0).ok().and_then(|number| STATUSES.get(number));
        match name {
            Some(&"SUCCESS") => Ok(()),
            Some(&name) if !name.is_empty() => {
                write!(f, "; the secure processor says {name} ({:#x})", self.0)
            }
            _ => write!(f, "; the secure processor says {:#x}, which is unknown", self.0),
        }
    }
}

/// `KVM_SEV_SNP_ENABLE_REQ_CERTS` (Linux `arch/x86/include/uapi/asm/kvm.h`), which has no parameters.
pub struct EnableCertificateRequests;

/// What a command is called, and the type of its parameters.
pub trait Command {
    /// Its number among KVM's.
    const ID: u32;
    /// Its name.
    const NAME: &str;
}

macro_rules! commands {
    ($($parameters:ident: $id:expr, $name:literal;)*) => {
        $(impl Command for $parameters {
            const ID: u32 = $id;
            const NAME: &str = $name;
        })*
    };
}

commands! {
    kvm_sev_init: sev_cmd_id_KVM_SEV_INIT2, "KVM_SEV_INIT2";
    EnableCertificateRequests: 103, "KVM_SEV_SNP_ENABLE_REQ_CERTS";
    kvm_sev_snp_launch_start: sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, "KVM_SEV_SNP_LAUNCH_START";
    kvm_sev_snp_launch_update: sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE, "KVM_SEV_SNP_LAUNCH_UPDATE";
    kvm_sev_snp_launch_finish: sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH, "KVM_SEV_SNP_LAUNCH_FINISH";
}

/// Gives a command to `sev`, which is `/dev/sev`; `at` are words on what it is about (" of pages at 0x1000"), or none, for
/// a message. A signal would make an error of it that looks like the firmware's, so there are none meanwhile.
pub fn launch<C: Command>(vm: &VmFd, sev: &File, parameters: &mut C, at: &str) -> Result<(), LaunchError> {
    let mut command = kvm_sev_cmd {
        id: C::ID,
        data: from_mut(parameters) as u64,
        sev_fd: sev.as_raw_fd() as u32,
        ..Default::default()
    };
    let _blocked = SignalsBlocked::new();
    vm.encrypt_op_sev(&mut command).map_err(|error| LaunchError::Command {
        command: C::NAME,
        at: at.to_owned(),
        source: CommandError { error, firmware: FirmwareStatus(command.error) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_have_their_names() {
        let words = |code| FirmwareStatus(code).to_string();
        assert_eq!(words(0), "");
        assert_eq!(words(11), "; the secure processor says BAD_MEASUREMENT (0xb)");
        assert_eq!(words(0x16), "; the secure processor says INVALID_PARAM (0x16)");
        assert_eq!(words(0x27), "; the secure processor says INVALID_KEY (0x27)");
        assert_eq!(words(0x28), "; the secure processor says SHUTDOWN_INCOMPLETE (0x28)");
        assert_eq!(words(0x30), "; the secure processor says INCORRECT_BUFFER_LENGTH (0x30)");
        assert_eq!(words(0x3f), "; the secure processor says RESPONSE_TOO_LARGE (0x3f)");
        assert_eq!(words(0x1e), "; the secure processor says 0x1e, which is unknown");
        assert_eq!(words(0x1234), "; the secure processor says 0x1234, which is unknown");
        assert_eq!(words(u32::MAX), "; the secure processor could not be asked");
    }

    #[test]
    fn a_refusal_says_what_about_and_why() {
        let source =
            CommandError { error: kvm_ioctls::Error::new(libc::EIO), firmware: FirmwareStatus(0x1a) };
        let error = LaunchError::Command {
            command: kvm_sev_snp_launch_update::NAME,
            at: " of 2 measured pages at 0x10000".to_owned(),
            source,
        };
        assert_eq!(
            error.to_string(),
            "KVM_SEV_SNP_LAUNCH_UPDATE of 2 measured pages at 0x10000: Input/output error (os error 5); \
             the secure processor says INVALID_PAGE_STATE (0x1a)"
        );
        assert!(!error.is_of_image());
    }
}
