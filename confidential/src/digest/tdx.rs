//! MRTD, the measurement of a TDX guest's initial memory.
//!
//! One SHA-384 runs over everything that is added before the launch is sealed:
//! a 128-byte record for each page that TDH.MEM.PAGE.ADD adds, and for each 256
//! bytes that TDH.MR.EXTEND measures another record and the bytes themselves
//! (*Intel TDX Module ABI Specification*, 348551, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND).
//! KVM adds a page and measures it before it adds the next one
//! (`tdx_gmem_post_populate` in Linux).
//!
//! Not in MRTD, and so to be checked apart: the TD's attributes, XFAM,
//! MRCONFIGID and its owners' fields, and the number of virtual CPUs.

use sha2::{Digest, Sha384};

use super::{Page, Sha384Digest};
use crate::image::importer::{ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, PlatformInfo};

/// Bytes that one TDH.MR.EXTEND measures.
const CHUNK: usize = 256;

/// MRTD so far.
#[derive(Clone, Debug, Default)]
pub struct Mrtd(Sha384);

impl Mrtd {
    /// That of a TD without a page.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the page at guest-physical address `gpa` without its contents.
    pub fn add_page(&mut self, gpa: u64) {
        self.record(b"MEM.PAGE.ADD\0\0\0\0", gpa);
    }

    /// Adds the page at `gpa`, contents and all.
    pub fn add_measured_page(&mut self, gpa: u64, contents: &Page) {
        self.add_page(gpa);
        let addresses = (gpa..).step_by(CHUNK);
        for (address, chunk) in addresses.zip(contents.chunks_exact(CHUNK)) {
            self.record(b"MR.EXTEND\0\0\0\0\0\0\0", address);
            self.0.update(chunk);
        }
    }

    /// The value as TDH.MR.FINALIZE leaves it in MRTD.
    pub fn value(&self) -> Sha384Digest {
        self.0.clone().finalize().into()
    }

    /// 128 bytes: the operation's name, the address, zeroes.
    fn record(&mut self, operation: &[u8; 16], gpa: u64) {
        self.0.update(operation);
        self.0.update(gpa.to_le_bytes());
        self.0.update([0; 104]);
    }
}

/// Why an image has no MRTD.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum TdxError {
    #[error("MRTD cannot be computed from what the image has for {}", .0.name())]
    Platform(ImagePlatform),
    #[error("TDX has no page of kind {kind:?} (at {gpa:#x})")]
    PageKind { gpa: u64, kind: PageKind },
    #[error("the image has a context for vCPU {0}, and a TD's vCPUs begin at the reset vector")]
    Context(u16),
}

/// Measures an image's TDX part as KVM and the TDX module would.
#[derive(Clone, Debug, Default)]
pub struct TdxMeasurement {
    mrtd: Mrtd,
    policy: Option<u64>,
}

impl TdxMeasurement {
    /// Before the walk.
    pub fn new() -> Self {
        Self::default()
    }

    /// MRTD; the same for every number of virtual CPUs.
    pub fn mrtd(&self) -> Sha384Digest {
        self.mrtd.value()
    }

    /// The guest policy, if the image has one: in IGVM's bits, not in those of ATTRIBUTES.
    pub const fn policy(&self) -> Option<u64> {
        self.policy
    }

    fn add_run(&mut self, run: &PageRun) -> Result<(), TdxError> {
        if run.kind == PageKind::Shared {
            return Ok(());
        }
        let mut buffer = [0; PAGE];
        for (gpa, content) in run.each_page() {
            match run.kind {
                PageKind::Measured => self.mrtd.add_measured_page(gpa, content.bytes(&mut buffer)),
                PageKind::Unmeasured => self.mrtd.add_page(gpa),
                kind => return Err(TdxError::PageKind { gpa, kind }),
            }
        }
        Ok(())
    }
}

impl<'a> Importer<'a> for TdxMeasurement {
    type Error = TdxError;

    fn platform(&mut self, info: &PlatformInfo) -> Result<(), TdxError> {
        if info.platform != ImagePlatform::Tdx {
            return Err(TdxError::Platform(info.platform));
        }
        self.policy = info.policy;
        Ok(())
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), TdxError> {
        match item {
            Item::Pages(run) => self.add_run(run)?,
            Item::Parameters(area) => {
                for (gpa, _) in area.each_page() {
                    self.mrtd.add_page(gpa);
                }
            }
            Item::Vcpu { index, .. } => return Err(TdxError::Context(*index)),
            // RAM that nothing is put into is not measured; an ID block is SNP's.
            Item::RequiredMemory { .. } | Item::SnpIdBlock(_) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::importer::{Content, VcpuContext};

    fn import(items: &[Item]) -> Result<Sha384Digest, TdxError> {
        let mut measurement = TdxMeasurement::new();
        for item in items {
            measurement.import(1, item)?;
        }
        Ok(measurement.mrtd())
    }

    fn pages(gpa: u64, pages: u64, kind: PageKind) -> Item<'static> {
        Item::Pages(PageRun { gpa, pages, kind, content: Content::ZERO })
    }

    #[test]
    fn kinds_of_pages() {
        let by_hand = |add: fn(&mut Mrtd)| {
            let mut mrtd = Mrtd::new();
            add(&mut mrtd);
            Ok(mrtd.value())
        };
        let measured = by_hand(|mrtd| {
            mrtd.add_measured_page(0x1000, &[0; PAGE]);
            mrtd.add_measured_page(0x2000, &[0; PAGE]);
        });
        assert_eq!(import(&[pages(0x1000, 2, PageKind::Measured)]), measured);
        let unmeasured = by_hand(|mrtd| mrtd.add_page(0x1000));
        assert_eq!(import(&[pages(0x1000, 1, PageKind::Unmeasured)]), unmeasured);
        assert_eq!(import(&[pages(0x1000, 1, PageKind::Shared)]), by_hand(|_| {}));
        let kind = PageKind::SnpSecrets;
        assert_eq!(import(&[pages(0x1000, 1, kind)]), Err(TdxError::PageKind { gpa: 0x1000, kind }));
    }

    #[test]
    fn what_a_td_cannot_have() {
        let mut measurement = TdxMeasurement::new();
        let info = PlatformInfo {
            platform: ImagePlatform::Snp,
            mask: 1,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy: None,
            cca_policy: None,
        };
        assert_eq!(measurement.platform(&info), Err(TdxError::Platform(ImagePlatform::Snp)));
        let context = VcpuContext::SnpVmsa { gpa: 0, vmsa: &[0; PAGE] };
        assert_eq!(import(&[Item::Vcpu { index: 7, context }]), Err(TdxError::Context(7)));
    }
}
