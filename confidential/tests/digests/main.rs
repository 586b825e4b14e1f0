//! Launch digests against other people's: the `sev` and `igvm` crates, and
//! `sev-snp-measure` of PyPI.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests fail by panicking

mod firmware;

use std::fs;
use std::path::Path;
use std::process::Command;

use cofferdam_confidential::digest::snp::{LaunchDigest, SnpMeasurement, VMSA_GPA};
use cofferdam_confidential::digest::tdx::TdxMeasurement;
use cofferdam_confidential::digest::vmsa::{Segment, Vmsa};
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::igvm::writer::Writer;
use cofferdam_confidential::image::compose::{Blob, Options, Source, compose};
use cofferdam_confidential::image::importer::{
    Content, ImagePlatform, Importer, Item, PAGE, PageKind, PageRun, Parameter, ParameterArea, ParameterKind,
    PlatformInfo, VcpuContext,
};
use cofferdam_confidential::image::walk::{Selection, walk};
use firmware::Firmware;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader};
use igvm_defs::{IGVM_VHS_PARAMETER_INSERT, IgvmPageDataFlags, IgvmPageDataType};
use sev::measurement::snp::{SnpMeasurementArgs, snp_calc_launch_digest};
use sev::measurement::vcpu_types::CpuType;
use sev::measurement::vmsa::{GuestFeatures, VMMType};
use zerocopy::{FromBytes, IntoBytes};

const MASK: u32 = 1;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A save area as QEMU sets it up for its `EPYC-v4` at a reset vector.
fn qemu_vmsa(reset: u32) -> Vmsa {
    let data = Segment { attributes: 0x93, limit: 0xffff, ..Segment::default() };
    Vmsa {
        cs: Segment {
            selector: 0xf000,
            attributes: 0x9b,
            limit: 0xffff,
            base: u64::from(reset & 0xffff_0000),
        },
        es: data,
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        tr: Segment { attributes: 0x8b, ..data },
        rip: u64::from(reset & 0xffff),
        // Family 23, model 1, stepping 2.
        rdx: 0x0080_0f12,
        ..Vmsa::reset()
    }
}

/// The digest of a QEMU guest with this firmware.
fn qemu_digest(firmware: &Firmware, vcpus: u32) -> String {
    let mut digest = LaunchDigest::new();
    for (gpa, page) in firmware.pages() {
        digest.add_page(gpa, page);
    }
    for vcpu in 0..vcpus {
        digest.add_vmsa(&qemu_vmsa(if vcpu == 0 { 0xffff_fff0 } else { firmware.ap_reset }));
    }
    hex(&digest.value())
}

#[test]
fn equals_the_sev_crate_on_a_firmware() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("firmware");
    let image = firmware::small();
    fs::write(&path, &image).unwrap();
    let firmware = Firmware::parse(&image);
    for vcpus in [1, 2, 4] {
        let expected = snp_calc_launch_digest(SnpMeasurementArgs {
            vcpus,
            vcpu_type: CpuType::EpycV4,
            ovmf_file: path.clone(),
            guest_features: GuestFeatures(1),
            kernel_file: None,
            initrd_file: None,
            append: None,
            ovmf_hash_str: None,
            vmm_type: Some(VMMType::QEMU),
        });
        assert_eq!(qemu_digest(&firmware, vcpus), expected.unwrap().get_hex_ld());
    }
}

/// What `sev-snp-measure` 0.0.13 says of [`firmware::small`] written to a file:
/// `sev-snp-measure --mode snp --vcpus=N --vcpu-type=EPYC-v4 --guest-features 0x1 --ovmf=FILE`.
/// The test below asks it again.
const OF_SEV_SNP_MEASURE: [(u32, &str); 3] = [
    (1, "d4a6ffad3b747acbd03763c388f59a994bbd95d84669964a858c3568002184fb0aa0172489a6250e3bcc75f4d5b693e7"),
    (2, "69c00ab97a1498156e1ca95a1777dce22c02b46df4c121f598299e3a60f160dcfceb372ad50046871f03e484399fc3a0"),
    (4, "7f21ec2ee0bc6d3f192e691a77fa7bab59cf165953b3e55718ae9c5a50f30084ec012850a644ad71a1430e07c6e53046"),
];

#[test]
fn equals_sev_snp_measure_on_a_firmware() {
    let image = firmware::small();
    for (vcpus, digest) in OF_SEV_SNP_MEASURE {
        assert_eq!(qemu_digest(&Firmware::parse(&image), vcpus), digest);
    }
}

/// Needs the network: `sev-snp-measure` 0.0.13 from PyPI, and Debian's OVMF.
#[test]
#[ignore = "fetches a Python package and a Debian package; part of `make test-all`"]
fn equals_sev_snp_measure_on_debians_firmware() {
    fn run(directory: &Path, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).current_dir(directory).output().unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    run(directory, "python3", &["-m", "venv", "venv"]);
    run(directory, "venv/bin/pip", &["install", "--quiet", "sev-snp-measure==0.0.13"]);
    run(directory, "apt-get", &["-qq", "download", "ovmf"]);
    run(directory, "sh", &["-c", "dpkg-deb -x ovmf_*.deb ."]);
    fs::write(directory.join("small.fd"), firmware::small()).unwrap();

    for file in ["small.fd", "usr/share/ovmf/OVMF.fd"] {
        let image = fs::read(directory.join(file)).unwrap();
        let firmware = Firmware::parse(&image);
        for (vcpus, _) in OF_SEV_SNP_MEASURE {
            let count = format!("--vcpus={vcpus}");
            let ovmf = format!("--ovmf={file}");
            let arguments = ["--mode", "snp", &count, "--vcpu-type=EPYC-v4", "--guest-features=0x1", &ovmf];
            let expected = run(directory, "venv/bin/sev-snp-measure", &arguments);
            assert_eq!(qemu_digest(&firmware, vcpus), expected, "{file}");
        }
    }
}

/// An image with everything that is measured, some of it in odd places.
fn items<'a>(code: &'a [u8], vmsa: Option<&'a [u8; PAGE]>) -> Vec<Item<'a>> {
    let run = |gpa, pages, kind, bytes| {
        Item::Pages(PageRun { gpa, pages, kind, content: Content { bytes, file_offset: None } })
    };
    let mut items = vec![
        run(0xc000_0000, 5, PageKind::Shared, code),
        run(0x10000, 3, PageKind::Measured, code),
        run(0x2000, 1, PageKind::Measured, &[]),
        Item::RequiredMemory { gpa: 0, length: 0x20_0000 },
        Item::Parameters(ParameterArea {
            gpa: 0x1f000,
            pages: 2,
            initial: Content { bytes: &code[..PAGE], file_offset: None },
            values: vec![Parameter { kind: ParameterKind::VcpuCount, offset: 0 }],
        }),
        run(0x1e000, 1, PageKind::Unmeasured, code),
    ];
    if let Some(vmsa) = vmsa {
        items.insert(3, run(0x92000, 1, PageKind::SnpSecrets, &[]));
        items.insert(3, run(0x93000, 1, PageKind::SnpCpuid, &[]));
        items.push(Item::Vcpu { index: 0, context: VcpuContext::SnpVmsa { gpa: VMSA_GPA, vmsa } });
    }
    items
}

/// The same in the terms of the `igvm` crate.
fn directives(items: &[Item]) -> Vec<IgvmDirectiveHeader> {
    let mut directives = Vec::new();
    for item in items {
        match item {
            Item::Pages(run) => directives.extend(run.each_page().map(|(gpa, content)| {
                let flags = IgvmPageDataFlags::new()
                    .with_unmeasured(run.kind == PageKind::Unmeasured)
                    .with_shared(run.kind == PageKind::Shared);
                IgvmDirectiveHeader::PageData {
                    gpa,
                    compatibility_mask: MASK,
                    flags,
                    data_type: match run.kind {
                        PageKind::SnpSecrets => IgvmPageDataType::SECRETS,
                        PageKind::SnpCpuid => IgvmPageDataType::CPUID_DATA,
                        _ => IgvmPageDataType::NORMAL,
                    },
                    data: content.bytes(&mut [0; PAGE]).to_vec(),
                }
            })),
            Item::Parameters(area) => {
                directives.push(IgvmDirectiveHeader::ParameterArea {
                    number_of_bytes: area.length(),
                    parameter_area_index: 0,
                    initial_data: area.initial.bytes.to_vec(),
                });
                directives.push(IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
                    gpa: area.gpa,
                    compatibility_mask: MASK,
                    parameter_area_index: 0,
                }));
            }
            Item::Vcpu { context: VcpuContext::SnpVmsa { gpa, vmsa }, .. } => {
                directives.push(IgvmDirectiveHeader::SnpVpContext {
                    gpa: *gpa,
                    compatibility_mask: MASK,
                    vp_index: 0,
                    vmsa: Box::new(igvm::snp_defs::SevVmsa::read_from_bytes(vmsa.as_slice()).unwrap()),
                });
            }
            _ => {}
        }
    }
    directives
}

fn info(platform: ImagePlatform) -> PlatformInfo {
    let policy = Some(0x30000);
    PlatformInfo { platform, mask: MASK, highest_vtl: 0, shared_gpa_boundary: 0, policy, cca_policy: None }
}

fn code() -> Vec<u8> {
    (0..2 * PAGE + 100).map(|index| (index * 7 % 251) as u8).collect()
}

#[test]
fn snp_equals_the_igvm_crate_in_kvms_order() {
    let entry = Vmsa { rip: 0x10000, cr3: 1 << 51 | 0x1b000, ..Vmsa::reset() };
    let vmsa: [u8; PAGE] = entry.as_bytes().try_into().unwrap();
    let code = code();
    let items = items(&code, Some(&vmsa));
    let mut measurement = SnpMeasurement::new();
    measurement.platform(&info(ImagePlatform::Snp)).unwrap();
    for item in &items {
        measurement.import(MASK, item).unwrap();
    }
    let policy = [IgvmInitializationHeader::GuestPolicy { policy: 0x30000, compatibility_mask: MASK }];
    let expected = igvm::measurement::generate_snp_measurement(&policy, &directives(&items), MASK).unwrap();
    assert_eq!(hex(&measurement.digest(1).unwrap()), hex(&expected));
    assert_eq!(measurement.policy(), Some(0x30000));

    // More virtual CPUs are as many save areas in KVM's reset state behind it.
    let mut directives = directives(&items);
    let vmsa = igvm::snp_defs::SevVmsa::read_from_bytes(Vmsa::reset().as_bytes()).unwrap();
    for vcpus in 2..=3 {
        directives.push(IgvmDirectiveHeader::SnpVpContext {
            gpa: VMSA_GPA,
            compatibility_mask: MASK,
            vp_index: vcpus - 1,
            vmsa: Box::new(vmsa),
        });
        let expected = igvm::measurement::generate_snp_measurement(&policy, &directives, MASK).unwrap();
        assert_eq!(hex(&measurement.digest(vcpus.into()).unwrap()), hex(&expected));
    }
}

/// What `kvm-amd` of Debian's Linux 6.12.95 and the emulated secure processor (QEMU with the patches for an SNP host)
/// measured, by the latter's own log, when these pages were launched with one and three vCPUs: the first one's
/// registers set as here, the others' left in KVM's reset state with their general registers cleared.
const OF_KVM: [(u32, &str); 2] = [
    (1, "0ad4bf4e484d48f9f57f3e15da6e97125d893a6cbfc77696694879e73afb00ab963ebb4dcd2f09f27c0cecaa4f23e1bc"),
    (3, "5b773364ad02b45ee0a32df0ab15c398b4651aff80a5b2e5fc634a583f70367e59fadc414f6b888d6986509de1a1d878"),
];

#[test]
fn equals_what_kvm_launched() {
    let data = Segment { selector: 0x18, attributes: 0xc93, limit: u32::MAX, base: 0 };
    // Without the bits that KVM adds to EFER, CR4 and RFLAGS.
    let vmsa = Vmsa {
        cs: Segment { selector: 0x10, attributes: 0xa9b, ..data },
        es: data,
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        gdtr: Segment { limit: 0x17, base: 0x1000, ..Segment::default() },
        efer: 0x500,
        cr0: 0x8000_0031,
        cr3: 1 << 51 | 0x1b000,
        cr4: 0x20,
        rflags: 0,
        rip: 0x10000,
        rsi: 0x1234,
        r15: 0x5678,
        ..Vmsa::reset()
    };
    let vmsa: [u8; PAGE] = vmsa.as_bytes().try_into().unwrap();
    let code = &code()[..PAGE];
    let run = |gpa, kind, bytes| {
        Item::Pages(PageRun { gpa, pages: 1, kind, content: Content { bytes, file_offset: None } })
    };
    let items = [
        run(0x10000, PageKind::Measured, code),
        run(0x12000, PageKind::Measured, &[]),
        run(0x11000, PageKind::Unmeasured, &[]),
        run(0x13000, PageKind::SnpSecrets, &[]),
        run(0x14000, PageKind::SnpCpuid, &[]),
        Item::Vcpu { index: 0, context: VcpuContext::SnpVmsa { gpa: VMSA_GPA, vmsa: &vmsa } },
    ];
    let mut measurement = SnpMeasurement::new();
    for item in &items {
        measurement.import(MASK, item).unwrap();
    }
    for (vcpus, digest) in OF_KVM {
        assert_eq!(hex(&measurement.digest(vcpus).unwrap()), digest);
    }
}

#[test]
fn a_context_is_measured_last_wherever_it_stands() {
    let vmsa: [u8; PAGE] = Vmsa::reset().as_bytes().try_into().unwrap();
    let code = code();
    let mut items = items(&code, Some(&vmsa));
    let digest = |items: &[Item]| {
        let mut measurement = SnpMeasurement::new();
        for item in items {
            measurement.import(MASK, item).unwrap();
        }
        measurement.digest(1).unwrap()
    };
    let last = digest(&items);
    items.rotate_right(1);
    assert_eq!(digest(&items), last);
    // The order of pages counts.
    items.swap(2, 3);
    assert_ne!(digest(&items), last);
}

/// What KVM of Linux 7.3.4 and the emulated TDX module made MRTD of these pages, by the latter's own log.
const MRTD_OF_KVM: &str =
    "2647890f10d286d40c66b76617a649febe743c9870ea7eaaea9a774757400b86dc0e7b6cbaaacc1849b3bf9d13065878";

#[test]
fn tdx_equals_the_igvm_crate_and_what_kvm_launched() {
    let code = code();
    let items = items(&code, None);
    let mut measurement = TdxMeasurement::new();
    measurement.platform(&info(ImagePlatform::Tdx)).unwrap();
    for item in &items {
        measurement.import(MASK, item).unwrap();
    }
    let expected = igvm::measurement::generate_tdx_measurement(&directives(&items), MASK).unwrap();
    assert_eq!(hex(&measurement.mrtd()), hex(&expected));
    assert_eq!(hex(&measurement.mrtd()), MRTD_OF_KVM);
}

/// A whole image of ours, composed and from its file: the same digests, which are the `igvm` crate's for the file.
#[test]
fn a_composed_image_equals_the_igvm_crate() {
    let mut kernel = vec![0x90; 70_001];
    kernel[..0x400].fill(0);
    kernel[0x1f1] = 1;
    kernel[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
    kernel[0x201..0x208].copy_from_slice(b"\x6aHdrS\x0f\x02");
    kernel[0x211] = 1;
    kernel[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    kernel[0x230..0x234].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    kernel[0x234..0x238].copy_from_slice(&[1, 0, 1, 0]);
    kernel[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    kernel[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    kernel[0x260..0x264].copy_from_slice(&0x40_0000_u32.to_le_bytes());
    let source = Source {
        kernel: Blob::of(&kernel),
        kernel_head: &kernel,
        initrd: Some(Blob::of(b"an initrd")),
        command_line: "console=ttyS0",
    };
    let composition = compose(&source, &Options::default()).unwrap();
    let mut writer = Writer::default();
    composition.walk(Selection::All, &mut writer).unwrap();
    let mut file = Vec::new();
    writer.write(&mut file).unwrap();
    let theirs = IgvmFile::new_from_binary(&file, None).unwrap();
    let ours = Igvm::new(&file).unwrap();
    let mask = |platform| ours.platforms().iter().find(|info| info.platform == platform).unwrap().mask;

    let (mut composed, mut read) = (SnpMeasurement::new(), SnpMeasurement::new());
    composition.walk(Selection::One(ImagePlatform::Snp), &mut composed).unwrap();
    walk(&ours, Selection::One(ImagePlatform::Snp), &mut read).unwrap();
    let expected = igvm::measurement::generate_snp_measurement(
        theirs.initializations(),
        theirs.directives(),
        mask(ImagePlatform::Snp),
    );
    assert_eq!(hex(&read.digest(1).unwrap()), hex(&expected.unwrap()));
    assert_eq!(composed.digest(2), read.digest(2));
    assert_ne!(read.digest(1), read.digest(2));

    let (mut composed, mut read) = (TdxMeasurement::new(), TdxMeasurement::new());
    composition.walk(Selection::One(ImagePlatform::Tdx), &mut composed).unwrap();
    walk(&ours, Selection::One(ImagePlatform::Tdx), &mut read).unwrap();
    let expected = igvm::measurement::generate_tdx_measurement(theirs.directives(), mask(ImagePlatform::Tdx));
    assert_eq!(hex(&read.mrtd()), hex(&expected.unwrap()));
    assert_eq!(composed.mrtd(), read.mrtd());
}
