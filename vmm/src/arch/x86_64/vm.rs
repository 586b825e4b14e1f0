//! What an x86-64 VM needs before it has vCPUs.

use cofferdam_firmware::layout;
use kvm_ioctls::VmFd;
use thiserror::Error;

/// A setting of the VM that KVM did not take.
#[derive(Debug, Error)]
#[error("{call} to {address:#x}: {source}")]
pub struct VmSetupError {
    call: &'static str,
    address: u64,
    #[source]
    source: kvm_ioctls::Error,
}

/// Gives KVM the guest-physical pages that it needs on Intel processors without "unrestricted guest" to run
/// code in real mode or without paging. It takes less than a microsecond, and does nothing where the processor
/// does not need it. To be called before any vCPU is created.
pub fn set_up_vm(vm: &VmFd) -> Result<(), VmSetupError> {
    let failed = |call, address| move |source| VmSetupError { call, address, source };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR", layout::KVM_IDENTITY_MAP))?;
    // Below 4 GiB, so it fits.
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(failed("KVM_SET_TSS_ADDR", layout::KVM_TSS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn pages_are_taken_before_the_first_vcpu_and_not_after() {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        set_up_vm(&vm).unwrap();
        let _vcpu = vm.create_vcpu(0).unwrap();
        let message = set_up_vm(&vm).unwrap_err().to_string();
        assert!(message.starts_with("KVM_SET_IDENTITY_MAP_ADDR to 0xfffbc000: "), "{message}");
    }
}
