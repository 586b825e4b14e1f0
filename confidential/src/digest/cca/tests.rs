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
        let mut rim =
            Rim::new(&RealmParams { ipa_bits: 33, num_bps: 5, num_wps: 5, ..params(HashAlgorithm::Sha256) });
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
    assert_eq!(realm(Some(&firmware)), "cf37146fce0ad50e1be1a04580c1024e5449b430b0dd96b6ef5c9a2b73767bf5");
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
        cca_policy: Some(CcaPolicy { required_zeroes: 0, required_ones: 0, hash_algorithm, lfa_policy: 0 }),
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
    let sizes = [(20, 12), (25, 12), (26, 21), (34, 21), (35, 30), (43, 30), (44, 39), (52, 39), (255, 39)];
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
