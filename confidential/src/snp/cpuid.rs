//! The CPUID page of an SNP guest (SNP firmware ABI, "CPUID Page"): the values that the host says
//! CPUID has, which the secure processor checks against what the processor can do. The
//! guest believes no others.

use cofferdam_firmware::layout::PAGE_SIZE;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::AlignedPage;
use super::command::FirmwareStatus;
use crate::digest::Page;
use crate::platform::LaunchError;

/// Most entries of a page.
pub const MAX_ENTRIES: usize = 64;

/// A CPUID page.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct CpuidPage {
    count: u32,
    reserved: [u32; 3],
    entries: [CpuidEntry; MAX_ENTRIES],
    rest: [u8; PAGE_SIZE as usize - 16 - MAX_ENTRIES * size_of::<CpuidEntry>()],
}

/// One function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct CpuidEntry {
    eax_in: u32,
    ecx_in: u32,
    xcr0_in: u64,
    xss_in: u64,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
    reserved: u64,
}

/// More functions than a page has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{0} CPUID functions are more than the {MAX_ENTRIES} of an SNP guest's CPUID page")]
pub struct TooManyEntries(usize);

/// Leaf 1, ECX: the local APIC timer's TSC deadline mode, which the firmware does not let a host claim.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: OSXSAVE, which follows the guest's own CR4.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 7, EBX: IA32_TSC_ADJUST, which KVM emulates and the processor does not have.
const TSC_ADJUST: u32 = 1 << 1;
/// Leaf 0x8000_0008, EBX: VIRT_SSBD, as above.
const VIRT_SSBD: u32 = 1 << 25;
/// Leaf 0x8000_0021, EAX: no SMM_CTL MSR, as above.
const NO_SMM_CTL: u32 = 1 << 9;
/// Size of an XSAVE area with x87 and SSE state, which all have.
const LEAST_XSAVE: u32 = 0x240;

impl CpuidPage {
    /// The page with what KVM tells a vCPU, but for what the firmware takes from no host. The values that differ from one
    /// vCPU to another are asked of KVM by the guest.
    pub fn new(cpuid: &[kvm_cpuid_entry2]) -> Result<Self, TooManyEntries> {
        let mut page = Self::new_zeroed();
        let entries = cpuid.iter().map(entry).filter(|entry| {
            let CpuidEntry { eax, ebx, ecx, edx, .. } = entry;
            eax | ebx | ecx | edx != 0
        });
        let mut count = 0_usize;
        for entry in entries {
            if let Some(place) = page.entries.get_mut(count) {
                *place = entry;
            }
            count = count.saturating_add(1);
        }
        if count > MAX_ENTRIES {
            return Err(TooManyEntries(count));
        }
        page.count = count as u32;
        Ok(page)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// How `other`, which has what the firmware would accept, differs from this page, if it does; one clause per value.
    pub fn differences(&self, other: &Self) -> Option<String> {
        let mut text = String::new();
        for (given, accepted) in self.entries.iter().zip(&other.entries) {
            let (leaf, subleaf) = (given.eax_in, given.ecx_in);
            let values = [
                ("EAX", given.eax, accepted.eax),
                ("EBX", given.ebx, accepted.ebx),
                ("ECX", given.ecx, accepted.ecx),
                ("EDX", given.edx, accepted.edx),
            ];
            for (register, given, accepted) in values {
                if given != accepted {
                    text.push_str(&format!(
                        "leaf {leaf:#x}, subleaf {subleaf:#x}, {register}: {given:#x} given, {accepted:#x} accepted; "
                    ));
                }
            }
        }
        text.strip_suffix("; ").map(str::to_owned)
    }
}

impl From<&Page> for CpuidPage {
    fn from(page: &Page) -> Self {
        zerocopy::transmute!(*page)
    }
}

/// Hands the page for `gpa` over by `command`. Where the firmware takes some value from no host, it leaves the page with one that it
/// would take, and gets that, once. Returns what it wanted changed, in words.
pub(super) fn hand_over(
    gpa: u64,
    page: &mut AlignedPage,
    mut command: impl FnMut(&mut AlignedPage) -> Result<(), LaunchError>,
) -> Result<Option<String>, LaunchError> {
    let given = CpuidPage::from(&page.0);
    let refused = match command(page) {
        Err(error) if is_invalid_parameter(&error) => error,
        other => return other.map(|()| None),
    };
    let accepted = CpuidPage::from(&page.0);
    // Of what it finds wrong in the page as a whole it leaves nothing.
    let Some(first) = given.differences(&accepted) else { return Err(refused) };
    match command(page) {
        Ok(()) => Ok(Some(format!("the secure processor changed the CPUID page at {gpa:#x}: {first}"))),
        Err(error) if is_invalid_parameter(&error) => {
            let second = accepted.differences(&CpuidPage::from(&page.0));
            let second = second.unwrap_or_else(|| "it does not say why".to_owned());
            Err(LaunchError::Cpuid { gpa, first, second })
        }
        Err(error) => Err(error),
    }
}

fn is_invalid_parameter(error: &LaunchError) -> bool {
    matches!(error, LaunchError::Command { source, .. } if source.firmware == FirmwareStatus::INVALID_PARAM)
}

fn entry(from: &kvm_cpuid_entry2) -> CpuidEntry {
    let has_subleaf = from.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    let mut entry = CpuidEntry {
        eax_in: from.function,
        ecx_in: if has_subleaf { from.index } else { 0 },
        eax: from.eax,
        ebx: from.ebx,
        ecx: from.ecx,
        edx: from.edx,
        ..CpuidEntry::default()
    };
    match (entry.eax_in, entry.ecx_in) {
        (1, _) => entry.ecx &= !(TSC_DEADLINE | OSXSAVE),
        (7, 0) => {
            entry.ebx &= !TSC_ADJUST;
            // Mitigations of which the firmware lets a host claim none.
            entry.edx = 0;
        }
        (0xD, 0 | 1) => {
            // The size for the state that XCR0 has at reset; a guest computes others from the further subleaves.
            entry.ebx = LEAST_XSAVE;
            entry.xcr0_in = 1;
        }
        (0x8000_0008, _) => entry.ebx &= !VIRT_SSBD,
        (0x8000_0021, _) => {
            entry.eax &= !NO_SMM_CTL;
            entry.ecx = 0;
        }
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snp::command::CommandError;

    fn leaf(function: u32, index: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: value,
            ebx: value,
            ecx: value,
            edx: value,
            ..Default::default()
        }
    }

    #[test]
    fn layout_of_the_specification() {
        assert_eq!(size_of::<CpuidPage>(), 4096);
        assert_eq!(size_of::<CpuidEntry>(), 48);
        assert_eq!(std::mem::offset_of!(CpuidPage, entries), 16);
        assert_eq!(std::mem::offset_of!(CpuidEntry, eax), 24);
        let page = CpuidPage::new(&[leaf(0xB, 1, 5)]).unwrap();
        assert_eq!(page.as_bytes()[..4], [1, 0, 0, 0]);
        assert_eq!(page.as_bytes()[16..24], [0xB, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn what_the_firmware_takes_from_no_host_is_left_out() {
        let all = [(1, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1), (0xD, 2), (0x8000_0008, 0), (0x8000_0021, 0)];
        let page = CpuidPage::new(&all.map(|(function, index)| leaf(function, index, u32::MAX))).unwrap();
        let values = |number: usize| {
            let CpuidEntry { eax, ebx, ecx, edx, .. } = page.entries[number];
            (eax, ebx, ecx, edx)
        };
        let all = u32::MAX;
        assert_eq!(values(0), (all, all, !(1 << 24 | 1 << 27), all));
        assert_eq!(values(1), (all, !2, all, 0));
        assert_eq!(values(2), (all, all, all, all));
        assert_eq!([values(3), values(4)], [(all, 0x240, all, all); 2]);
        assert_eq!((page.entries[3].xcr0_in, page.entries[5].xcr0_in), (1, 0));
        assert_eq!(values(5), (all, all, all, all));
        assert_eq!(values(6), (all, !(1 << 25), all, all));
        assert_eq!(values(7), (!(1 << 9), all, 0, all));
    }

    #[test]
    fn empty_functions_are_dropped_and_others_must_fit() {
        let mut entries: Vec<_> = (0..64).map(|index| leaf(4, index, index)).collect();
        assert_eq!(CpuidPage::new(&entries).unwrap().count, 63);
        entries.extend([leaf(5, 0, 1), leaf(6, 0, 1)]);
        assert_eq!(CpuidPage::new(&entries), Err(TooManyEntries(65)));
        let no_index = kvm_cpuid_entry2 { flags: 0, ..leaf(1, 9, 1) };
        assert_eq!(CpuidPage::new(&[no_index]).unwrap().entries[0].ecx_in, 0);
    }

    #[test]
    fn what_is_refused_is_shown_with_what_is_accepted() {
        let given = CpuidPage::new(&[leaf(1, 0, 6), leaf(0x8000_0008, 0, 3)]).unwrap();
        let mut accepted = given.clone();
        assert_eq!(given.differences(&accepted), None);
        accepted.entries[1].ebx = 1;
        accepted.entries[0].edx = 0;
        assert_eq!(
            given.differences(&accepted).unwrap(),
            "leaf 0x1, subleaf 0x0, EDX: 0x6 given, 0x0 accepted; \
             leaf 0x80000008, subleaf 0x0, EBX: 0x3 given, 0x1 accepted"
        );
    }

    /// A firmware that takes for leaf 4, EAX, none of `refused`, and has the next of them accepted, as it says.
    fn handed_over(refused: &[u32]) -> (Result<Option<String>, String>, u32) {
        let mut page = AlignedPage([0; PAGE_SIZE as usize]);
        page.0 = zerocopy::transmute!(CpuidPage::new(&[leaf(4, 0, 9)]).unwrap());
        let mut given = 0;
        let done = hand_over(0x7000, &mut page, |page| {
            given += 1;
            let mut table = CpuidPage::from(&page.0);
            let Some(at) = refused.iter().position(|value| *value == table.entries[0].eax) else {
                return Ok(());
            };
            table.entries[0].eax = refused.get(at + 1).copied().unwrap_or(0);
            page.0 = zerocopy::transmute!(table);
            let source =
                CommandError { error: kvm_ioctls::Error::new(libc::EIO), firmware: FirmwareStatus(0x16) };
            Err(LaunchError::Command { command: "UPDATE", at: String::new(), source })
        });
        (done.map_err(|error| error.to_string()), given)
    }

    #[test]
    fn what_the_firmware_would_take_it_is_given_once() {
        assert_eq!(handed_over(&[]), (Ok(None), 1));
        let change = "the secure processor changed the CPUID page at 0x7000: leaf 0x4, subleaf 0x0, EAX: 0x9 given, 0x0 accepted";
        assert_eq!(handed_over(&[9]), (Ok(Some(change.to_owned())), 2));
        let twice = "the secure processor refuses the CPUID page at 0x7000 twice: leaf 0x4, subleaf 0x0, EAX: 0x9 given, \
                     0x8 accepted; and then: leaf 0x4, subleaf 0x0, EAX: 0x8 given, 0x7 accepted";
        assert_eq!(handed_over(&[9, 8, 7]), (Err(twice.to_owned()), 2));
        let silent = handed_over(&[9, 8, 8]);
        assert_eq!(silent.1, 2);
        assert!(silent.0.unwrap_err().ends_with("; and then: it does not say why"));
        // Nothing to give instead.
        let refused = (
            Err("UPDATE: Input/output error (os error 5); the secure processor says INVALID_PARAM (0x16)"
                .to_owned()),
            1,
        );
        assert_eq!(handed_over(&[9, 9]), refused);
    }

    #[test]
    fn other_refusals_are_final() {
        let mut page = AlignedPage([0; PAGE_SIZE as usize]);
        let mut given = 0;
        let done = hand_over(0, &mut page, |page| {
            given += 1;
            // EAX of the first function.
            page.0[16 + 24] = 1;
            let source =
                CommandError { error: kvm_ioctls::Error::new(libc::EIO), firmware: FirmwareStatus(0x1a) };
            Err(LaunchError::Command { command: "UPDATE", at: String::new(), source })
        });
        assert!(done.unwrap_err().to_string().contains("INVALID_PAGE_STATE"));
        assert_eq!(given, 1);
    }
}
