//! Calls of the kernel that kvm-ioctls does not have.
#![allow(unsafe_code)] // ioctl and pthread_sigmask take addresses

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{from_mut, null_mut};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_X86_GRP_SEV, kvm_create_guest_memfd, kvm_device_attr, kvm_pre_fault_memory,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::platform::{LaunchError, MemorySlot};

/// `_IOWR(0xAE, 0xD5, struct kvm_pre_fault_memory)`.
const KVM_PRE_FAULT_MEMORY: c_ulong = 0xC040_AED5;
/// `_IOW(0xAE, 0xE2, struct kvm_device_attr)`.
const KVM_GET_DEVICE_ATTR: c_ulong = 0x4018_AEE2;
/// `_IOWR('S', 0, struct sev_issue_cmd)` (Linux `include/uapi/linux/psp-sev.h`).
const SEV_ISSUE_CMD: c_ulong = 0xC010_5300;
/// A command of it, for [`SnpStatus`].
const SNP_PLATFORM_STATUS: u32 = 9;

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

/// What KVM says of SEV guests under the number `attribute` (`KVM_X86_GRP_SEV`; Linux `arch/x86/include/uapi/asm/kvm.h`).
pub fn sev_attribute(kvm: &Kvm, attribute: u64) -> io::Result<u64> {
    let mut value = 0_u64;
    let addr = from_mut(&mut value) as u64;
    let mut query = kvm_device_attr { group: KVM_X86_GRP_SEV, attr: attribute, addr, ..Default::default() };
    ioctl(kvm.as_raw_fd(), KVM_GET_DEVICE_ATTR, &mut query)?;
    Ok(value)
}

/// `struct sev_user_data_snp_status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub struct SnpStatus {
    /// Version of the firmware's interface.
    pub api_major: u8,
    /// The same.
    pub api_minor: u8,
    /// 1 once it is initialised.
    pub state: u8,
    /// Bit 0: the reverse map table is.
    pub rmp: u8,
    /// Build of the firmware.
    pub build: u32,
    /// Bits: [`Self::CIPHERTEXT_HIDING`] and others.
    pub flags: u32,
    /// Number of guests.
    pub guests: u32,
    /// Version of the trusted computing base that runs.
    pub current_tcb: u64,
    /// That which attestation reports have.
    pub reported_tcb: u64,
}

impl SnpStatus {
    /// Of the flags: the host reads no ciphertext either.
    pub const CIPHERTEXT_HIDING: u32 = 1 << 6;
}

/// `struct sev_issue_cmd`.
#[repr(C, packed)]
struct SevIssueCommand {
    command: u32,
    data: u64,
    error: u32,
}

/// What the secure processor behind `sev`, which is `/dev/sev`, says of itself.
pub fn snp_status(sev: &File) -> io::Result<SnpStatus> {
    let mut status = SnpStatus::default();
    let data = from_mut(&mut status) as u64;
    let mut issue = SevIssueCommand { command: SNP_PLATFORM_STATUS, data, error: 0 };
    ioctl(sev.as_raw_fd(), SEV_ISSUE_CMD, &mut issue)?;
    Ok(status)
}

/// Locks `file` as long as what is returned lives, against whoever locks it for himself alone by `fcntl`. `None`: somebody
/// does.
pub fn lock_shared(file: &File) -> io::Result<Option<SharedLock<'_>>> {
    match set_lock(file, libc::F_RDLCK) {
        Ok(()) => Ok(Some(SharedLock(file))),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file that is locked.
pub struct SharedLock<'a>(&'a File);

impl Drop for SharedLock<'_> {
    fn drop(&mut self) {
        // It cannot fail for a lock that is held; and with the file it ends anyway.
        let _ = set_lock(self.0, libc::F_UNLCK);
    }
}

/// Locks `file` for its open file description alone, as who changes it does.
#[cfg(test)]
pub fn lock_alone(file: &File) -> bool {
    set_lock(file, libc::F_WRLCK).is_ok()
}

/// Locks or unlocks all of a file, for its open file description: threads and `dup`s of this process share it.
fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    let lock = libc::flock {
        // Each of these is a small number.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the kernel reads one such structure.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
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
    fn layout_of_the_kernels_headers() {
        assert_eq!((size_of::<SnpStatus>(), size_of::<SevIssueCommand>()), (32, 16));
        assert_eq!(std::mem::offset_of!(SnpStatus, guests), 12);
    }

    #[test]
    fn a_file_is_shared_unless_somebody_has_it_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (file.reopen().unwrap(), file.reopen().unwrap());
        let lock = lock_shared(&ours).unwrap().unwrap();
        assert!(lock_shared(&theirs).unwrap().is_some());
        assert!(!lock_alone(&theirs));
        drop(lock);
        assert!(lock_alone(&theirs));
        assert!(lock_shared(&ours).unwrap().is_none());
        set_lock(&theirs, libc::F_UNLCK).unwrap();
        assert!(lock_shared(&ours).unwrap().is_some());
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
