//! The plain platform: an ordinary virtual machine. The host can read and
//! change everything in it, and nothing here pretends otherwise.

use std::borrow::Cow;
use std::sync::Arc;

use cofferdam_api::status;
use kvm_bindings::KVM_X86_DEFAULT_VM;
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::digest::vmsa::Vmsa;
use crate::image::importer::{ImagePlatform, PageKind, PlatformInfo, SnpIdBlock, VcpuContext};
use crate::memory_slot;
use crate::platform::{LaunchError, LaunchPages, MemorySlot, Platform, Ram, Sealed};
use crate::private_memory::PrivateMemory;

/// An ordinary virtual machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

fn unsupported(what: &str) -> LaunchError {
    LaunchError::Unsupported(format!("{what} in a plain domain"))
}

impl Platform for Plain {
    fn kind(&self) -> status::Platform {
        status::Platform::Plain
    }

    fn image_platform(&self) -> ImagePlatform {
        ImagePlatform::Plain
    }

    fn vm_type(&self) -> u64 {
        u64::from(KVM_X86_DEFAULT_VM)
    }

    fn shows_memory_encryption(&self) -> bool {
        false
    }

    fn prepare_vm(&mut self, _vm: &VmFd) -> Result<(), LaunchError> {
        Ok(())
    }

    fn add_memory(&mut self, vm: &VmFd, ram: &[Ram]) -> Result<Option<Arc<PrivateMemory>>, LaunchError> {
        ram.iter().try_for_each(|ram| memory_slot::add(vm, &ram.slot))?;
        Ok(None)
    }

    fn add_window(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError> {
        memory_slot::add(vm, slot)
    }

    fn begin(&mut self, _vm: &VmFd, _info: &PlatformInfo) -> Result<(), LaunchError> {
        Ok(())
    }

    /// Copies to RAM. It is fresh, so that zeros need not be written.
    fn load(
        &mut self,
        _vm: &VmFd,
        memory: &GuestMemoryMmap,
        pages: &LaunchPages<'_>,
    ) -> Result<Option<String>, LaunchError> {
        match pages.kind {
            PageKind::Measured | PageKind::Unmeasured | PageKind::Shared => {}
            PageKind::SnpSecrets | PageKind::SnpCpuid | PageKind::SnpCpuidXf => {
                return Err(unsupported("a page of SEV-SNP"));
            }
        }
        memory
            .write_slice(pages.bytes, GuestAddress(pages.gpa))
            .map_err(|error| LaunchError::Unsupported(format!("{:#x}: {error}", pages.gpa)))?;
        Ok(None)
    }

    fn set_context(&mut self, _index: u16, context: &VcpuContext<'_>) -> Result<(), LaunchError> {
        match context {
            VcpuContext::NativeX64(_) => Ok(()),
            VcpuContext::SnpVmsa { .. } | VcpuContext::Cca { .. } => {
                Err(unsupported("a vCPU of another platform"))
            }
        }
    }

    fn save_area(&self, _index: u16) -> Option<Cow<'_, Vmsa>> {
        None
    }

    fn set_id_block(&mut self, _block: &SnpIdBlock) -> Result<(), LaunchError> {
        Err(unsupported("an ID block of SEV-SNP"))
    }

    fn finish(&mut self, _vm: &VmFd, _vcpus: &[VcpuFd]) -> Result<Sealed, LaunchError> {
        Ok(Sealed::default())
    }
}
