//! Mapping guest memory before a guest touches it: a fault that KVM makes itself is quicker than one of the guest, by an
//! exit and an entry for each page.
#![allow(unsafe_code)] // kvm-ioctls has no such call

use std::io;
use std::ops::Range;

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use rustix::ioctl::{Opcode, opcode};
use tracing::debug;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// Linux, `include/uapi/linux/kvm.h`.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVMIO as u8, 0xD5);

/// Maps whole pages of guest memory, for the sake of time alone: a host without `KVM_CAP_PRE_FAULT_MEMORY` (Linux 6.10, with
/// two-dimensional paging), or one that is out of memory, leaves the rest to the guest.
pub fn prefault(vcpu: &VcpuFd, pages: &Range<u64>) {
    let size = pages.end.saturating_sub(pages.start);
    let mut left = kvm_pre_fault_memory { gpa: pages.start, size, ..Default::default() };
    while left.size != 0 {
        // SAFETY: the call takes what it has done off `left`, and changes nothing else of ours.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY.into(), &mut left) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                debug!("KVM_PRE_FAULT_MEMORY at {:#x}: {error}", left.gpa);
                break;
            }
        }
    }
}
