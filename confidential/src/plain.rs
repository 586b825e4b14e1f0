//! The plain platform: an ordinary virtual machine. The host can read and
//! change everything in it, and nothing here pretends otherwise.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes an address

use cofferdam_api::status;
use kvm_bindings::{KVM_MEM_READONLY, KVM_X86_DEFAULT_VM, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::platform::{LaunchError, MemorySlot, Platform};

/// An ordinary virtual machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl Platform for Plain {
    fn kind(&self) -> status::Platform {
        status::Platform::Plain
    }

    fn protects(&self) -> bool {
        false
    }

    fn vm_type(&self) -> u64 {
        u64::from(KVM_X86_DEFAULT_VM)
    }

    fn prepare_vm(&self, _vm: &VmFd) -> Result<(), LaunchError> {
        Ok(())
    }

    fn add_memory(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.length,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the slot describes a mapping that stays as long as the VM may reach it, as its field says.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| {
            LaunchError::new(
                "KVM_SET_USER_MEMORY_REGION",
                format!(" of slot {} at {:#x}, {} bytes", slot.slot, slot.guest_address, slot.length),
                error,
            )
        })
    }

    fn remove_memory(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError> {
        let region = kvm_userspace_memory_region { slot: slot.slot, ..Default::default() };
        // SAFETY: a slot of no bytes describes no mapping.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| {
            let at = format!(" that removes slot {} at {:#x}", slot.slot, slot.guest_address);
            LaunchError::new("KVM_SET_USER_MEMORY_REGION", at, error)
        })
    }

    fn finish(&self, _vm: &VmFd, _vcpus: &[VcpuFd]) -> Result<(), LaunchError> {
        Ok(())
    }
}
