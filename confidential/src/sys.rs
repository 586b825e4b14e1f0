//! Calls of the kernel that kvm-ioctls does not have.
#![allow(unsafe_code)] // ioctl and pthread_sigmask take addresses

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{from_mut, null_mut};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, kvm_create_guest_memfd, kvm_pre_fault_memory, kvm_userspace_memory_region2,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::platform::{LaunchError, MemorySlot};

/// `_IOWR(0xAE, 0xD5, struct kvm_pre_fault_memory)`.
const KVM_PRE_FAULT_MEMORY: c_ulong = 0xC040_AED5;

fn ioctl<T>(fd: RawFd, request: c_ulong, data: &mut T) -> io::Result<()> {
    // SAFETY: each caller gives the type that the request reads and writes.
    match unsafe { libc::ioctl(fd, request as _, from_mut(data)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets KVM map guest memory before the guest touches it. Returns how much of it was not, bytes.
///
/// # Errors
/// Nothing was mapped.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> io::Result<u64> {
    let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &mut range)?;
    Ok(range.size)
}

/// A guest_memfd of `vm`, `size` bytes long.
pub fn guest_memfd(vm: &VmFd, size: u64) -> Result<File, LaunchError> {
    let create = kvm_create_guest_memfd { size, ..Default::default() };
    let fd = vm
        .create_guest_memfd(create)
        .map_err(|error| LaunchError::new("KVM_CREATE_GUEST_MEMFD", format!(" of {size} bytes"), error))?;
    // SAFETY: KVM made it just now, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Gives `vm` a slot of RAM whose private side is `private`.
pub fn add_private_slot(vm: &VmFd, slot: &MemorySlot, private: &File) -> Result<(), LaunchError> {
    let region = kvm_userspace_memory_region2 {
        slot: slot.slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: slot.guest_address,
        memory_size: slot.length,
        userspace_addr: slot.host_address,
        guest_memfd: private.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: the slot describes a mapping that stays as long as the VM may reach it, as its field says.
    unsafe { vm.set_user_memory_region2(region) }
        .map_err(|error| LaunchError::new("KVM_SET_USER_MEMORY_REGION2", slot.to_string(), error))
}

/// While it lives, this thread gets no signals.
pub struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    /// Blocks them.
    pub fn new() -> Self {
        let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: both are places for a set of signals; neither call can fail with these arguments, and both fill theirs in.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: a set that the kernel gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: i32) -> bool {
        let mut now = MaybeUninit::uninit();
        // SAFETY: asks for the set of this thread.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, null_mut(), now.as_mut_ptr());
            libc::sigismember(now.as_ptr(), signal) == 1
        }
    }

    #[test]
    fn signals_are_blocked_as_long_as_is_wanted() {
        assert!(!is_blocked(libc::SIGTERM));
        let blocked = SignalsBlocked::new();
        assert!(is_blocked(libc::SIGTERM) && is_blocked(libc::SIGRTMIN()));
        drop(blocked);
        assert!(!is_blocked(libc::SIGTERM));
    }
}
