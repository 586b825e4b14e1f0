//! CPUID of a vCPU: what KVM supports, with the topology of this domain.
//!
//! The topology is one socket with one thread per core. Sources: Intel SDM
//! vol. 2A "CPUID"; AMD APM vol. 3, appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// Leaf 1, ECX: the local APIC timer has a TSC deadline mode. Not part of what KVM lists, but of what its
/// in-kernel local APIC does where `KVM_CAP_TSC_DEADLINE_TIMER` says so.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the APIC ids field of leaf 1 is meaningful.
const HYPERTHREADING: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX, AMD: the core count of leaf 0x8000_0008 is to be used, not threads.
const AMD_LEGACY_MULTICORE: u32 = 1 << 1;
/// Leaf 0, EBX, EDX and ECX of the processors with AMD's meaning of leaves 0x8000_0001 and 0x8000_0008.
const AMD_VENDORS: [&[u8; 12]; 2] = [b"AuthenticAMD", b"HygonGenuine"];

/// SEV and its like: AMD APM vol. 3, E.4.17.
const MEMORY_ENCRYPTION: u32 = 0x8000_001F;

/// Leaf 7, EBX: SHA1RNDS4, SHA256RNDS2 and their neighbours.
const SHA: u32 = 1 << 29;

/// Subleaves of leaf 0xB: threads, cores, the end.
const TOPOLOGY_LEVELS: u32 = 3;
/// Level types of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Why there is no CPUID for a domain.
#[derive(Debug, Error)]
pub enum CpuidError {
    /// KVM does not say what it supports.
    #[error("KVM_GET_SUPPORTED_CPUID: {0}")]
    Supported(#[from] kvm_ioctls::Error),
    /// More entries than KVM takes.
    #[error("KVM_SET_CPUID2 takes no more than {KVM_MAX_CPUID_ENTRIES} entries")]
    TooMany,
}

/// What the vCPUs of a domain have in common.
pub struct CpuTemplate {
    /// In KVM's own buffer, which each vCPU makes its own in turn: copies would be noticed in a start.
    cpuid: CpuId,
    domain: Domain,
}

/// What is adjusted to.
#[derive(Clone, Copy)]
struct Domain {
    count: u8,
    amd: bool,
    tsc_deadline: bool,
}

impl CpuTemplate {
    /// What KVM supports on this host, for a domain of `count` vCPUs.
    pub fn new(kvm: &Kvm, count: u8) -> Result<Self, CpuidError> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Self::of(supported, count, tsc_deadline)
    }

    fn of(mut cpuid: CpuId, count: u8, tsc_deadline: bool) -> Result<Self, CpuidError> {
        let amd = cpuid.as_slice().iter().find(|entry| entry.function == 0).is_some_and(|entry| {
            let vendor = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
            AMD_VENDORS.iter().any(|name| name[..] == *vendor.as_flattened())
        });
        let length = cpuid.as_slice().len();
        cpuid.retain(|entry| !matches!(entry.function, 0xB | 0x1F));
        if cpuid.as_slice().len() != length {
            for index in 0..TOPOLOGY_LEVELS {
                let flags = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
                let level = kvm_cpuid_entry2 { function: 0xB, index, flags, ..Default::default() };
                cpuid.push(level).map_err(|_| CpuidError::TooMany)?;
            }
        }
        Ok(Self { cpuid, domain: Domain { count, amd, tsc_deadline } })
    }

    /// Hides the host's memory encryption, which KVM lists on every host with SEV, from guests without it.
    pub fn hide_memory_encryption(&mut self) {
        self.cpuid.retain(|entry| entry.function != MEMORY_ENCRYPTION);
    }

    /// Whether KVM offers the SHA instructions.
    pub fn has_sha(&self) -> bool {
        let mut entries = self.cpuid.as_slice().iter();
        entries.any(|entry| (entry.function, entry.index) == (7, 0) && entry.ebx & SHA != 0)
    }

    /// CPUID of the vCPU with APIC id `id`.
    pub fn for_vcpu(&mut self, id: u8) -> &CpuId {
        for entry in self.cpuid.as_mut_slice() {
            self.domain.adjust(entry, id);
        }
        &self.cpuid
    }
}

impl Domain {
    /// Bits that an APIC id needs.
    fn id_bits(&self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }

    fn adjust(&self, entry: &mut kvm_cpuid_entry2, id: u8) {
        let count = u32::from(self.count);
        // Many fields hold one less than a number.
        let others = count.saturating_sub(1);
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xFFFF | u32::from(id) << 24 | (1 << self.id_bits()) << 16;
                entry.ecx |= HYPERVISOR;
                entry.ecx =
                    if self.tsc_deadline { entry.ecx | TSC_DEADLINE } else { entry.ecx & !TSC_DEADLINE };
                entry.edx = if count > 1 { entry.edx | HYPERTHREADING } else { entry.edx & !HYPERTHREADING };
            }
            // Deterministic cache parameters, Intel's and AMD's.
            (4 | 0x8000_001D, _) if entry.eax & 0x1F != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { others } else { 0 };
                entry.eax = entry.eax & 0x3FFF | sharing << 14;
                if entry.function == 4 {
                    entry.eax |= others.min(63) << 26;
                }
            }
            // No performance counters: a domain has no use for the host's.
            (0xA, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0001, _) if self.amd && count > 1 => entry.ecx |= AMD_LEGACY_MULTICORE,
            (0x8000_0001, _) => entry.ecx &= !AMD_LEGACY_MULTICORE,
            (0x8000_0008, _) if self.amd => entry.ecx = self.id_bits() << 12 | others,
            // Thread level, core level, end.
            (0xB, level) => {
                (entry.eax, entry.ebx, entry.ecx) = match level {
                    0 => (0, 1, LEVEL_THREAD << 8),
                    1 => (self.id_bits(), count, LEVEL_CORE << 8),
                    _ => (0, 0, 0),
                };
                entry.ecx |= level;
                entry.edx = u32::from(id);
            }
            // Extended APIC id; core id, one thread per core; node 0 of 1.
            (0x8000_001E, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (u32::from(id), u32::from(id), 0, 0);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ..Default::default() }
    }

    fn template(count: u8) -> CpuTemplate {
        template_of(b"AuthenticAMD", count)
    }

    fn template_of(vendor: &[u8; 12], count: u8) -> CpuTemplate {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        // Cache leaves: level 1 data, level 3 unified.
        let entries = vec![
            kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..entry(0, 0, 0x1F) },
            entry(1, 0, 0),
            entry(4, 0, 1 | 1 << 5),
            entry(4, 3, 3 | 3 << 5),
            entry(0xA, 0, 7),
            entry(0xB, 0, 9),
            entry(0x1F, 0, 9),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0x3030),
            entry(0x8000_001E, 0, 0),
            entry(MEMORY_ENCRYPTION, 0, 0xF),
        ];
        CpuTemplate::of(CpuId::from_entries(&entries).unwrap(), count, true).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn topology_says_one_thread_per_core() {
        for count in [1, 2, 3, 8, 32] {
            let mut template = template(count);
            for id in 0..count {
                let cpuid = template.for_vcpu(id);
                let bits = u32::from(count).next_power_of_two().trailing_zeros();
                let n = u32::from(count);
                assert_eq!(leaf(cpuid, 1, 0).ebx >> 24, u32::from(id));
                assert_eq!(leaf(cpuid, 1, 0).edx & HYPERTHREADING != 0, count > 1);
                assert_eq!(leaf(cpuid, 0xB, 0).ebx, 1);
                assert_eq!(leaf(cpuid, 0xB, 0).eax, 0);
                assert_eq!((leaf(cpuid, 0xB, 1).eax, leaf(cpuid, 0xB, 1).ebx), (bits, n));
                assert_eq!(leaf(cpuid, 0xB, 1).edx, u32::from(id));
                assert_eq!(leaf(cpuid, 0xB, 2).ecx >> 8, 0);
                assert_eq!(leaf(cpuid, 4, 0).eax >> 14 & 0xFFF, 0, "level 1 is private");
                assert_eq!(leaf(cpuid, 4, 3).eax >> 14 & 0xFFF, n - 1, "level 3 is shared by all");
                assert_eq!(leaf(cpuid, 4, 0).eax >> 26, n - 1);
                assert_eq!(leaf(cpuid, 0x8000_0008, 0).ecx, bits << 12 | (n - 1));
                assert_eq!(leaf(cpuid, 0x8000_001E, 0).ebx, u32::from(id));
            }
        }
    }

    #[test]
    fn what_only_amd_defines_is_left_alone_elsewhere() {
        for (vendor, is_amd) in [(b"AuthenticAMD", true), (b"HygonGenuine", true), (b"GenuineIntel", false)] {
            let mut template = template_of(vendor, 4);
            let cpuid = template.for_vcpu(0);
            assert_eq!(leaf(cpuid, 0x8000_0001, 0).ecx & AMD_LEGACY_MULTICORE != 0, is_amd);
            assert_eq!(leaf(cpuid, 0x8000_0008, 0).ecx != 0, is_amd);
        }
    }

    #[test]
    fn the_deadline_timer_is_there_only_if_kvm_has_it() {
        for has_it in [true, false] {
            let entries = vec![kvm_cpuid_entry2 { ecx: TSC_DEADLINE, ..entry(1, 0, 0) }];
            let mut template = CpuTemplate::of(CpuId::from_entries(&entries).unwrap(), 1, has_it).unwrap();
            let cpuid = template.for_vcpu(0);
            assert_eq!(leaf(cpuid, 1, 0).ecx & TSC_DEADLINE != 0, has_it);
        }
    }

    #[test]
    fn memory_encryption_is_hidden_on_demand() {
        let mut template = template(1);
        let is_there = |cpuid: &CpuId| cpuid.as_slice().iter().any(|e| e.function == MEMORY_ENCRYPTION);
        assert!(is_there(template.for_vcpu(0)));
        template.hide_memory_encryption();
        assert!(!is_there(template.for_vcpu(0)));
    }

    #[test]
    fn stale_topology_and_counters_are_gone() {
        let mut template = template(2);
        let cpuid = template.for_vcpu(0);
        assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1F));
        assert_eq!(cpuid.as_slice().iter().filter(|e| e.function == 0xB).count(), 3);
        assert_eq!(leaf(cpuid, 0xA, 0).eax, 0);
        assert_eq!(leaf(cpuid, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
    }
}
