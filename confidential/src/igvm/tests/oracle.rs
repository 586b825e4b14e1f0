//! The reader and the writer against the `igvm` crate, which knows nothing of them.

use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision};
use igvm_defs as defs;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::igvm::reader::{Architecture, Igvm};
use crate::igvm::{FileData, Header, VpContext};
use crate::image::importer::{
    CcaPolicy, DescriptorTable, ImagePlatform, Item, NativeContext, PAGE, PageKind, Parameter, ParameterKind,
    PlatformInfo, PublicKey, Segment, Signature, SnpIdBlock, VcpuContext,
};
use crate::image::testing::{file, flat, pages, parameters, record};
use crate::image::walk::Selection;

/// Headers without the offsets of their data, which depend on how a file is laid out.
fn without_offsets(mut header: Header<'_>) -> Header<'_> {
    match &mut header {
        Header::PageData { data, .. } | Header::ParameterArea { initial: data, .. } => data.offset = None,
        _ => {}
    }
    header
}

fn headers<'a>(file: &Igvm<'a>) -> Vec<Header<'a>> {
    file.headers().map(|entry| without_offsets(entry.unwrap().header)).collect()
}

fn kind(flags: defs::IgvmPageDataFlags, data_type: defs::IgvmPageDataType) -> PageKind {
    match (data_type, flags.shared(), flags.unmeasured()) {
        (defs::IgvmPageDataType::SECRETS, ..) => PageKind::SnpSecrets,
        (defs::IgvmPageDataType::CPUID_DATA, ..) => PageKind::SnpCpuid,
        (defs::IgvmPageDataType::CPUID_XF, ..) => PageKind::SnpCpuidXf,
        (_, true, _) => PageKind::Shared,
        (_, _, true) => PageKind::Unmeasured,
        _ => PageKind::Measured,
    }
}

/// What our reader must make of what the crate has read.
fn expected(oracle: &IgvmFile) -> Vec<Header<'_>> {
    let platforms = oracle.platforms().iter().map(|header| match header {
        IgvmPlatformHeader::SupportedPlatform(it) => Header::Platform {
            mask: it.compatibility_mask,
            platform: ALL_PLATFORMS.into_iter().find(|(_, raw)| *raw == it.platform_type).unwrap().0,
            highest_vtl: it.highest_vtl,
            shared_gpa_boundary: it.shared_gpa_boundary,
        },
    });
    let initialization = oracle.initializations().iter().map(|header| match header {
        IgvmInitializationHeader::GuestPolicy { policy, compatibility_mask } => {
            Header::GuestPolicy { mask: *compatibility_mask, policy: *policy }
        }
        IgvmInitializationHeader::CcaPolicy {
            compatibility_mask,
            attributes_required_zeroes,
            attributes_required_ones,
            hash_algorithm,
            lfa_policy,
        } => Header::CcaPolicy {
            mask: *compatibility_mask,
            policy: CcaPolicy {
                required_zeroes: *attributes_required_zeroes,
                required_ones: *attributes_required_ones,
                hash_algorithm: hash_algorithm.0,
                lfa_policy: lfa_policy.0,
            },
        },
        IgvmInitializationHeader::RelocatableRegion { compatibility_mask, .. }
        | IgvmInitializationHeader::PageTableRelocationRegion { compatibility_mask, .. } => {
            Header::Relocation { mask: *compatibility_mask }
        }
        IgvmInitializationHeader::CorimDocument { compatibility_mask, document } => {
            Header::CorimDocument { mask: *compatibility_mask, document }
        }
        IgvmInitializationHeader::CorimSignature { compatibility_mask, signature } => {
            Header::CorimSignature { mask: *compatibility_mask, signature }
        }
    });
    let directives = oracle.directives().iter().map(expected_directive);
    platforms.chain(initialization).chain(directives).collect()
}

fn expected_directive(directive: &IgvmDirectiveHeader) -> Header<'_> {
    let parameter = |kind, it: &defs::IGVM_VHS_PARAMETER| Header::Parameter {
        kind,
        area: it.parameter_area_index,
        offset: it.byte_offset,
    };
    match directive {
        IgvmDirectiveHeader::PageData { gpa, compatibility_mask, flags, data_type, data } => {
            Header::PageData {
                mask: *compatibility_mask,
                gpa: *gpa,
                length: 4096,
                kind: kind(*flags, *data_type),
                data: FileData { bytes: data, offset: None },
            }
        }
        IgvmDirectiveHeader::ParameterArea { number_of_bytes, parameter_area_index, initial_data } => {
            Header::ParameterArea {
                area: *parameter_area_index,
                length: *number_of_bytes,
                initial: FileData { bytes: initial_data, offset: None },
            }
        }
        IgvmDirectiveHeader::VpCount(it) => parameter(ParameterKind::VcpuCount, it),
        IgvmDirectiveHeader::EnvironmentInfo(it) => parameter(ParameterKind::EnvironmentInfo, it),
        IgvmDirectiveHeader::Srat(it) => parameter(ParameterKind::Srat, it),
        IgvmDirectiveHeader::Madt(it) => parameter(ParameterKind::Madt, it),
        IgvmDirectiveHeader::Slit(it) => parameter(ParameterKind::Slit, it),
        IgvmDirectiveHeader::Pptt(it) => parameter(ParameterKind::Pptt, it),
        IgvmDirectiveHeader::MmioRanges(it) => parameter(ParameterKind::MmioRanges, it),
        IgvmDirectiveHeader::MemoryMap(it) => parameter(ParameterKind::MemoryMap, it),
        IgvmDirectiveHeader::CommandLine(it) => parameter(ParameterKind::CommandLine, it),
        IgvmDirectiveHeader::DeviceTree(it) => parameter(ParameterKind::DeviceTree, it),
        IgvmDirectiveHeader::RequiredMemory { gpa, compatibility_mask, number_of_bytes, .. } => {
            Header::RequiredMemory { mask: *compatibility_mask, gpa: *gpa, length: (*number_of_bytes).into() }
        }
        IgvmDirectiveHeader::SnpVpContext { gpa, compatibility_mask, vp_index, vmsa } => Header::VpContext {
            mask: *compatibility_mask,
            gpa: *gpa,
            index: *vp_index,
            context: VpContext::Vmsa(vmsa.as_bytes().first_chunk().unwrap()),
        },
        IgvmDirectiveHeader::X64NativeVpContext { compatibility_mask, vp_index, context } => {
            Header::VpContext {
                mask: *compatibility_mask,
                gpa: 0,
                index: *vp_index,
                context: VpContext::NativeX64(Box::new(registers(context))),
            }
        }
        IgvmDirectiveHeader::AArch64CcaVpContext { compatibility_mask, vp_index, context: it } => {
            let x = [it.x0, it.x1, it.x2, it.x3, it.x4, it.x5, it.x6, it.x7];
            Header::VpContext {
                mask: *compatibility_mask,
                gpa: 0,
                index: *vp_index,
                context: VpContext::Cca { x, pc: it.pc, flags: it.flags },
            }
        }
        IgvmDirectiveHeader::X64VbsVpContext { .. } | IgvmDirectiveHeader::AArch64VbsVpContext { .. } => {
            unreachable!("not generated")
        }
        IgvmDirectiveHeader::ParameterInsert(it) => Header::ParameterInsert {
            mask: it.compatibility_mask,
            gpa: it.gpa,
            area: it.parameter_area_index,
        },
        IgvmDirectiveHeader::ErrorRange { gpa, compatibility_mask, size_bytes } => {
            Header::ErrorRange { mask: *compatibility_mask, gpa: *gpa, length: (*size_bytes).into() }
        }
        IgvmDirectiveHeader::SnpIdBlock {
            compatibility_mask,
            author_key_enabled,
            ld,
            family_id,
            image_id,
            version,
            guest_svn,
            id_key_algorithm,
            author_key_algorithm,
            id_key_signature,
            id_public_key,
            author_key_signature,
            author_public_key,
            reserved: _,
        } => {
            let signature =
                |it: &defs::IGVM_VHS_SNP_ID_BLOCK_SIGNATURE| Signature { r: it.r_comp, s: it.s_comp };
            let key = |it: &defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY| PublicKey {
                curve: it.curve,
                x: it.qx,
                y: it.qy,
            };
            Header::SnpIdBlock {
                mask: *compatibility_mask,
                block: Box::new(SnpIdBlock {
                    launch_digest: *ld,
                    family_id: *family_id,
                    image_id: *image_id,
                    version: *version,
                    guest_svn: *guest_svn,
                    id_key_algorithm: *id_key_algorithm,
                    author_key_algorithm: *author_key_algorithm,
                    id_signature: signature(id_key_signature),
                    id_key: key(id_public_key),
                    author: (*author_key_enabled == 1)
                        .then(|| (signature(author_key_signature), key(author_public_key))),
                }),
            }
        }
        IgvmDirectiveHeader::VbsMeasurement { compatibility_mask, .. } => {
            Header::VbsMeasurement { mask: *compatibility_mask }
        }
    }
}

fn registers(it: &defs::IgvmNativeVpContextX64) -> NativeContext {
    NativeContext {
        rax: it.rax,
        rcx: it.rcx,
        rdx: it.rdx,
        rbx: it.rbx,
        rsp: it.rsp,
        rbp: it.rbp,
        rsi: it.rsi,
        rdi: it.rdi,
        r8: it.r8,
        r9: it.r9,
        r10: it.r10,
        r11: it.r11,
        r12: it.r12,
        r13: it.r13,
        r14: it.r14,
        r15: it.r15,
        rip: it.rip,
        rflags: it.rflags,
        idtr: DescriptorTable { base: it.idtr_base, limit: it.idtr_limit },
        gdtr: DescriptorTable { base: it.gdtr_base, limit: it.gdtr_limit },
        code: Segment {
            selector: it.code_selector,
            attributes: it.code_attributes,
            base: it.code_base,
            limit: it.code_limit,
        },
        data: Segment {
            selector: it.data_selector,
            attributes: it.data_attributes,
            base: it.data_base,
            limit: it.data_limit,
        },
        gs_base: it.gs_base,
        cr0: it.cr0,
        cr3: it.cr3,
        cr4: it.cr4,
        efer: it.efer,
    }
}

const ALL_PLATFORMS: [(ImagePlatform, defs::IgvmPlatformType); 7] = [
    (ImagePlatform::Plain, defs::IgvmPlatformType::NATIVE),
    (ImagePlatform::Vsm, defs::IgvmPlatformType::VSM_ISOLATION),
    (ImagePlatform::Snp, defs::IgvmPlatformType::SEV_SNP),
    (ImagePlatform::Tdx, defs::IgvmPlatformType::TDX),
    (ImagePlatform::Sev, defs::IgvmPlatformType::SEV),
    (ImagePlatform::SevEs, defs::IgvmPlatformType::SEV_ES),
    (ImagePlatform::Cca, defs::IgvmPlatformType::CCA),
];

fn platforms() -> impl Strategy<Value = (IgvmRevision, Vec<IgvmPlatformHeader>)> {
    let x64 = subsequence(vec![0_usize, 1, 2, 3, 4, 5], 1..=6);
    let aarch64 = subsequence(vec![1_usize, 6], 1..=2);
    let chosen = prop_oneof![
        3 => (any::<bool>(), x64).prop_map(|(v1, chosen)| {
            let v2 = IgvmRevision::V2 { arch: Arch::X64, page_size: 4096 };
            (if v1 { IgvmRevision::V1 } else { v2 }, chosen)
        }),
        1 => aarch64.prop_map(|chosen| (IgvmRevision::V2 { arch: Arch::AArch64, page_size: 4096 }, chosen)),
    ];
    (chosen, vec(any::<(bool, u64)>(), 7)).prop_map(|((revision, chosen), extras)| {
        let headers = chosen.into_iter().map(|number| {
            let (vtl, boundary) = extras[number];
            IgvmPlatformHeader::SupportedPlatform(defs::IGVM_VHS_SUPPORTED_PLATFORM {
                compatibility_mask: 1 << (number * 4),
                highest_vtl: if vtl { 2 } else { 0 },
                platform_type: ALL_PLATFORMS[number].1,
                platform_version: 1,
                shared_gpa_boundary: if number < 2 { 0 } else { boundary },
            })
        });
        (revision, headers.collect())
    })
}

/// What one directive, or a few that belong together, are made of.
#[derive(Clone, Debug)]
struct Seed {
    choice: u8,
    mask: u32,
    byte: u8,
    flag: u8,
    number: u32,
    long: u64,
}

fn seeds() -> impl Strategy<Value = Vec<Seed>> {
    let mask = prop_oneof![Just(u32::MAX), any::<u32>(), select(vec![1_u32, 0x10, 0x100, 0x1000])];
    let seed = (0_u8..10, mask, any::<u8>(), 0_u8..6, any::<u32>(), any::<u64>())
        .prop_map(|(choice, mask, byte, flag, number, long)| Seed { choice, mask, byte, flag, number, long });
    vec(seed, 1..24)
}

fn bytes_of<T: FromBytes + FromZeros>(seed: &Seed) -> T {
    let bytes: Vec<u8> = (0..size_of::<T>())
        .map(|index| seed.byte.wrapping_mul(index as u8).wrapping_add(seed.flag))
        .collect();
    T::read_from_bytes(&bytes).unwrap()
}

/// Directives that the crate takes: `position` places each one where nothing else is.
fn directives(
    seed: &Seed,
    position: usize,
    platforms: &[(u32, defs::IgvmPlatformType)],
) -> Vec<IgvmDirectiveHeader> {
    let gpa = ((position as u64) << 24) + (seed.long % 64) * 4096;
    let content =
        |pages: usize| if seed.byte.is_multiple_of(4) { Vec::new() } else { vec![seed.byte; pages * 4096] };
    let (mask, area) = (seed.mask, position as u32);
    match seed.choice {
        0..=2 => {
            let none = defs::IgvmPageDataFlags::new();
            let (flags, data_type) = [
                (none, defs::IgvmPageDataType::NORMAL),
                (none.with_unmeasured(true), defs::IgvmPageDataType::NORMAL),
                (none.with_shared(true), defs::IgvmPageDataType::NORMAL),
                (none.with_unmeasured(true), defs::IgvmPageDataType::SECRETS),
                (none, defs::IgvmPageDataType::CPUID_DATA),
                (none, defs::IgvmPageDataType::CPUID_XF),
            ][seed.flag as usize];
            let data = content(1);
            vec![IgvmDirectiveHeader::PageData { gpa, compatibility_mask: mask, flags, data_type, data }]
        }
        3 | 4 => {
            let pages = 1 + (seed.number % 3) as usize;
            let byte_offset = seed.number % (pages as u32 * 4096);
            let it = defs::IGVM_VHS_PARAMETER { parameter_area_index: area, byte_offset };
            let all = [
                IgvmDirectiveHeader::VpCount(it),
                IgvmDirectiveHeader::EnvironmentInfo(it),
                IgvmDirectiveHeader::Srat(it),
                IgvmDirectiveHeader::Madt(it),
                IgvmDirectiveHeader::Slit(it),
                IgvmDirectiveHeader::Pptt(it),
                IgvmDirectiveHeader::MmioRanges(it),
                IgvmDirectiveHeader::MemoryMap(it),
                IgvmDirectiveHeader::CommandLine(it),
                IgvmDirectiveHeader::DeviceTree(it),
            ];
            let mut list = vec![IgvmDirectiveHeader::ParameterArea {
                number_of_bytes: pages as u64 * 4096,
                parameter_area_index: area,
                initial_data: content(pages),
            }];
            list.extend(all.into_iter().skip(seed.byte as usize % 10).take(seed.flag.into()));
            if seed.choice == 3 {
                list.push(IgvmDirectiveHeader::ParameterInsert(defs::IGVM_VHS_PARAMETER_INSERT {
                    gpa,
                    compatibility_mask: mask,
                    parameter_area_index: area,
                }));
            }
            list
        }
        5 => {
            let (compatibility_mask, platform) = platforms[seed.number as usize % platforms.len()];
            let vp_index = position as u16;
            vec![match platform {
                defs::IgvmPlatformType::NATIVE | defs::IgvmPlatformType::SEV => {
                    let mut context: defs::IgvmNativeVpContextX64 = bytes_of(seed);
                    context.reserved = [0; 2];
                    let context = Box::new(context);
                    IgvmDirectiveHeader::X64NativeVpContext { compatibility_mask, vp_index, context }
                }
                defs::IgvmPlatformType::SEV_SNP | defs::IgvmPlatformType::SEV_ES => {
                    let vmsa = Box::new(bytes_of(seed));
                    IgvmDirectiveHeader::SnpVpContext { gpa, compatibility_mask, vp_index, vmsa }
                }
                defs::IgvmPlatformType::CCA => {
                    let context = Box::new(bytes_of(seed));
                    IgvmDirectiveHeader::AArch64CcaVpContext { compatibility_mask, vp_index, context }
                }
                _ => return Vec::new(),
            }]
        }
        6 => vec![IgvmDirectiveHeader::RequiredMemory {
            gpa: seed.long & !0xfff & (u64::MAX >> 1),
            compatibility_mask: mask,
            number_of_bytes: (seed.number | 0x1000) & !0xfff,
            vtl2_protectable: seed.flag & 1 != 0,
        }],
        7 => vec![IgvmDirectiveHeader::ErrorRange {
            gpa,
            compatibility_mask: mask,
            size_bytes: (seed.number | 0x1000) & !0xfff,
        }],
        8 => {
            let it: defs::IGVM_VHS_SNP_ID_BLOCK = bytes_of(seed);
            let author_key_enabled = seed.flag & 1;
            let key = |key: defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, keep: bool| {
                let empty = Box::new(FromZeros::new_zeroed());
                if keep {
                    Box::new(defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { reserved: 0, ..key })
                } else {
                    empty
                }
            };
            let Some((compatibility_mask, _)) =
                platforms.iter().find(|it| it.1 == defs::IgvmPlatformType::SEV_SNP)
            else {
                return Vec::new();
            };
            vec![IgvmDirectiveHeader::SnpIdBlock {
                compatibility_mask: *compatibility_mask,
                author_key_enabled,
                reserved: [0; 3],
                ld: it.ld,
                family_id: it.family_id,
                image_id: it.image_id,
                version: it.version,
                guest_svn: it.guest_svn,
                id_key_algorithm: it.id_key_algorithm,
                author_key_algorithm: it.author_key_algorithm,
                id_key_signature: Box::new(it.id_key_signature),
                id_public_key: key(it.id_public_key, true),
                author_key_signature: match author_key_enabled {
                    1 => Box::new(it.author_key_signature),
                    _ => Box::new(FromZeros::new_zeroed()),
                },
                author_public_key: key(it.author_public_key, author_key_enabled == 1),
            }]
        }
        _ => vec![IgvmDirectiveHeader::VbsMeasurement {
            compatibility_mask: mask,
            version: seed.number,
            product_id: 1,
            module_id: 2,
            security_version: 3,
            policy_flags: 4,
            boot_digest_algo: 1,
            signing_algo: 1,
            boot_measurement_digest: Box::new([seed.byte; 64]),
            signature: Box::new([seed.byte; 256]),
            public_key: Box::new([seed.byte; 512]),
        }],
    }
}

/// A file as the crate makes it.
fn oracle_file() -> impl Strategy<Value = IgvmFile> {
    (platforms(), any::<[u64; 2]>(), 0_u8..4, seeds()).prop_map(
        |((revision, headers), policies, corims, seeds)| {
            let platforms: Vec<_> = headers
                .iter()
                .map(|IgvmPlatformHeader::SupportedPlatform(it)| (it.compatibility_mask, it.platform_type))
                .collect();
            let mut initialization = Vec::new();
            for ((mask, platform), policy) in platforms.iter().zip(policies) {
                initialization
                    .push(IgvmInitializationHeader::GuestPolicy { policy, compatibility_mask: *mask });
                if *platform == defs::IgvmPlatformType::CCA {
                    initialization.push(IgvmInitializationHeader::CcaPolicy {
                        compatibility_mask: *mask,
                        attributes_required_zeroes: policy,
                        attributes_required_ones: !policy,
                        hash_algorithm: defs::CcaHashAlgorithm(policy as u8 % 3),
                        lfa_policy: defs::CcaLfaPolicy(policy as u8 % 2),
                    });
                }
            }
            let compatibility_mask = platforms[0].0;
            if corims >= 1 {
                let document = vec![0xc0; 100];
                initialization.push(IgvmInitializationHeader::CorimDocument { compatibility_mask, document });
            }
            if corims >= 2 {
                let signature = vec![0xc1; 33];
                initialization
                    .push(IgvmInitializationHeader::CorimSignature { compatibility_mask, signature });
            }
            let mut id_blocks = 0;
            let directives = seeds
                .iter()
                .enumerate()
                .filter(|(_, seed)| {
                    id_blocks += usize::from(seed.choice == 8);
                    seed.choice != 8 || id_blocks == 1
                })
                .flat_map(|(position, seed)| directives(seed, position, &platforms))
                .collect();
            IgvmFile::new(revision, headers, initialization, directives).unwrap()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn files_of_the_crate_read_alike(oracle in oracle_file()) {
        let mut bytes = Vec::new();
        oracle.serialize(&mut bytes).unwrap();
        let ours = Igvm::new(&bytes).unwrap();
        prop_assert_eq!(headers(&ours), expected(&oracle));
        // Without file data the crate does not read its own files.
        match IgvmFile::new_from_binary(&bytes, None) {
            Ok(read) => prop_assert_eq!(headers(&ours), expected(&read)),
            Err(_) => prop_assert!(oracle.directives().iter().all(|it| !has_data(it))),
        }
    }

    #[test]
    fn files_of_ours_read_alike((infos, items) in items()) {
        let items: Vec<_> = items.iter().map(|(mask, item)| (*mask, item.as_item())).collect();
        let bytes = file(&infos, &items);
        let read = record(&bytes, Selection::All).unwrap();
        prop_assert_eq!(&read.platforms, &infos);
        prop_assert_eq!(flat(&read.items), flat(&items));

        let ours = Igvm::new(&bytes).unwrap();
        // A file of zeroes has no data, and the crate does not read those.
        if bytes.len() > 4096 {
            let oracle = IgvmFile::new_from_binary(&bytes, None).unwrap();
            prop_assert_eq!(headers(&ours), expected(&oracle));
        }
        // Writing what was read gives the same file.
        prop_assert_eq!(file(&read.platforms, &read.items), bytes);
    }
}

fn has_data(directive: &IgvmDirectiveHeader) -> bool {
    match directive {
        IgvmDirectiveHeader::PageData { data, .. } => !data.is_empty(),
        IgvmDirectiveHeader::ParameterArea { initial_data, .. } => !initial_data.is_empty(),
        IgvmDirectiveHeader::SnpVpContext { .. }
        | IgvmDirectiveHeader::X64NativeVpContext { .. }
        | IgvmDirectiveHeader::AArch64CcaVpContext { .. } => true,
        _ => false,
    }
}

/// What an [`Item`] borrows.
#[derive(Clone, Debug)]
enum Owned {
    Pages(PageKind, u64, u64, Vec<u8>),
    Parameters(u64, u64, Vec<u8>, Vec<Parameter>),
    Vmsa(Box<[u8; PAGE]>),
    Native(Box<NativeContext>),
    RequiredMemory(u64, u64),
    IdBlock(Box<SnpIdBlock>),
}

impl Owned {
    fn as_item(&self) -> Item<'_> {
        match self {
            Self::Pages(kind, gpa, count, bytes) => pages(*kind, *gpa, *count, bytes),
            Self::Parameters(gpa, count, bytes, values) => parameters(*gpa, *count, bytes, values.clone()),
            Self::Vmsa(vmsa) => {
                Item::Vcpu { index: 0, context: VcpuContext::SnpVmsa { gpa: 0xffff_ffff_f000, vmsa } }
            }
            Self::Native(context) => {
                Item::Vcpu { index: 0, context: VcpuContext::NativeX64(context.clone()) }
            }
            Self::RequiredMemory(gpa, length) => Item::RequiredMemory { gpa: *gpa, length: *length },
            Self::IdBlock(block) => Item::SnpIdBlock(block.clone()),
        }
    }
}

fn items() -> impl Strategy<Value = (Vec<PlatformInfo>, Vec<(u32, Owned)>)> {
    let info = |platform, mask| {
        any::<Option<u64>>().prop_map(move |policy| PlatformInfo {
            platform,
            mask,
            highest_vtl: 0,
            shared_gpa_boundary: 0,
            policy,
            cca_policy: None,
        })
    };
    let infos = (info(ImagePlatform::Plain, 1), info(ImagePlatform::Snp, 2), info(ImagePlatform::Tdx, 4))
        .prop_map(|(plain, snp, tdx)| vec![plain, snp, tdx]);
    let kinds = vec![
        PageKind::Measured,
        PageKind::Unmeasured,
        PageKind::Shared,
        PageKind::SnpSecrets,
        PageKind::SnpCpuid,
        PageKind::SnpCpuidXf,
    ];
    let values = vec((0_u32..4096).prop_map(|offset| Parameter { kind: ParameterKind::Madt, offset }), 0..3);
    // An extent may be zeroes, end in the middle of a page, or be followed by zeroes.
    let item = prop_oneof![
        4 => (select(kinds), 1_u64..5, 0_usize..4 * PAGE, any::<u8>()).prop_map(|(kind, count, length, byte)| {
            Owned::Pages(kind, 0, count, vec![byte; length.min(count as usize * PAGE)])
        }),
        2 => (1_u64..4, 0_usize..3 * PAGE, any::<u8>(), values).prop_map(|(count, length, byte, values)| {
            Owned::Parameters(0, count, vec![byte; length.min(count as usize * PAGE)], values)
        }),
        1 => (1_u64..1000).prop_map(|pages| Owned::RequiredMemory(pages << 12, pages << 12)),
    ];
    let contexts = (any::<bool>(), any::<u8>(), any::<[u64; 6]>(), any::<[u16; 4]>());
    (infos, vec((1_u32..8, item, 0_u64..3), 0..12), contexts).prop_map(
        |(infos, mut items, (with_author, byte, longs, shorts))| {
            let mut gpa = 0x10_0000;
            let mut list: Vec<(u32, Owned)> = Vec::new();
            for (mask, mut item, gap) in items.drain(..) {
                if let Owned::Pages(_, at, count, _) | Owned::Parameters(at, count, ..) = &mut item {
                    *at = gpa + gap * 4096;
                    gpa = *at + *count * 4096;
                }
                list.push((mask, item));
            }
            let signature = Signature { r: [byte; 72], s: [!byte; 72] };
            let key = PublicKey { curve: 2, x: [byte; 72], y: [byte ^ 1; 72] };
            list.push((
                1,
                Owned::Native(Box::new(NativeContext {
                    rax: longs[0],
                    rsp: longs[1],
                    rip: longs[2],
                    cr3: longs[3],
                    efer: longs[4],
                    gdtr: DescriptorTable { base: longs[5], limit: shorts[0] },
                    code: Segment { selector: shorts[1], attributes: shorts[2], base: 7, limit: 9 },
                    data: Segment { selector: shorts[3], ..Segment::default() },
                    ..NativeContext::default()
                })),
            ));
            list.push((2, Owned::Vmsa(Box::new([byte; PAGE]))));
            list.push((
                2,
                Owned::IdBlock(Box::new(SnpIdBlock {
                    launch_digest: [byte; 48],
                    family_id: [1; 16],
                    image_id: [2; 16],
                    version: 1,
                    guest_svn: 7,
                    id_key_algorithm: 1,
                    author_key_algorithm: 1,
                    id_signature: signature,
                    id_key: key,
                    author: with_author.then_some((signature, key)),
                })),
            ));
            (infos, list)
        },
    )
}

#[test]
fn versions_and_architectures() {
    let platform = |platform_type| {
        IgvmPlatformHeader::SupportedPlatform(defs::IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: 1,
            highest_vtl: 0,
            platform_type,
            platform_version: 1,
            shared_gpa_boundary: 0,
        })
    };
    let v2 = |arch| IgvmRevision::V2 { arch, page_size: 4096 };
    for (revision, platform_type, version, architecture) in [
        (IgvmRevision::V1, defs::IgvmPlatformType::SEV_SNP, 1, Architecture::X64),
        (v2(Arch::X64), defs::IgvmPlatformType::NATIVE, 2, Architecture::X64),
        (v2(Arch::AArch64), defs::IgvmPlatformType::CCA, 2, Architecture::Aarch64),
    ] {
        let mut bytes = Vec::new();
        IgvmFile::new(revision, vec![platform(platform_type)], vec![], vec![])
            .unwrap()
            .serialize(&mut bytes)
            .unwrap();
        let ours = Igvm::new(&bytes).unwrap();
        assert_eq!((ours.version(), ours.architecture()), (version, architecture));
    }
}
