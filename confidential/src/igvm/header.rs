//! One variable header by itself: its type, and what its fields may say
//! whatever the other headers are.

use std::ops::Range;

use igvm_defs as defs;
use igvm_defs::IgvmVariableHeaderType as Type;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::context::{VpContext, vp_context};
use super::error::Problem;
use crate::image::importer::{
    CcaPolicy, ImagePlatform, PAGE, PageKind, ParameterKind, PublicKey, Signature, SnpIdBlock,
};

/// Bytes of a small page.
pub(super) const SMALL_PAGE: u64 = defs::PAGE_SIZE_4K;
/// Bytes of a large page.
const LARGE_PAGE: u64 = 2 << 20;

/// A variable header, its fields checked. `mask` is everywhere the compatibility mask: the bits
/// of the platforms that the header is for. Bits that no platform of the file has mean nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header<'a> {
    /// `SUPPORTED_PLATFORM`.
    Platform {
        /// Exactly one bit.
        mask: u32,
        /// Which platform.
        platform: ImagePlatform,
        /// 0 or 2.
        highest_vtl: u8,
        /// Guest-physical address, or 0.
        shared_gpa_boundary: u64,
    },
    /// `GUEST_POLICY`.
    GuestPolicy {
        /// See [`Header`].
        mask: u32,
        /// The platform's bits.
        policy: u64,
    },
    /// `CCA_POLICY`.
    CcaPolicy {
        /// See [`Header`].
        mask: u32,
        /// The policy.
        policy: CcaPolicy,
    },
    /// `RELOCATABLE_REGION` or `PAGE_TABLE_RELOCATION_REGION`.
    Relocation {
        /// See [`Header`].
        mask: u32,
    },
    /// `CORIM_DOCUMENT`.
    CorimDocument {
        /// See [`Header`].
        mask: u32,
        /// CBOR.
        document: &'a [u8],
    },
    /// `CORIM_SIGNATURE`.
    CorimSignature {
        /// See [`Header`].
        mask: u32,
        /// COSE_Sign1.
        signature: &'a [u8],
    },
    /// `VERSION_STRING`.
    VersionString(&'a str),
    /// `PAGE_DATA`.
    PageData {
        /// See [`Header`].
        mask: u32,
        /// Guest-physical address, aligned to the length.
        gpa: u64,
        /// 4 KiB or 2 MiB.
        length: u64,
        /// What kind of pages.
        kind: PageKind,
        /// The content.
        data: FileData<'a>,
    },
    /// `PARAMETER_AREA`.
    ParameterArea {
        /// Number of the area.
        area: u32,
        /// A multiple of 4 KiB, not 0.
        length: u64,
        /// The content where no parameter is written.
        initial: FileData<'a>,
    },
    /// One of the parameters.
    Parameter {
        /// Which one.
        kind: ParameterKind,
        /// Number of the area.
        area: u32,
        /// Where in the area, bytes.
        offset: u32,
    },
    /// `PARAMETER_INSERT`.
    ParameterInsert {
        /// See [`Header`].
        mask: u32,
        /// Guest-physical address, a multiple of 4 KiB.
        gpa: u64,
        /// Number of the area.
        area: u32,
    },
    /// `VP_CONTEXT`.
    VpContext {
        /// Names exactly one platform of the file.
        mask: u32,
        /// Guest-physical address, a multiple of 4 KiB.
        gpa: u64,
        /// Index of the vCPU.
        index: u16,
        /// The registers, in the platform's form.
        context: VpContext<'a>,
    },
    /// `REQUIRED_MEMORY`.
    RequiredMemory {
        /// See [`Header`].
        mask: u32,
        /// Guest-physical address, a multiple of 4 KiB.
        gpa: u64,
        /// A multiple of 4 KiB, not 0.
        length: u64,
    },
    /// `ERROR_RANGE`.
    ErrorRange {
        /// See [`Header`].
        mask: u32,
        /// Guest-physical address, a multiple of 4 KiB.
        gpa: u64,
        /// A multiple of 4 KiB, not 0.
        length: u64,
    },
    /// `SNP_ID_BLOCK`.
    SnpIdBlock {
        /// See [`Header`].
        mask: u32,
        /// The block.
        block: Box<SnpIdBlock>,
    },
    /// `VBS_MEASUREMENT`.
    VbsMeasurement {
        /// See [`Header`].
        mask: u32,
    },
    /// A header of an unknown type that may be skipped.
    Skipped,
}

/// Content that a header points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileData<'a> {
    /// The bytes; none for zeroes.
    pub bytes: &'a [u8],
    /// Where they lie in the file; `None` for zeroes.
    pub offset: Option<u64>,
}

/// The bytes of a file: those of its beginning from a copy, the others where the file is mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileBytes<'a> {
    /// A copy of the beginning, not longer than the file.
    pub head: &'a [u8],
    /// All of the file.
    pub mapped: &'a [u8],
}

impl<'a> FileBytes<'a> {
    /// The bytes in `range`, all of them from the same place. They are not read.
    pub fn get(&self, range: Range<usize>) -> Option<&'a [u8]> {
        self.head.get(range.clone()).or_else(|| self.mapped.get(range))
    }

    /// Length of the file, bytes.
    pub fn len(&self) -> usize {
        self.mapped.len()
    }
}

/// What the headers before it say about a file, as far as one header's meaning depends on it.
#[derive(Clone, Copy)]
pub(super) struct Surroundings<'a, 'p> {
    /// The whole file.
    pub file: FileBytes<'a>,
    /// Where the file data begin.
    pub data_start: usize,
    /// The bits and platforms of the platform headers.
    pub platforms: &'p [(u32, ImagePlatform)],
}

/// The name of a header type, without `IGVM_VHT_`.
pub fn header_name(header_type: u32) -> &'static str {
    match Type(header_type) {
        Type::IGVM_VHT_SUPPORTED_PLATFORM => "SUPPORTED_PLATFORM",
        Type::IGVM_VHT_GUEST_POLICY => "GUEST_POLICY",
        Type::IGVM_VHT_RELOCATABLE_REGION => "RELOCATABLE_REGION",
        Type::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION => "PAGE_TABLE_RELOCATION_REGION",
        Type::IGVM_VHT_CORIM_DOCUMENT => "CORIM_DOCUMENT",
        Type::IGVM_VHT_CORIM_SIGNATURE => "CORIM_SIGNATURE",
        Type::IGVM_VHT_CCA_POLICY => "CCA_POLICY",
        Type::IGVM_VHT_VERSION_STRING => "VERSION_STRING",
        Type::IGVM_VHT_PARAMETER_AREA => "PARAMETER_AREA",
        Type::IGVM_VHT_PAGE_DATA => "PAGE_DATA",
        Type::IGVM_VHT_PARAMETER_INSERT => "PARAMETER_INSERT",
        Type::IGVM_VHT_VP_CONTEXT => "VP_CONTEXT",
        Type::IGVM_VHT_REQUIRED_MEMORY => "REQUIRED_MEMORY",
        Type::IGVM_VHT_VP_COUNT_PARAMETER => "VP_COUNT_PARAMETER",
        Type::IGVM_VHT_SRAT => "SRAT",
        Type::IGVM_VHT_MADT => "MADT",
        Type::IGVM_VHT_MMIO_RANGES => "MMIO_RANGES",
        Type::IGVM_VHT_SNP_ID_BLOCK => "SNP_ID_BLOCK",
        Type::IGVM_VHT_MEMORY_MAP => "MEMORY_MAP",
        Type::IGVM_VHT_ERROR_RANGE => "ERROR_RANGE",
        Type::IGVM_VHT_COMMAND_LINE => "COMMAND_LINE",
        Type::IGVM_VHT_SLIT => "SLIT",
        Type::IGVM_VHT_PPTT => "PPTT",
        Type::IGVM_VHT_VBS_MEASUREMENT => "VBS_MEASUREMENT",
        Type::IGVM_VHT_DEVICE_TREE => "DEVICE_TREE",
        Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER => "ENVIRONMENT_INFO_PARAMETER",
        _ => "unknown type",
    }
}

/// Reads a header of the type `header_type`.
pub(super) fn parse<'a>(
    header_type: u32,
    optional: bool,
    content: &'a [u8],
    around: &Surroundings<'a, '_>,
) -> Result<Header<'a>, Problem> {
    if let Some(kind) = parameter_kind(header_type) {
        let raw: defs::IGVM_VHS_PARAMETER = read(content)?;
        return Ok(Header::Parameter { kind, area: raw.parameter_area_index, offset: raw.byte_offset });
    }
    match Type(header_type) {
        Type::IGVM_VHT_SUPPORTED_PLATFORM => platform(&read(content)?),
        Type::IGVM_VHT_GUEST_POLICY => {
            let raw: defs::IGVM_VHS_GUEST_POLICY = read(content)?;
            reserved(raw.reserved == 0, "the last field")?;
            Ok(Header::GuestPolicy { mask: raw.compatibility_mask, policy: raw.policy })
        }
        Type::IGVM_VHT_CCA_POLICY => cca_policy(&read(content)?),
        Type::IGVM_VHT_RELOCATABLE_REGION => {
            let raw: defs::IGVM_VHS_RELOCATABLE_REGION = read(content)?;
            Ok(Header::Relocation { mask: raw.compatibility_mask })
        }
        Type::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION => {
            let raw: defs::IGVM_VHS_PAGE_TABLE_RELOCATION = read(content)?;
            Ok(Header::Relocation { mask: raw.compatibility_mask })
        }
        Type::IGVM_VHT_CORIM_DOCUMENT => {
            let (mask, document) = corim(&read(content)?, around)?;
            Ok(Header::CorimDocument { mask, document })
        }
        Type::IGVM_VHT_CORIM_SIGNATURE => {
            let (mask, signature) = corim(&read(content)?, around)?;
            Ok(Header::CorimSignature { mask, signature })
        }
        Type::IGVM_VHT_VERSION_STRING => {
            std::str::from_utf8(content).map(Header::VersionString).map_err(|_| Problem::Text)
        }
        Type::IGVM_VHT_PAGE_DATA => page_data(&read(content)?, around),
        Type::IGVM_VHT_PARAMETER_AREA => {
            let raw: defs::IGVM_VHS_PARAMETER_AREA = read(content)?;
            let length = size("number_of_bytes", raw.number_of_bytes)?;
            let initial = around.data(raw.file_offset, length)?;
            Ok(Header::ParameterArea { area: raw.parameter_area_index, length, initial })
        }
        Type::IGVM_VHT_PARAMETER_INSERT => {
            let raw: defs::IGVM_VHS_PARAMETER_INSERT = read(content)?;
            aligned("gpa", raw.gpa, SMALL_PAGE)?;
            let mask = raw.compatibility_mask;
            Ok(Header::ParameterInsert { mask, gpa: raw.gpa, area: raw.parameter_area_index })
        }
        Type::IGVM_VHT_VP_CONTEXT => vp_context(&read(content)?, around),
        Type::IGVM_VHT_REQUIRED_MEMORY => {
            let raw: defs::IGVM_VHS_REQUIRED_MEMORY = read(content)?;
            reserved(raw.flags.reserved() == 0, "a flag")?;
            reserved(raw.reserved == 0, "the last field")?;
            let (gpa, length) = range(raw.gpa, "number_of_bytes", raw.number_of_bytes)?;
            Ok(Header::RequiredMemory { mask: raw.compatibility_mask, gpa, length })
        }
        Type::IGVM_VHT_ERROR_RANGE => {
            let raw: defs::IGVM_VHS_ERROR_RANGE = read(content)?;
            let (gpa, length) = range(raw.gpa, "size_bytes", raw.size_bytes)?;
            Ok(Header::ErrorRange { mask: raw.compatibility_mask, gpa, length })
        }
        Type::IGVM_VHT_SNP_ID_BLOCK => id_block(&read(content)?),
        Type::IGVM_VHT_VBS_MEASUREMENT => {
            let raw: defs::IGVM_VHS_VBS_MEASUREMENT = read(content)?;
            Ok(Header::VbsMeasurement { mask: raw.compatibility_mask })
        }
        _ if optional => Ok(Header::Skipped),
        _ => Err(Problem::UnknownType(header_type)),
    }
}

fn parameter_kind(header_type: u32) -> Option<ParameterKind> {
    Some(match Type(header_type) {
        Type::IGVM_VHT_VP_COUNT_PARAMETER => ParameterKind::VcpuCount,
        Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER => ParameterKind::EnvironmentInfo,
        Type::IGVM_VHT_COMMAND_LINE => ParameterKind::CommandLine,
        Type::IGVM_VHT_MEMORY_MAP => ParameterKind::MemoryMap,
        Type::IGVM_VHT_MMIO_RANGES => ParameterKind::MmioRanges,
        Type::IGVM_VHT_SRAT => ParameterKind::Srat,
        Type::IGVM_VHT_MADT => ParameterKind::Madt,
        Type::IGVM_VHT_SLIT => ParameterKind::Slit,
        Type::IGVM_VHT_PPTT => ParameterKind::Pptt,
        Type::IGVM_VHT_DEVICE_TREE => ParameterKind::DeviceTree,
        _ => return None,
    })
}

fn platform<'a>(raw: &defs::IGVM_VHS_SUPPORTED_PLATFORM) -> Result<Header<'a>, Problem> {
    let platform = match raw.platform_type {
        defs::IgvmPlatformType::NATIVE => ImagePlatform::Plain,
        defs::IgvmPlatformType::VSM_ISOLATION => ImagePlatform::Vsm,
        defs::IgvmPlatformType::SEV_SNP => ImagePlatform::Snp,
        defs::IgvmPlatformType::TDX => ImagePlatform::Tdx,
        defs::IgvmPlatformType::SEV => ImagePlatform::Sev,
        defs::IgvmPlatformType::SEV_ES => ImagePlatform::SevEs,
        defs::IgvmPlatformType::CCA => ImagePlatform::Cca,
        other => return Err(Problem::Value { field: "platform_type", value: other.0.into() }),
    };
    if !raw.compatibility_mask.is_power_of_two() {
        return Err(Problem::Mask(raw.compatibility_mask));
    }
    if !matches!(raw.highest_vtl, 0 | 2) {
        return Err(Problem::Value { field: "highest_vtl", value: raw.highest_vtl.into() });
    }
    // Every platform's version is 1.
    if raw.platform_version != defs::IGVM_NATIVE_PLATFORM_VERSION {
        return Err(Problem::Value { field: "platform_version", value: raw.platform_version.into() });
    }
    if raw.shared_gpa_boundary != 0 && matches!(platform, ImagePlatform::Plain | ImagePlatform::Vsm) {
        return Err(Problem::SharedBoundary(platform));
    }
    Ok(Header::Platform {
        mask: raw.compatibility_mask,
        platform,
        highest_vtl: raw.highest_vtl,
        shared_gpa_boundary: raw.shared_gpa_boundary,
    })
}

fn cca_policy<'a>(raw: &defs::IGVM_VHS_CCA_POLICY) -> Result<Header<'a>, Problem> {
    reserved(raw.reserved == 0, "the second field")?;
    reserved(raw.reserved2 == [0; 6], "the last field")?;
    let both = raw.attributes_required_zeroes & raw.attributes_required_ones;
    if both != 0 {
        return Err(Problem::Value { field: "attribute required to be both 0 and 1,", value: both });
    }
    if raw.hash_algorithm.0 > 2 {
        return Err(Problem::Value { field: "hash_algorithm", value: raw.hash_algorithm.0.into() });
    }
    if raw.lfa_policy.0 > 1 {
        return Err(Problem::Value { field: "lfa_policy", value: raw.lfa_policy.0.into() });
    }
    Ok(Header::CcaPolicy {
        mask: raw.compatibility_mask,
        policy: CcaPolicy {
            required_zeroes: raw.attributes_required_zeroes,
            required_ones: raw.attributes_required_ones,
            hash_algorithm: raw.hash_algorithm.0,
            lfa_policy: raw.lfa_policy.0,
        },
    })
}

fn corim<'a>(
    raw: &defs::IGVM_VHS_CORIM_DATA,
    around: &Surroundings<'a, '_>,
) -> Result<(u32, &'a [u8]), Problem> {
    reserved(raw.reserved == 0, "the last field")?;
    let data = around.data(raw.file_offset, raw.size_bytes.into())?;
    Ok((raw.compatibility_mask, data.bytes))
}

fn page_data<'a>(
    raw: &defs::IGVM_VHS_PAGE_DATA,
    around: &Surroundings<'a, '_>,
) -> Result<Header<'a>, Problem> {
    reserved(raw.flags.reserved() == 0, "a flag")?;
    reserved(raw.reserved == 0, "the last field")?;
    let kind = match raw.data_type {
        defs::IgvmPageDataType::NORMAL if raw.flags.shared() => PageKind::Shared,
        defs::IgvmPageDataType::NORMAL if raw.flags.unmeasured() => PageKind::Unmeasured,
        defs::IgvmPageDataType::NORMAL => PageKind::Measured,
        defs::IgvmPageDataType::SECRETS => PageKind::SnpSecrets,
        defs::IgvmPageDataType::CPUID_DATA => PageKind::SnpCpuid,
        defs::IgvmPageDataType::CPUID_XF => PageKind::SnpCpuidXf,
        other => return Err(Problem::Value { field: "data_type", value: other.0.into() }),
    };
    let length = if raw.flags.is_2mb_page() { LARGE_PAGE } else { SMALL_PAGE };
    let special = !matches!(kind, PageKind::Measured | PageKind::Unmeasured | PageKind::Shared);
    if special && (length == LARGE_PAGE || raw.flags.shared()) {
        return Err(Problem::Value { field: "flags", value: u32::from(raw.flags).into() });
    }
    aligned("gpa", raw.gpa, length)?;
    no_wrap(raw.gpa, length)?;
    let data = around.data(raw.file_offset, length)?;
    Ok(Header::PageData { mask: raw.compatibility_mask, gpa: raw.gpa, length, kind, data })
}

fn id_block<'a>(raw: &defs::IGVM_VHS_SNP_ID_BLOCK) -> Result<Header<'a>, Problem> {
    reserved(raw.reserved == [0; 3], "the third field")?;
    let signature = |raw: &defs::IGVM_VHS_SNP_ID_BLOCK_SIGNATURE| Signature { r: raw.r_comp, s: raw.s_comp };
    let key = |raw: &defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY| {
        reserved(raw.reserved == 0, "a field of the key")?;
        Ok(PublicKey { curve: raw.curve, x: raw.qx, y: raw.qy })
    };
    let author = match raw.author_key_enabled {
        0 => {
            let none = raw.author_key_signature.as_bytes().iter().chain(raw.author_public_key.as_bytes());
            reserved(none.copied().all(|byte| byte == 0), "the author key, where it is not enabled,")?;
            None
        }
        1 => Some((signature(&raw.author_key_signature), key(&raw.author_public_key)?)),
        other => return Err(Problem::Value { field: "author_key_enabled", value: other.into() }),
    };
    Ok(Header::SnpIdBlock {
        mask: raw.compatibility_mask,
        block: Box::new(SnpIdBlock {
            launch_digest: raw.ld,
            family_id: raw.family_id,
            image_id: raw.image_id,
            version: raw.version,
            guest_svn: raw.guest_svn,
            id_key_algorithm: raw.id_key_algorithm,
            author_key_algorithm: raw.author_key_algorithm,
            id_signature: signature(&raw.id_key_signature),
            id_key: key(&raw.id_public_key)?,
            author,
        }),
    })
}

impl<'a> Surroundings<'a, '_> {
    /// The file data at `offset`; an offset of 0 means zeroes.
    pub(super) fn data(&self, offset: u32, length: u64) -> Result<FileData<'a>, Problem> {
        if offset == 0 {
            return Ok(FileData { bytes: &[], offset: None });
        }
        let outside = Problem::Data { offset, length };
        let start = offset as usize;
        if start < self.data_start {
            return Err(outside);
        }
        let bytes = usize::try_from(length)
            .ok()
            .and_then(|length| start.checked_add(length))
            .and_then(|end| self.file.get(start..end));
        bytes.map(|bytes| FileData { bytes, offset: Some(offset.into()) }).ok_or(outside)
    }

    /// The page of file data at `offset`, which must be there.
    pub(super) fn page(&self, offset: u32) -> Result<&'a [u8; PAGE], Problem> {
        self.data(offset, SMALL_PAGE)?.bytes.first_chunk().ok_or(Problem::NoData)
    }
}

/// Reads a structure that is the whole of `content`.
pub(super) fn read<T: FromBytes + KnownLayout + Immutable>(content: &[u8]) -> Result<T, Problem> {
    T::read_from_bytes(content)
        .map_err(|_| Problem::Length { length: content.len(), expected: size_of::<T>() })
}

/// Reads a structure at the beginning of a page that is zero otherwise.
pub(super) fn read_padded<T: FromBytes + KnownLayout + Immutable>(page: &[u8; PAGE]) -> Result<T, Problem> {
    let (value, rest) =
        T::read_from_prefix(page).map_err(|_| Problem::Length { length: PAGE, expected: size_of::<T>() })?;
    reserved(rest.iter().all(|byte| *byte == 0), "the rest of the context's page")?;
    Ok(value)
}

pub(super) fn reserved(is_zero: bool, field: &'static str) -> Result<(), Problem> {
    if is_zero { Ok(()) } else { Err(Problem::Reserved(field)) }
}

pub(super) fn aligned(field: &'static str, value: u64, unit: u64) -> Result<(), Problem> {
    if value.is_multiple_of(unit) { Ok(()) } else { Err(Problem::Unaligned { field, value, unit }) }
}

fn no_wrap(gpa: u64, length: u64) -> Result<(), Problem> {
    gpa.checked_add(length).map(drop).ok_or(Problem::Wraps { gpa, length })
}

/// A size in whole pages, at least one.
fn size(field: &'static str, value: u64) -> Result<u64, Problem> {
    aligned(field, value, SMALL_PAGE)?;
    if value == 0 { Err(Problem::Empty(field)) } else { Ok(value) }
}

fn range(gpa: u64, field: &'static str, length: u32) -> Result<(u64, u64), Problem> {
    aligned("gpa", gpa, SMALL_PAGE)?;
    let length = size(field, length.into())?;
    no_wrap(gpa, length)?;
    Ok((gpa, length))
}
