//! RIM, the initial measurement of an Arm CCA realm.
//!
//! The realm management monitor (RMM) hashes the parameters that a realm was
//! made with and then, for each event of its making, a 256-byte descriptor that
//! holds the measurement so far (*Realm Management Monitor specification*,
//! DEN0137, "Measurement of Realm Initial state": RMI_REALM_CREATE, RMI_DATA_CREATE,
//! RMI_REC_CREATE, and in RMM 1.0 RMI_RTT_INIT_RIPAS).
//!
//! RMM 2.0 measures no RIPAS: [`Rim::init_ripas`] is for RMM 1.0.

use sha2::{Digest, Sha256, Sha384, Sha512};

use super::Page;
use crate::image::importer::{
    ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, PlatformInfo, VcpuContext,
};

/// A measurement in the RMM's own size: a shorter digest has zeroes behind it.
pub type Measurement = [u8; 64];

/// With what a realm is measured (RmiHashAlgorithm).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HashAlgorithm {
    /// 32 bytes; the only one that KVM's interface offers.
    Sha256 = 0,
    /// 64 bytes.
    Sha512 = 1,
    /// 48 bytes, since RMM 2.0.
    Sha384 = 2,
}

impl HashAlgorithm {
    /// Bytes of a digest.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn digest(self, data: &[u8]) -> Measurement {
        fn padded(digest: &[u8]) -> Measurement {
            let mut measurement = [0; 64];
            for (to, from) in measurement.iter_mut().zip(digest) {
                *to = *from;
            }
            measurement
        }
        match self {
            Self::Sha256 => padded(&Sha256::digest(data)),
            Self::Sha384 => padded(&Sha384::digest(data)),
            Self::Sha512 => padded(&Sha512::digest(data)),
        }
    }
}

/// The parameters of a realm that are measured (RmiRealmParams).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealmParams {
    /// Bit 0 LPA2, bit 1 SVE, bit 2 PMU.
    pub flags: u64,
    /// Bits of an intermediate physical address.
    pub ipa_bits: u8,
    /// SVE vector length in units of 128 bits, less one.
    pub sve_vl: u8,
    /// Number of breakpoints, less one.
    pub num_bps: u8,
    /// Number of watchpoints, less one.
    pub num_wps: u8,
    /// Number of PMU counters.
    pub pmu_num_ctrs: u8,
    /// With what the realm is measured.
    pub hash_algo: HashAlgorithm,
}

impl RealmParams {
    fn to_bytes(self) -> [u8; PAGE] {
        let mut params = [0; PAGE];
        put(&mut params, 0x00, &self.flags.to_le_bytes());
        put(&mut params, 0x08, &[self.ipa_bits]);
        put(&mut params, 0x10, &[self.sve_vl]);
        put(&mut params, 0x18, &[self.num_bps]);
        put(&mut params, 0x20, &[self.num_wps]);
        put(&mut params, 0x28, &[self.pmu_num_ctrs]);
        put(&mut params, 0x30, &[self.hash_algo as u8]);
        params
    }
}

/// Writes `bytes` at `offset`; both are constants of the structures here.
fn put(structure: &mut [u8], offset: usize, bytes: &[u8]) {
    for (to, from) in structure.iter_mut().skip(offset).zip(bytes) {
        *to = *from;
    }
}

/// The kinds of event that a descriptor is for.
#[derive(Clone, Copy, Debug)]
enum Event {
    Data = 0,
    Rec = 1,
    Ripas = 2,
}

/// RMI flag of a realm execution context that runs from the start.
const REC_RUNNABLE: u64 = 1;
/// RMI flag of a granule whose contents are measured.
const DATA_MEASURED: u64 = 1;
/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: usize = 0x100;

/// Bits of an address inside a granule.
const PAGE_SHIFT: u32 = 12;
/// Bits of an address that one level of the translation table resolves.
const LEVEL_BITS: u32 = 9;
/// Up to that many bits more, KVM puts tables of the first level side by side instead of a level above them.
const CONCATENATED_BITS: u32 = 4;

/// Most levels of the translation table above the last one.
const LEVELS_ABOVE: u32 = 3;

/// The largest entry of a realm's translation table, as a power of two.
fn largest_entry(ipa_bits: u8) -> u32 {
    let table_bits = u32::from(ipa_bits).saturating_sub(PAGE_SHIFT.saturating_add(CONCATENATED_BITS));
    let levels_above = table_bits.saturating_sub(1).checked_div(LEVEL_BITS).unwrap_or(0).min(LEVELS_ABOVE);
    PAGE_SHIFT.saturating_add(levels_above.saturating_mul(LEVEL_BITS))
}

/// The measurement of a realm so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rim {
    hash: HashAlgorithm,
    /// Size of the largest entry of the translation table, as a power of two.
    largest_entry: u32,
    value: Measurement,
}

impl Rim {
    /// That of a realm just made (RMI_REALM_CREATE).
    pub fn new(params: &RealmParams) -> Self {
        let hash = params.hash_algo;
        Self { hash, largest_entry: largest_entry(params.ipa_bits), value: hash.digest(&params.to_bytes()) }
    }

    /// Adds the granule at intermediate physical address `ipa`, measured with its
    /// contents if they are given (RMI_DATA_CREATE).
    pub fn add_data(&mut self, ipa: u64, contents: Option<&Page>) {
        let (flags, digest) = match contents {
            Some(page) => (DATA_MEASURED, self.hash.digest(page)),
            None => (0, [0; 64]),
        };
        self.extend(Event::Data, &[&ipa.to_le_bytes(), &flags.to_le_bytes(), &digest]);
    }

    /// Adds the virtual CPU that runs from the start: its program counter and
    /// general registers 0 to 7 (RMI_REC_CREATE). Others are not measured.
    pub fn add_runnable_rec(&mut self, pc: u64, gprs: [u64; 8]) {
        let mut params = [0; PAGE];
        put(&mut params, 0x000, &REC_RUNNABLE.to_le_bytes());
        put(&mut params, 0x200, &pc.to_le_bytes());
        for (offset, register) in (0x300..).step_by(8).zip(gprs) {
            put(&mut params, offset, &register.to_le_bytes());
        }
        let digest = self.hash.digest(&params);
        self.extend(Event::Rec, &[&digest]);
    }

    /// Makes the memory from `base` up to `top`, multiples of 4 KiB, the realm's RAM (RMI_RTT_INIT_RIPAS of RMM 1.0).
    ///
    /// The RMM measures one event for each entry of its translation table, and the
    /// host calls it for the largest ones that fit, as KVM does.
    pub fn init_ripas(&mut self, base: u64, top: u64) {
        let mut start = base;
        while let Some(left) = top.checked_sub(start).filter(|left| *left >= PAGE as u64) {
            let mut shift = self.largest_entry;
            while shift > PAGE_SHIFT && !(start.trailing_zeros() >= shift && left >> shift != 0) {
                shift = shift.saturating_sub(LEVEL_BITS);
            }
            let end = start.saturating_add(1_u64.checked_shl(shift).unwrap_or(u64::MAX));
            self.extend(Event::Ripas, &[&start.to_le_bytes(), &end.to_le_bytes()]);
            start = end;
        }
    }

    /// The measurement, without the zeroes behind a short digest.
    pub fn value(&self) -> &[u8] {
        self.value.get(..self.hash.size()).unwrap_or(&self.value)
    }

    fn extend(&mut self, event: Event, fields: &[&[u8]]) {
        let mut descriptor = [0; DESCRIPTOR_SIZE];
        put(&mut descriptor, 0x00, &[event as u8]);
        put(&mut descriptor, 0x08, &(DESCRIPTOR_SIZE as u64).to_le_bytes());
        put(&mut descriptor, 0x10, &self.value);
        put(&mut descriptor, 0x50, &fields.concat());
        self.value = self.hash.digest(&descriptor);
    }
}

/// Why an image has no RIM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum CcaError {
    #[error("a RIM cannot be computed from what the image has for {}", .0.name())]
    Platform(ImagePlatform),
    #[error("the image asks for hash algorithm {image}, and the realm is made with {realm:?}")]
    HashAlgorithm { image: u8, realm: HashAlgorithm },
    #[error("CCA has no page of kind {kind:?} (at {gpa:#x})")]
    PageKind { gpa: u64, kind: PageKind },
    #[error("vCPU {0}: only vCPU 0 has a context, the registers of a runnable REC")]
    Context(u16),
}

/// Measures an image's CCA part as KVM (series v15 for Linux) and the RMM would:
/// the pages in their order, then the virtual CPU that runs first.
#[derive(Clone, Debug)]
pub struct CcaMeasurement {
    hash: HashAlgorithm,
    rim: Rim,
    first: Option<(u64, [u64; 8])>,
}

impl CcaMeasurement {
    /// Before the walk: `rim` is that of a realm whose memory is described (in
    /// RMM 1.0 by [`Rim::init_ripas`]), but empty.
    pub const fn new(rim: Rim) -> Self {
        Self { hash: rim.hash, rim, first: None }
    }

    /// The RIM. Without a context the first virtual CPU has all registers 0.
    pub fn rim(&self) -> Rim {
        let mut rim = self.rim.clone();
        let (pc, gprs) = self.first.unwrap_or_default();
        rim.add_runnable_rec(pc, gprs);
        rim
    }

    fn add_run(&mut self, run: &PageRun) -> Result<(), CcaError> {
        if run.kind == PageKind::Shared {
            return Ok(());
        }
        let mut buffer = [0; PAGE];
        for (gpa, content) in run.each_page() {
            match run.kind {
                PageKind::Measured => self.rim.add_data(gpa, Some(content.bytes(&mut buffer))),
                PageKind::Unmeasured => self.rim.add_data(gpa, None),
                kind => return Err(CcaError::PageKind { gpa, kind }),
            }
        }
        Ok(())
    }
}

impl<'a> Importer<'a> for CcaMeasurement {
    type Error = CcaError;

    fn platform(&mut self, info: &PlatformInfo) -> Result<(), CcaError> {
        if info.platform != ImagePlatform::Cca {
            return Err(CcaError::Platform(info.platform));
        }
        match info.cca_policy {
            Some(policy) if policy.hash_algorithm != self.hash as u8 => {
                Err(CcaError::HashAlgorithm { image: policy.hash_algorithm, realm: self.hash })
            }
            _ => Ok(()),
        }
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), CcaError> {
        match item {
            Item::Pages(run) => self.add_run(run)?,
            Item::Parameters(area) => {
                for (gpa, _) in area.each_page() {
                    self.rim.add_data(gpa, None);
                }
            }
            Item::Vcpu { index: 0, context: VcpuContext::Cca { x, pc, flags: REC_RUNNABLE } } => {
                self.first = Some((*pc, *x));
            }
            Item::Vcpu { index, .. } => return Err(CcaError::Context(*index)),
            // RAM that nothing is put into is not measured; an ID block is SNP's.
            Item::RequiredMemory { .. } | Item::SnpIdBlock(_) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
