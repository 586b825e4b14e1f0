//! What a protection platform does differently, in the order a domain meets it.

use std::sync::Arc;

use cofferdam_api::config::PlatformChoice;
use cofferdam_api::status;
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use crate::plain::Plain;

/// A step of a launch that the host refused.
#[derive(Debug, Error)]
#[error("{call}{at}: {source}")]
pub struct LaunchError {
    /// The KVM call.
    pub call: &'static str,
    /// What it was about (" of slot 1 at 0x100000000"), or nothing.
    pub at: String,
    /// What KVM answered.
    #[source]
    pub source: kvm_ioctls::Error,
}

impl LaunchError {
    /// `call` answered `source`.
    pub fn new(call: &'static str, at: impl Into<String>, source: kvm_ioctls::Error) -> Self {
        Self { call, at: at.into(), source }
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

/// The best platform that is allowed and that this monitor drives. Today there is one.
pub fn choose(choice: PlatformChoice) -> Arc<dyn Platform> {
    match choice {
        PlatformChoice::Auto | PlatformChoice::Plain => Arc::new(Plain),
    }
}

/// A protection platform.
pub trait Platform: Send + Sync {
    /// Its name.
    fn kind(&self) -> status::Platform;

    /// Whether it keeps the host from reading and changing a domain that was launched on it.
    fn protects(&self) -> bool;

    /// The machine type for `KVM_CREATE_VM`.
    fn vm_type(&self) -> u64;

    /// Enables what the platform needs on a new VM, before it has memory or vCPUs.
    fn prepare_vm(&self, vm: &VmFd) -> Result<(), LaunchError>;

    /// Gives the VM a range of RAM, or of memory that it shares with the host from the start.
    fn add_memory(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError>;

    /// Takes a range of memory from the VM, which may be running.
    fn remove_memory(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError>;

    /// Seals the launch, after the last page and the last register are set.
    fn finish(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<(), LaunchError>;
}
