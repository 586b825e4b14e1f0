//! Registers of a vCPU before it runs.
//!
//! The local APIC and the time stamp counter are left as KVM resets them: the
//! APIC disabled in software as the architecture has it, all counters started
//! together at zero.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use super::CpuTemplate;

/// `IA32_MISC_ENABLE` (Intel SDM vol. 4): fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE` (Intel SDM vol. 3A, 13.11.2.1): all memory is write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// A register that KVM did not take.
#[derive(Debug, Error)]
pub enum VcpuSetupError {
    /// A call failed.
    #[error("vCPU {vcpu}: {call}: {source}")]
    Call {
        /// Index of the vCPU.
        vcpu: u8,
        /// The KVM call.
        call: &'static str,
        /// What KVM answered.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused an MSR.
    #[error("vCPU {vcpu}: KVM_SET_MSRS refused MSR {msr:#x}")]
    Msr {
        /// Index of the vCPU.
        vcpu: u8,
        /// The MSR.
        msr: u32,
    },
    /// More CPUID or MSR entries than KVM takes.
    #[error("vCPU {vcpu}: {0} entries are more than KVM takes", entries)]
    TooMany {
        /// Index of the vCPU.
        vcpu: u8,
        /// What there are too many of.
        entries: &'static str,
    },
}

/// The registers with which vCPUs begin.
pub trait EntryState {
    /// Whether the vCPU with this index is given registers. The first one always is; by default the others are as KVM
    /// resets them.
    fn is_set(&self, index: u8) -> bool {
        index == 0
    }
    /// The general registers of such a vCPU; `None` leaves them as KVM resets them.
    fn regs(&self, index: u8) -> Option<kvm_regs>;
    /// Its system registers, out of those with which KVM resets it.
    fn sregs(&self, index: u8, base: kvm_sregs) -> kvm_sregs;
}

/// Sets CPUID and MSRs of vCPU `index`, and its registers if `entry` has some for it. CPUID comes first: KVM checks
/// registers against it. All but the first one wait for the guest to start them.
pub fn set_up(
    vcpu: &VcpuFd,
    index: u8,
    template: &mut CpuTemplate,
    entry: &dyn EntryState,
) -> Result<(), VcpuSetupError> {
    let call = |call| move |source| VcpuSetupError::Call { vcpu: index, call, source };
    vcpu.set_cpuid2(template.for_vcpu(index)).map_err(call("KVM_SET_CPUID2"))?;
    set_msrs(vcpu, index)?;
    if entry.is_set(index) {
        let sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        vcpu.set_sregs(&entry.sregs(index, sregs)).map_err(call("KVM_SET_SREGS"))?;
        if let Some(regs) = entry.regs(index) {
            vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        }
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd, index: u8) -> Result<(), VcpuSetupError> {
    let entries =
        [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)]
            .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| VcpuSetupError::TooMany { vcpu: index, entries: "MSR" })?;
    let done = vcpu.set_msrs(&msrs).map_err(|source| VcpuSetupError::Call {
        vcpu: index,
        call: "KVM_SET_MSRS",
        source,
    })?;
    match entries.get(done) {
        None => Ok(()),
        Some(refused) => Err(VcpuSetupError::Msr { vcpu: index, msr: refused.index }),
    }
}
