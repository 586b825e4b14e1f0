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
mod tests {
    use vm_fdt::{FdtWriter, FdtWriterResult};

    use super::*;
    use crate::image::importer::{CcaPolicy, Content, ParameterArea};

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn params(hash_algo: HashAlgorithm) -> RealmParams {
        RealmParams { flags: 0, ipa_bits: 48, sve_vl: 0, num_bps: 1, num_wps: 1, pmu_num_ctrs: 0, hash_algo }
    }

    /// Known values of Veraison's `cca-realm-measurements` (unit test `test_rim`).
    #[test]
    fn parameters_alone() {
        assert_eq!(
            hex(Rim::new(&params(HashAlgorithm::Sha256)).value()),
            "6739dfb22b75ee1268d08dfa8369f501bc0b066243553f069f560d1fa1172973"
        );
        assert_eq!(
            hex(Rim::new(&params(HashAlgorithm::Sha512)).value()),
            "799e434048fb57eb9d4f0e2a2b98158720377252deab2bdfcd69b5a8f82237f4\
             34bd6bb1c75bf160a2d49382f733b3439a3ff769e4ea5dd9a6f72239d44bbbab"
        );
        assert_eq!(Rim::new(&params(HashAlgorithm::Sha384)).value().len(), 48);
    }

    /// The realm that `lkvm run --realm -c 1 -m 512M` makes under RMM 1.0, with six
    /// break- and watchpoints, as the same project's `tests/cmdline.rs` has it: RAM in
    /// entries of 2 MiB, a firmware or nothing at its start, the device tree, the vCPU.
    #[test]
    fn a_realm_of_kvmtool_under_rmm_1_0() {
        const RAM: u64 = 0x8000_0000;
        const RAM_END: u64 = 0xa000_0000;
        const DEVICE_TREE: u64 = 0x8fe0_0000;
        let mut firmware = [0; PAGE];
        firmware[..10].copy_from_slice(b"FW CONTENT");
        let mut tree = device_tree().unwrap();
        tree.resize(0x10000, 0);

        let realm = |firmware: Option<&Page>| {
            let mut rim = Rim::new(&RealmParams {
                ipa_bits: 33,
                num_bps: 5,
                num_wps: 5,
                ..params(HashAlgorithm::Sha256)
            });
            rim.init_ripas(RAM, RAM_END);
            if let Some(firmware) = firmware {
                rim.add_data(RAM, Some(firmware));
            }
            for (ipa, page) in (DEVICE_TREE..).step_by(PAGE).zip(tree.as_chunks().0) {
                rim.add_data(ipa, Some(page));
            }
            let pc = if firmware.is_some() { RAM } else { 0 };
            rim.add_runnable_rec(pc, [DEVICE_TREE, 0, 0, 0, 0, 0, 0, 0]);
            hex(rim.value())
        };
        // Their test shows all but the last digit of it.
        let without = realm(None);
        assert!(
            without.starts_with("998dfdf6401d69f73ed88ac53d62d5ea2cfac6320b887ce4599aa8671791d4d"),
            "{without}"
        );
        assert_eq!(
            realm(Some(&firmware)),
            "cf37146fce0ad50e1be1a04580c1024e5449b430b0dd96b6ef5c9a2b73767bf5"
        );
    }

    fn import(items: &[Item]) -> Result<Rim, CcaError> {
        let mut measurement = CcaMeasurement::new(Rim::new(&params(HashAlgorithm::Sha256)));
        for item in items {
            measurement.import(1, item)?;
        }
        Ok(measurement.rim())
    }

    fn pages(kind: PageKind) -> Item<'static> {
        Item::Pages(PageRun { gpa: 0x1000, pages: 1, kind, content: Content::ZERO })
    }

    fn vcpu(index: u16, flags: u64) -> Item<'static> {
        Item::Vcpu { index, context: VcpuContext::Cca { x: [1, 2, 3, 4, 5, 6, 7, 8], pc: 0x4000, flags } }
    }

    #[test]
    fn an_image_is_measured_pages_first() {
        let area = ParameterArea { gpa: 0x2000, pages: 1, initial: Content::ZERO, values: vec![] };
        let items = [
            vcpu(0, 1),
            pages(PageKind::Measured),
            pages(PageKind::Shared),
            pages(PageKind::Unmeasured),
            Item::Parameters(area),
        ];
        let mut rim = Rim::new(&params(HashAlgorithm::Sha256));
        rim.add_data(0x1000, Some(&[0; PAGE]));
        rim.add_data(0x1000, None);
        rim.add_data(0x2000, None);
        rim.add_runnable_rec(0x4000, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(import(&items), Ok(rim));
    }

    #[test]
    fn what_a_realm_cannot_have() {
        let kind = PageKind::SnpCpuid;
        assert_eq!(import(&[pages(kind)]), Err(CcaError::PageKind { gpa: 0x1000, kind }));
        assert_eq!(import(&[vcpu(1, 1)]), Err(CcaError::Context(1)));
        assert_eq!(import(&[vcpu(0, 0)]), Err(CcaError::Context(0)));
    }

    #[test]
    fn the_images_hash_algorithm_is_the_realms() {
        let info = |platform, hash_algorithm| PlatformInfo {
            platform,
            mask: 1,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy: None,
            cca_policy: Some(CcaPolicy {
                required_zeroes: 0,
                required_ones: 0,
                hash_algorithm,
                lfa_policy: 0,
            }),
        };
        let mut measurement = CcaMeasurement::new(Rim::new(&params(HashAlgorithm::Sha512)));
        assert_eq!(measurement.platform(&info(ImagePlatform::Cca, 1)), Ok(()));
        assert_eq!(
            measurement.platform(&info(ImagePlatform::Cca, 0)),
            Err(CcaError::HashAlgorithm { image: 0, realm: HashAlgorithm::Sha512 })
        );
        assert_eq!(
            measurement.platform(&info(ImagePlatform::Snp, 1)),
            Err(CcaError::Platform(ImagePlatform::Snp))
        );
    }

    #[test]
    fn memory_is_described_in_the_largest_entries() {
        let sizes =
            [(20, 12), (25, 12), (26, 21), (34, 21), (35, 30), (43, 30), (44, 39), (52, 39), (255, 39)];
        for (ipa_bits, shift) in sizes {
            assert_eq!(largest_entry(ipa_bits), shift, "{ipa_bits} bits");
        }
        let described = |ranges: &[(u64, u64)]| {
            let mut rim = Rim::new(&params(HashAlgorithm::Sha256));
            for (base, top) in ranges {
                rim.init_ripas(*base, *top);
            }
            rim
        };
        let whole = described(&[(0x1f_f000, 0x8040_1000)]);
        let mut parts = vec![(0x1f_f000, 0x20_0000)];
        parts.extend((0x20_0000..0x4000_0000).step_by(0x20_0000).map(|base| (base, base + 0x20_0000)));
        parts.extend([(0x4000_0000, 0x8000_0000), (0x8000_0000, 0x8020_0000)]);
        parts.extend([(0x8020_0000, 0x8040_0000), (0x8040_0000, 0x8040_1000)]);
        assert_eq!(whole, described(&parts));
        // Less than a granule, nothing, and less than nothing.
        assert_eq!(described(&[(0, 0xfff), (0x1000, 0x1000), (0x1000, 0)]), described(&[]));
    }

    /// The device tree of that realm.
    fn device_tree() -> FdtWriterResult<Vec<u8>> {
        let mut tree = FdtWriter::new()?;
        let root = tree.begin_node("")?;
        tree.property_string("compatible", "linux,dummy-virt")?;
        tree.property_string("model", "linux,dummy-virt-realm")?;
        tree.property_u32("#address-cells", 2)?;
        tree.property_u32("#size-cells", 2)?;
        tree.property_u32("interrupt-parent", 1)?;

        let chosen = tree.begin_node("chosen")?;
        tree.property_string("bootargs", " console=hvc0 root=/dev/vda rw ")?;
        tree.end_node(chosen)?;

        let memory = tree.begin_node("memory@80000000")?;
        tree.property_string("device_type", "memory")?;
        tree.property_array_u64("reg", &[0x8000_0000, 0x2000_0000])?;
        tree.end_node(memory)?;

        let cpus = tree.begin_node("cpus")?;
        tree.property_u32("#size-cells", 0)?;
        tree.property_u32("#address-cells", 1)?;
        let cpu = tree.begin_node("cpu@0")?;
        tree.property_u32("reg", 0)?;
        tree.property_string("enable-method", "psci")?;
        tree.property_string("compatible", "arm,armv8")?;
        tree.property_string("device_type", "cpu")?;
        tree.end_node(cpu)?;
        tree.end_node(cpus)?;

        let psci = tree.begin_node("psci")?;
        tree.property_u32("cpu_on", 0xc400_0003)?;
        tree.property_u32("cpu_off", 0x8400_0002)?;
        tree.property_string("method", "smc")?;
        let compatible = ["arm,psci-1.0", "arm,psci-0.2", "arm,psci"];
        tree.property_string_list("compatible", compatible.map(str::to_owned).to_vec())?;
        tree.end_node(psci)?;

        let gic = tree.begin_node("intc")?;
        tree.property_string("compatible", "arm,gic-v3")?;
        tree.property_u32("#interrupt-cells", 3)?;
        tree.property_null("interrupt-controller")?;
        tree.property_array_u64("reg", &[0x3fff_0000, 0x1_0000, 0x3ffd_0000, 0x2_0000])?;
        tree.property_phandle(1)?;
        tree.property_u32("#address-cells", 2)?;
        tree.property_u32("#size-cells", 2)?;
        tree.property_null("ranges")?;
        let its = tree.begin_node("msic")?;
        tree.property_string("compatible", "arm,gic-v3-its")?;
        tree.property_null("msi-controller")?;
        tree.property_phandle(2)?;
        tree.property_array_u64("reg", &[0x3ffb_0000, 0x2_0000])?;
        tree.end_node(its)?;
        tree.end_node(gic)?;

        let timer = tree.begin_node("timer")?;
        tree.property_array_u32("interrupts", &[1, 13, 8, 1, 14, 8, 1, 11, 8])?;
        tree.property_null("always-on")?;
        let compatible = ["arm,armv8-timer", "arm,armv7-timer"];
        tree.property_string_list("compatible", compatible.map(str::to_owned).to_vec())?;
        tree.end_node(timer)?;

        for (number, address) in (0..4).zip((0x100_0000_u64..).step_by(0x1000)) {
            let serial = tree.begin_node(&format!("U6_16550A@{address:x}"))?;
            tree.property_string("compatible", "ns16550a")?;
            tree.property_array_u64("reg", &[address, 8])?;
            tree.property_array_u32("interrupts", &[0, number, 4])?;
            tree.property_u32("clock-frequency", 1_843_200)?;
            tree.end_node(serial)?;
        }

        let rtc = tree.begin_node("rtc@1010000")?;
        tree.property_string("compatible", "motorola,mc146818")?;
        tree.property_array_u64("reg", &[0x101_0000, 2])?;
        tree.end_node(rtc)?;

        let pci = tree.begin_node("pci@40000000")?;
        tree.property_string("device_type", "pci")?;
        tree.property_u32("#address-cells", 3)?;
        tree.property_u32("#size-cells", 2)?;
        tree.property_null("dma-coherent")?;
        tree.property_array_u32("bus-range", &[0, 0])?;
        tree.property_string("compatible", "pci-host-ecam-generic")?;
        tree.property_array_u64("reg", &[0x4000_0000, 0x1000_0000])?;
        let ports = [0x100_0000, 0, 0, 0, 0, 0, 0x1_0000];
        let memory = [0x200_0000, 0, 0x5000_0000, 0, 0x5000_0000, 0, 0x3000_0000];
        tree.property_array_u32("ranges", &[ports, memory].concat())?;
        let pins = (0..32).flat_map(|slot| [slot << 11, 0, 0, 1, 1, 0, 0, 0, 64 + slot, 4]);
        tree.property_array_u32("interrupt-map", &pins.collect::<Vec<u32>>())?;
        tree.property_array_u32("interrupt-map-mask", &[0xf800, 0, 0, 7])?;
        tree.property_u32("#interrupt-cells", 1)?;
        tree.property_array_u32("msi-map", &[0, 2, 0, 0x1_0000])?;
        tree.end_node(pci)?;

        tree.end_node(root)?;
        tree.finish()
    }
}
