//! The launch digest of an SEV-SNP guest.
//!
//! The secure processor starts from 48 zero bytes and, for each 4 KiB page that
//! the launch hands it, replaces the digest by the SHA-384 of a PAGE_INFO
//! record that holds the digest so far (*SEV Secure Nested Paging Firmware ABI
//! Specification*, 56860 revision 1.55, SNP_LAUNCH_UPDATE, "PAGE_INFO Structure").
//! KVM hands over the pages in the order of the monitor's calls and then, while
//! it finishes the launch, one save area for each virtual CPU in the order of
//! their indices: so there is one digest for each number of virtual CPUs.

use std::collections::BTreeMap;

use sha2::{Digest, Sha384};
use zerocopy::IntoBytes;

use super::vmsa::{Vmsa, VmsaError};
use super::{Page, Sha384Digest};
use crate::image::importer::{
    ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, PlatformInfo, SnpIdBlock, VcpuContext,
};

/// Where the secure processor's record says that a save area lies, whatever the
/// virtual CPU: KVM's constant.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// Bytes of a PAGE_INFO record.
const PAGE_INFO_SIZE: u16 = 0x70;

/// A page as the secure processor is told of it.
#[derive(Clone, Copy, Debug)]
pub enum LaunchPage<'a> {
    /// Measured with its contents; a page of zeroes too.
    Normal(&'a Page),
    /// Zeroed by the firmware. (A page of zeroes in an image is a normal one.)
    Zero,
    /// Its contents come from the host and are not measured, only its address.
    Unmeasured,
    /// The firmware fills it with keys.
    Secrets,
    /// The firmware checks the host's CPUID table in it.
    Cpuid,
}

/// PAGE_TYPE of a save area, which only KVM itself hands over.
const PAGE_TYPE_VMSA: u8 = 2;

impl LaunchPage<'_> {
    /// PAGE_TYPE, and the digest of the contents where the firmware measures them.
    fn measured(self) -> (u8, Sha384Digest) {
        match self {
            Self::Normal(contents) => (1, Sha384::digest(contents).into()),
            Self::Zero => (3, [0; 48]),
            Self::Unmeasured => (4, [0; 48]),
            Self::Secrets => (5, [0; 48]),
            Self::Cpuid => (6, [0; 48]),
        }
    }
}

/// The digest of a launch so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchDigest(Sha384Digest);

impl LaunchDigest {
    /// That of a launch without a page.
    pub const fn new() -> Self {
        Self([0; 48])
    }

    /// Adds the page at guest-physical address `gpa`.
    pub fn add_page(&mut self, gpa: u64, page: LaunchPage) {
        let (page_type, contents) = page.measured();
        self.extend(page_type, contents, gpa);
    }

    /// Adds the save area of the next virtual CPU.
    pub fn add_vmsa(&mut self, vmsa: &Vmsa) {
        self.extend(PAGE_TYPE_VMSA, Sha384::digest(vmsa.as_bytes()).into(), VMSA_GPA);
    }

    /// The digest as an attestation report shows it in MEASUREMENT.
    pub const fn value(&self) -> Sha384Digest {
        self.0
    }

    fn extend(&mut self, page_type: u8, contents: Sha384Digest, gpa: u64) {
        // After the length and the type: not an initial migration image, and no
        // permissions for VMPL 3, 2 and 1, as KVM has it; then a reserved byte.
        self.0 = Sha384::new()
            .chain_update(self.0)
            .chain_update(contents)
            .chain_update(PAGE_INFO_SIZE.to_le_bytes())
            .chain_update([page_type, 0, 0, 0, 0, 0])
            .chain_update(gpa.to_le_bytes())
            .finalize()
            .into();
    }
}

impl Default for LaunchDigest {
    fn default() -> Self {
        Self::new()
    }
}

/// Why an image has no launch digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SnpError {
    #[error("an SNP launch cannot be computed from what the image has for {}", .0.name())]
    Platform(ImagePlatform),
    #[error("SNP has no page of kind {kind:?} (at {gpa:#x}) on KVM")]
    PageKind { gpa: u64, kind: PageKind },
    #[error("vCPU {0} has a context that is no VMSA")]
    Context(u16),
    #[error("the VMSA of vCPU {index} is for {gpa:#x}, and KVM measures it at {VMSA_GPA:#x}")]
    VmsaAddress { index: u16, gpa: u64 },
    #[error("vCPU {index}: {source}")]
    Vmsa { index: u16, source: VmsaError },
    #[error("two contexts for vCPU {0}")]
    TwoContexts(u16),
    #[error("the image has a context for vCPU {index}: {vcpus} vCPUs are too few")]
    TooFewVcpus { index: u16, vcpus: u32 },
}

/// Measures an image's SNP part as KVM and the secure processor would.
#[derive(Clone, Debug, Default)]
pub struct SnpMeasurement {
    digest: LaunchDigest,
    contexts: BTreeMap<u16, Vmsa>,
    policy: Option<u64>,
    id_block: Option<Box<SnpIdBlock>>,
}

impl SnpMeasurement {
    /// Before the walk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The launch digest of a guest with this number of virtual CPUs. Those that
    /// the image has no context for are in KVM's reset state.
    ///
    /// # Errors
    /// `TooFewVcpus` if the image has a context for one that is not there.
    pub fn digest(&self, vcpus: u32) -> Result<Sha384Digest, SnpError> {
        if let Some((index, _)) = self.contexts.last_key_value()
            && u32::from(*index) >= vcpus
        {
            return Err(SnpError::TooFewVcpus { index: *index, vcpus });
        }
        let mut digest = self.digest.clone();
        let reset = Vmsa::reset();
        for index in 0..vcpus {
            let context = u16::try_from(index).ok().and_then(|index| self.contexts.get(&index));
            digest.add_vmsa(context.unwrap_or(&reset));
        }
        Ok(digest.value())
    }

    /// The guest policy, if the image has one.
    pub const fn policy(&self) -> Option<u64> {
        self.policy
    }

    /// The ID block and its signatures, if the image has them.
    pub fn id_block(&self) -> Option<&SnpIdBlock> {
        self.id_block.as_deref()
    }

    fn add_run(&mut self, run: &PageRun) -> Result<(), SnpError> {
        if run.kind == PageKind::Shared {
            return Ok(());
        }
        let mut buffer = [0; PAGE];
        for (gpa, content) in run.each_page() {
            let page = match run.kind {
                PageKind::Measured => LaunchPage::Normal(content.bytes(&mut buffer)),
                PageKind::Unmeasured => LaunchPage::Unmeasured,
                PageKind::SnpSecrets => LaunchPage::Secrets,
                PageKind::SnpCpuid => LaunchPage::Cpuid,
                kind @ (PageKind::Shared | PageKind::SnpCpuidXf) => {
                    return Err(SnpError::PageKind { gpa, kind });
                }
            };
            self.digest.add_page(gpa, page);
        }
        Ok(())
    }

    fn add_context(&mut self, index: u16, context: &VcpuContext) -> Result<(), SnpError> {
        let VcpuContext::SnpVmsa { gpa, vmsa } = context else {
            return Err(SnpError::Context(index));
        };
        if *gpa != VMSA_GPA {
            return Err(SnpError::VmsaAddress { index, gpa: *gpa });
        }
        let built =
            Vmsa::from_page(vmsa).as_kvm_builds().map_err(|source| SnpError::Vmsa { index, source })?;
        match self.contexts.insert(index, built) {
            None => Ok(()),
            Some(_) => Err(SnpError::TwoContexts(index)),
        }
    }
}

impl<'a> Importer<'a> for SnpMeasurement {
    type Error = SnpError;

    fn platform(&mut self, info: &PlatformInfo) -> Result<(), SnpError> {
        if info.platform != ImagePlatform::Snp {
            return Err(SnpError::Platform(info.platform));
        }
        self.policy = info.policy;
        Ok(())
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), SnpError> {
        match item {
            Item::Pages(run) => self.add_run(run)?,
            Item::Parameters(area) => {
                for (gpa, _) in area.each_page() {
                    self.digest.add_page(gpa, LaunchPage::Unmeasured);
                }
            }
            Item::Vcpu { index, context } => self.add_context(*index, context)?,
            // RAM that nothing is put into is not measured.
            Item::RequiredMemory { .. } => {}
            Item::SnpIdBlock(block) => self.id_block = Some(block.clone()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::importer::Content;

    fn import(items: &[Item]) -> Result<SnpMeasurement, SnpError> {
        let mut measurement = SnpMeasurement::new();
        for item in items {
            measurement.import(1, item)?;
        }
        Ok(measurement)
    }

    fn page(kind: PageKind) -> Item<'static> {
        Item::Pages(PageRun { gpa: 0x3000, pages: 1, kind, content: Content::ZERO })
    }

    fn vmsa(index: u16, gpa: u64, vmsa: &[u8; PAGE]) -> Item<'_> {
        Item::Vcpu { index, context: VcpuContext::SnpVmsa { gpa, vmsa } }
    }

    #[test]
    fn only_snp_is_measured() {
        let info = |platform| PlatformInfo {
            platform,
            mask: 1,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy: Some(0x30000),
            cca_policy: None,
        };
        let mut measurement = SnpMeasurement::new();
        assert_eq!(measurement.platform(&info(ImagePlatform::Snp)), Ok(()));
        assert_eq!(measurement.policy(), Some(0x30000));
        let error = measurement.platform(&info(ImagePlatform::Tdx)).unwrap_err();
        assert_eq!(error, SnpError::Platform(ImagePlatform::Tdx));
    }

    /// Every kind of page has a digest of its own, and shared ones have none.
    #[test]
    fn kinds_of_pages() {
        let digest = |kind| import(&[page(kind)]).map(|measurement| measurement.digest(1).unwrap());
        let kinds = [PageKind::Measured, PageKind::Unmeasured, PageKind::SnpSecrets, PageKind::SnpCpuid];
        let mut digests = kinds.map(|kind| digest(kind).unwrap());
        digests.sort_unstable();
        assert!(digests.windows(2).all(|pair| pair[0] != pair[1]));
        assert_eq!(digest(PageKind::Shared), import(&[]).map(|measurement| measurement.digest(1).unwrap()));
        let kind = PageKind::SnpCpuidXf;
        assert_eq!(digest(kind), Err(SnpError::PageKind { gpa: 0x3000, kind }));
    }

    #[test]
    fn contexts_that_kvm_cannot_take() {
        let reset: [u8; PAGE] = Vmsa::reset().as_bytes().try_into().unwrap();
        let mut odd = reset;
        odd[0x408] = 0;
        let context = VcpuContext::NativeX64(Box::default());
        let refused = |items: &[Item]| import(items).unwrap_err();
        assert_eq!(refused(&[Item::Vcpu { index: 5, context }]), SnpError::Context(5));
        assert_eq!(refused(&[vmsa(0, 0x1000, &reset)]), SnpError::VmsaAddress { index: 0, gpa: 0x1000 });
        assert!(matches!(refused(&[vmsa(3, VMSA_GPA, &odd)]), SnpError::Vmsa { index: 3, .. }));
        let twice = [vmsa(1, VMSA_GPA, &reset), vmsa(1, VMSA_GPA, &reset)];
        assert_eq!(refused(&twice), SnpError::TwoContexts(1));
    }

    #[test]
    fn a_context_needs_its_vcpu() {
        let entry = Vmsa { rip: 0x10000, ..Vmsa::reset() };
        let entry: [u8; PAGE] = entry.as_bytes().try_into().unwrap();
        let measurement = import(&[vmsa(1, VMSA_GPA, &entry)]).unwrap();
        assert_eq!(measurement.digest(1), Err(SnpError::TooFewVcpus { index: 1, vcpus: 1 }));
        let by_hand = |entries: [bool; 2]| {
            let mut digest = LaunchDigest::new();
            for is_entry in entries {
                digest.add_vmsa(&Vmsa { rip: if is_entry { 0x10000 } else { 0xfff0 }, ..Vmsa::reset() });
            }
            digest.value()
        };
        assert_eq!(measurement.digest(2), Ok(by_hand([false, true])));
        assert_eq!(import(&[]).unwrap().digest(2), Ok(by_hand([false, false])));
    }
}
