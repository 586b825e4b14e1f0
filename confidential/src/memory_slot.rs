//! Memory slots of a VM that have nothing private.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes an address

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::platform::{LaunchError, MemorySlot};

/// Gives `vm` a range of memory.
pub(crate) fn add(vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: slot.guest_address,
        memory_size: slot.length,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the slot describes a mapping that stays as long as the VM may reach it, as its field says.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| LaunchError::new("KVM_SET_USER_MEMORY_REGION", slot.to_string(), error))
}

impl std::fmt::Display for MemorySlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, " of slot {} at {:#x}, {} bytes", self.slot, self.guest_address, self.length)
    }
}
