//! What a protection platform does differently, in the order a domain meets it.

use std::borrow::Cow;
use std::sync::Arc;

use cofferdam_api::status;
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{FileOffset, GuestMemoryMmap};

use crate::digest::Sha384Digest;
use crate::digest::vmsa::{Vmsa, VmsaError};
use crate::image::importer::{ImagePlatform, PageKind, PlatformInfo, SnpIdBlock, VcpuContext};
use crate::private_memory::{ConversionError, PrivateMemory};
use crate::snp::command::CommandError;

/// A step of a launch that was refused.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// By the host.
    #[error("{call}{at}: {source}")]
    Call {
        /// The KVM call.
        call: &'static str,
        /// What it was about (" of slot 1 at 0x100000000"), or nothing.
        at: String,
        /// What KVM answered.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// By the secure processor, or by KVM on its behalf.
    #[error("{command}{at}: {source}")]
    Command {
        /// The command.
        command: &'static str,
        /// What it was about, or nothing.
        at: String,
        /// What KVM and the secure processor answered.
        #[source]
        source: CommandError,
    },
    /// KVM says that it has handed over pages, but not which ones: it cannot be so.
    #[error(
        "KVM_SEV_SNP_LAUNCH_UPDATE of {length:#x} bytes at {gpa:#x}: KVM says that {left:#x} bytes at {now:#x} are left"
    )]
    Progress {
        /// Guest-physical address of the pages.
        gpa: u64,
        /// Their bytes.
        length: u64,
        /// Guest-physical address of those that are left.
        now: u64,
        /// Their bytes.
        left: u64,
    },
    /// By the secure processor, because of what is in the CPUID page.
    #[error("the secure processor refuses the CPUID page at {gpa:#x} twice: {first}; and then: {second}")]
    Cpuid {
        /// Guest-physical address of the page.
        gpa: u64,
        /// What it would change.
        first: String,
        /// What it would change in that.
        second: String,
    },
    /// A vCPU cannot be started as the image wants it.
    #[error("vCPU {index}: {source}")]
    Registers {
        /// Index of the vCPU.
        index: u16,
        /// What cannot be.
        source: VmsaError,
    },
    /// Memory of the image's pages could not be made private.
    #[error(transparent)]
    Conversion(#[from] ConversionError),
    /// The image has something that the platform does not have.
    #[error("{0}")]
    Unsupported(String),
    /// An item of the image was refused.
    #[error("{at}: {source}")]
    Item {
        /// Where it stands in the image.
        at: String,
        /// Why.
        source: Box<LaunchError>,
    },
}

impl LaunchError {
    /// `call` answered `source`.
    pub fn new(call: &'static str, at: impl Into<String>, source: kvm_ioctls::Error) -> Self {
        Self::Call { call, at: at.into(), source }
    }

    /// Whether the image is wrong, and nobody was asked.
    pub fn is_of_image(&self) -> bool {
        match self {
            Self::Registers { .. }
            | Self::Unsupported(_)
            | Self::Conversion(ConversionError::Range { .. }) => true,
            Self::Item { source, .. } => source.is_of_image(),
            Self::Call { .. }
            | Self::Command { .. }
            | Self::Progress { .. }
            | Self::Cpuid { .. }
            | Self::Conversion(ConversionError::Host { .. }) => false,
        }
    }
}

/// A range of guest memory and the host memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number of the slot.
    pub slot: u32,
    /// Guest-physical address.
    pub guest_address: u64,
    /// Length, bytes.
    pub length: u64,
    /// Address of the mapping in the monitor, which stays mapped as long as the VM may reach it.
    pub host_address: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
}

/// A range of RAM.
#[derive(Clone, Debug)]
pub struct Ram {
    /// Where it is, and its mapping: what of it the host shares.
    pub slot: MemorySlot,
    /// The memfd that is mapped there, if it is one.
    pub file: Option<FileOffset>,
}

/// Pages of an image, for RAM.
#[derive(Clone, Copy, Debug)]
pub struct LaunchPages<'a> {
    /// What they are: anything but shared.
    pub kind: PageKind,
    /// Guest-physical address of the first one.
    pub gpa: u64,
    /// Number of 4 KiB pages, all of them in RAM.
    pub pages: u64,
    /// Their content; zeroes follow.
    pub bytes: &'a [u8],
}

/// What can be said of a domain whose launch the platform has sealed. Nothing else says that a domain is protected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Whether the host is kept from reading and changing the domain.
    pub protected: bool,
    /// The guest policy, where the platform has one.
    pub policy: Option<u64>,
    /// The launch digest of what was launched, where the platform measures.
    pub digest: Option<Sha384Digest>,
}

/// A protection platform, and the launch of one domain on it.
pub trait Platform: Send {
    /// Its name.
    fn kind(&self) -> status::Platform;

    /// Which part of an image is for it.
    fn image_platform(&self) -> ImagePlatform;

    /// The machine type for `KVM_CREATE_VM`.
    fn vm_type(&self) -> u64;

    /// Whether guests are shown the host's memory encryption (CPUID leaf 0x8000_001F). One that sees it takes itself for
    /// an encrypted guest: Linux then reads an MSR that only such a guest has, at its first instructions.
    fn shows_memory_encryption(&self) -> bool;

    /// Enables what the platform needs on a new VM, before it has memory or vCPUs.
    fn prepare_vm(&mut self, vm: &VmFd) -> Result<(), LaunchError>;

    /// Gives the VM its RAM. Returns the domain's private memory, where the platform has such.
    fn add_memory(&mut self, vm: &VmFd, ram: &[Ram]) -> Result<Option<Arc<PrivateMemory>>, LaunchError>;

    /// Gives the VM a range of memory that it shares with the host.
    fn add_window(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError>;

    /// Begins to load an image, of which `info` tells.
    fn begin(&mut self, vm: &VmFd, info: &PlatformInfo) -> Result<(), LaunchError>;

    /// Puts pages of the image into RAM, whose shared side is `memory`. Returns what was changed in them, in words for whoever
    /// started the domain.
    fn load(
        &mut self,
        vm: &VmFd,
        memory: &GuestMemoryMmap,
        pages: &LaunchPages<'_>,
    ) -> Result<Option<String>, LaunchError>;

    /// Takes note of how a vCPU begins.
    fn set_context(&mut self, index: u16, context: &VcpuContext<'_>) -> Result<(), LaunchError>;

    /// What vCPU `index` begins with, where the platform measures that.
    fn save_area(&self, index: u16) -> Option<Cow<'_, Vmsa>>;

    /// Takes the image's ID block.
    fn set_id_block(&mut self, block: &SnpIdBlock) -> Result<(), LaunchError>;

    /// Seals the launch, after the last page and the last register are set.
    fn finish(&mut self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<Sealed, LaunchError>;
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_the_host_refuses_is_not_the_images_fault() {
        let (gpa, length) = (0x1000, 0x2000);
        let host = ConversionError::Host { call: "C", gpa, length, source: io::Error::from_raw_os_error(12) };
        assert!(!LaunchError::from(host).is_of_image());
        assert!(LaunchError::from(ConversionError::Range { gpa, length }).is_of_image());
    }
}
