//! What the reader refuses, and that nothing in a file makes it panic or work for ever.

use igvm_defs as defs;
use igvm_defs::IgvmVariableHeaderType as Type;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::igvm::reader::Igvm;
use crate::igvm::{HeaderError, Problem, ReadError};
use crate::image::importer::{ImagePlatform, Importer, Item, PlatformInfo};
use crate::image::walk::{Selection, walk};

/// Where [`Raw`] puts its file data.
const DATA: u32 = 0x3000;
/// The length of its file data, bytes: two large pages, so that one that is aligned fits.
const DATA_LENGTH: usize = 0x6000;

/// A file, header by header.
#[derive(Clone)]
struct Raw {
    headers: Vec<(u32, Vec<u8>)>,
    version: u32,
}

fn bytes<T: IntoBytes + Immutable>(content: &T) -> Vec<u8> {
    content.as_bytes().to_vec()
}

fn platform(mask: u32, platform_type: defs::IgvmPlatformType) -> (u32, Vec<u8>) {
    let content = defs::IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: mask,
        highest_vtl: 0,
        platform_type,
        platform_version: 1,
        shared_gpa_boundary: 0,
    };
    header(Type::IGVM_VHT_SUPPORTED_PLATFORM, &content)
}

fn header<T: IntoBytes + Immutable>(header_type: Type, content: &T) -> (u32, Vec<u8>) {
    (header_type.0, bytes(content))
}

fn page(gpa: u64, file_offset: u32) -> defs::IGVM_VHS_PAGE_DATA {
    defs::IGVM_VHS_PAGE_DATA {
        gpa,
        compatibility_mask: u32::MAX,
        file_offset,
        flags: defs::IgvmPageDataFlags::new(),
        data_type: defs::IgvmPageDataType::NORMAL,
        reserved: 0,
    }
}

fn area(index: u32, number_of_bytes: u64, file_offset: u32) -> defs::IGVM_VHS_PARAMETER_AREA {
    defs::IGVM_VHS_PARAMETER_AREA { number_of_bytes, parameter_area_index: index, file_offset }
}

fn insert(gpa: u64, index: u32) -> defs::IGVM_VHS_PARAMETER_INSERT {
    defs::IGVM_VHS_PARAMETER_INSERT { gpa, compatibility_mask: u32::MAX, parameter_area_index: index }
}

fn vp_context(mask: u32, file_offset: u32) -> defs::IGVM_VHS_VP_CONTEXT {
    defs::IGVM_VHS_VP_CONTEXT {
        gpa: 0.into(),
        compatibility_mask: mask,
        file_offset,
        vp_index: 0,
        reserved: 0,
    }
}

fn required(gpa: u64, number_of_bytes: u32) -> defs::IGVM_VHS_REQUIRED_MEMORY {
    defs::IGVM_VHS_REQUIRED_MEMORY {
        gpa,
        compatibility_mask: u32::MAX,
        number_of_bytes,
        flags: defs::RequiredMemoryFlags::new(),
        reserved: 0,
    }
}

fn policy(mask: u32) -> defs::IGVM_VHS_GUEST_POLICY {
    defs::IGVM_VHS_GUEST_POLICY { policy: 0x30000, compatibility_mask: mask, reserved: 0 }
}

fn corim(file_offset: u32) -> defs::IGVM_VHS_CORIM_DATA {
    defs::IGVM_VHS_CORIM_DATA { compatibility_mask: 1, file_offset, size_bytes: 10, reserved: 0 }
}

fn id_block(mask: u32) -> defs::IGVM_VHS_SNP_ID_BLOCK {
    let mut block = defs::IGVM_VHS_SNP_ID_BLOCK::new_zeroed();
    block.compatibility_mask = mask;
    block
}

fn parameter(index: u32, byte_offset: u32) -> defs::IGVM_VHS_PARAMETER {
    defs::IGVM_VHS_PARAMETER { parameter_area_index: index, byte_offset }
}

impl Raw {
    /// Two platforms, plain (1) and SNP (2), and nothing more.
    fn new() -> Self {
        let headers =
            vec![platform(1, defs::IgvmPlatformType::NATIVE), platform(2, defs::IgvmPlatformType::SEV_SNP)];
        Self { headers, version: 2 }
    }

    /// Something of every kind.
    fn everything() -> Self {
        let mut raw = Self::new();
        raw.headers.push(platform(4, defs::IgvmPlatformType::VSM_ISOLATION));
        raw.headers.push(platform(8, defs::IgvmPlatformType::TDX));
        let mut measurement = defs::IGVM_VHS_VBS_MEASUREMENT::new_zeroed();
        measurement.compatibility_mask = 4;
        let none = defs::IgvmPageDataFlags::new();
        let large = defs::IGVM_VHS_PAGE_DATA { flags: none.with_is_2mb_page(true), ..page(0x20_0000, 0) };
        let secrets =
            defs::IGVM_VHS_PAGE_DATA { data_type: defs::IgvmPageDataType::SECRETS, ..page(0x5000, 0) };
        let error = defs::IGVM_VHS_ERROR_RANGE { gpa: 0x7000, compatibility_mask: 4, size_bytes: 0x1000 };
        raw.headers.extend([
            header(Type::IGVM_VHT_GUEST_POLICY, &policy(2)),
            header(Type::IGVM_VHT_CORIM_DOCUMENT, &corim(DATA)),
            header(Type::IGVM_VHT_CORIM_SIGNATURE, &corim(DATA)),
            (Type::IGVM_VHT_VERSION_STRING.0, b"1.2.3".to_vec()),
            header(Type::IGVM_VHT_PARAMETER_AREA, &area(7, 0x2000, DATA)),
            header(Type::IGVM_VHT_VP_COUNT_PARAMETER, &parameter(7, 12)),
            header(Type::IGVM_VHT_PAGE_DATA, &page(0x1000, DATA)),
            header(Type::IGVM_VHT_PAGE_DATA, &page(0x2000, DATA + 0x1000)),
            header(Type::IGVM_VHT_PAGE_DATA, &page(0x3000, 0)),
            header(Type::IGVM_VHT_PAGE_DATA, &secrets),
            header(Type::IGVM_VHT_PAGE_DATA, &large),
            header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0x8000, 7)),
            header(Type::IGVM_VHT_REQUIRED_MEMORY, &required(0x10000, 0x2000)),
            header(Type::IGVM_VHT_ERROR_RANGE, &error),
            header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(1, DATA)),
            header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(2, DATA)),
            header(Type::IGVM_VHT_SNP_ID_BLOCK, &id_block(2)),
            header(Type::IGVM_VHT_VBS_MEASUREMENT, &measurement),
            (0x8000_0000 | 0x3f0, b"whatever".to_vec()),
        ]);
        raw
    }

    fn with(mut self, header: (u32, Vec<u8>)) -> Self {
        self.headers.push(header);
        self
    }

    fn build(&self) -> Vec<u8> {
        let fixed_length = if self.version == 1 { 24 } else { 32 };
        let mut variable = Vec::new();
        for (header_type, content) in &self.headers {
            variable.extend(header_type.to_le_bytes());
            variable.extend((content.len() as u32).to_le_bytes());
            variable.extend(content);
            variable.resize(variable.len().next_multiple_of(8), 0);
        }
        let mut file = Vec::new();
        let total = DATA as usize + DATA_LENGTH;
        for field in
            [defs::IGVM_MAGIC_VALUE, self.version, fixed_length, variable.len() as u32, total as u32, 0]
        {
            file.extend(field.to_le_bytes());
        }
        if self.version != 1 {
            file.extend([0, 4096_u32].map(u32::to_le_bytes).concat());
        }
        file.extend(variable);
        assert!(file.len() <= DATA as usize);
        file.resize(total, 0);
        // So that contents differ: a byte of each page that no context reserves (rax).
        for (number, page) in file[DATA as usize..].chunks_mut(4096).enumerate() {
            page[0] = number as u8 + 1;
        }
        fix_checksum(&mut file);
        file
    }

    /// The problem with the last header.
    fn problem(&self) -> Problem {
        match Igvm::new(&self.build()) {
            Err(ReadError::Header(error)) => {
                let last = self.headers.len() - 1;
                assert_eq!(error.index as usize, last);
                let before = Self { headers: self.headers[..last].to_vec(), ..*self };
                let sizes = before.headers.iter().map(|it| 8 + it.1.len().next_multiple_of(8));
                assert_eq!(error.offset, (sizes.sum::<usize>() + 32) as u64);
                error.problem
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Computes the checksum anew, where there are headers to compute it from.
fn fix_checksum(file: &mut [u8]) {
    let field = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let (version, start, size) = (field(4), field(8), field(12));
    let fixed = if version == 1 { 24 } else { 32 };
    let Some(variable) = start.checked_add(size).and_then(|end| file.get(start..end)) else { return };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..20]);
    hasher.update(&[0; 4]);
    hasher.update(&file[24..fixed]);
    hasher.update(variable);
    file[20..24].copy_from_slice(&hasher.finalize().to_le_bytes());
}

#[test]
fn the_sample_is_good() {
    let file = Raw::everything().build();
    let image = Igvm::new(&file).unwrap();
    assert_eq!(image.headers().filter(Result::is_ok).count(), Raw::everything().headers.len());
    let first = Raw { version: 1, ..Raw::everything() }.build();
    assert_eq!(Igvm::new(&first).unwrap().version(), 1);
}

#[test]
fn each_refusal_names_its_reason() {
    let none = defs::IgvmPageDataFlags::new();
    let page_data = |raw| Raw::new().with(header(Type::IGVM_VHT_PAGE_DATA, &raw));
    let areas = |raw| Raw::new().with(header(Type::IGVM_VHT_PARAMETER_AREA, &raw));
    let context =
        |mask, offset| Raw::new().with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(mask, offset)));
    let supported = |change: fn(&mut defs::IGVM_VHS_SUPPORTED_PLATFORM)| {
        let mut raw = defs::IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: 4,
            highest_vtl: 0,
            platform_type: defs::IgvmPlatformType::TDX,
            platform_version: 1,
            shared_gpa_boundary: 0,
        };
        change(&mut raw);
        Raw::new().with(header(Type::IGVM_VHT_SUPPORTED_PLATFORM, &raw))
    };
    let after = |raw: Raw, header_type, content: &[u8]| raw.with((header_type, content.to_vec()));
    let vsm = Raw::new().with(platform(4, defs::IgvmPlatformType::VSM_ISOLATION));
    let cases = [
        // The headers by themselves.
        (Raw::new().with((0x300, vec![])), Problem::UnknownType(0x300)),
        (Raw::new().with((0x400, vec![])), Problem::UnknownType(0x400)),
        (Raw::new().with((0x306, vec![])), Problem::UnknownType(0x306)),
        (Raw::new().with((0x302, vec![0; 23])), Problem::Length { length: 23, expected: 24 }),
        (Raw::new().with((0x8000_0302, vec![0; 25])), Problem::Length { length: 25, expected: 24 }),
        (page_data(page(0x1000, 0)).with(header(Type::IGVM_VHT_GUEST_POLICY, &policy(2))), Problem::Order),
        (page_data(page(0x1000, 0)).with(platform(4, defs::IgvmPlatformType::TDX)), Problem::Order),
        // An unknown type that may be skipped belongs to a section all the same.
        (after(page_data(page(0x1000, 0)), 0x8000_0150, b""), Problem::Order),
        // Platforms.
        (supported(|it| it.compatibility_mask = 0), Problem::Mask(0)),
        (supported(|it| it.compatibility_mask = 12), Problem::Mask(12)),
        (supported(|it| it.compatibility_mask = 2), Problem::MaskTaken(2)),
        (supported(|it| it.highest_vtl = 1), Problem::Value { field: "highest_vtl", value: 1 }),
        (supported(|it| it.platform_version = 2), Problem::Value { field: "platform_version", value: 2 }),
        (
            supported(|it| it.platform_type = defs::IgvmPlatformType(7)),
            Problem::Value { field: "platform_type", value: 7 },
        ),
        (
            supported(|it| it.platform_type = defs::IgvmPlatformType::NATIVE),
            Problem::Twice(ImagePlatform::Plain),
        ),
        (
            supported(|it| it.platform_type = defs::IgvmPlatformType::CCA),
            Problem::PlatformArchitecture(ImagePlatform::Cca),
        ),
        (
            supported(|it| {
                it.platform_type = defs::IgvmPlatformType::VSM_ISOLATION;
                it.shared_gpa_boundary = 1 << 40;
            }),
            Problem::SharedBoundary(ImagePlatform::Vsm),
        ),
        // Policies and documents.
        (
            Raw::new()
                .with(header(Type::IGVM_VHT_GUEST_POLICY, &policy(2)))
                .with(header(Type::IGVM_VHT_GUEST_POLICY, &policy(3))),
            Problem::Twice(ImagePlatform::Snp),
        ),
        (
            Raw::new().with(header(
                Type::IGVM_VHT_GUEST_POLICY,
                &defs::IGVM_VHS_GUEST_POLICY { reserved: 1, ..policy(2) },
            )),
            Problem::Reserved("the last field"),
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_CCA_POLICY, &{
                let mut raw = defs::IGVM_VHS_CCA_POLICY::new_zeroed();
                raw.compatibility_mask = 1;
                raw
            })),
            Problem::NotOnPlatform(ImagePlatform::Plain),
        ),
        (Raw::new().with(header(Type::IGVM_VHT_CORIM_SIGNATURE, &corim(DATA))), Problem::NoCorim),
        (
            Raw::new()
                .with(header(Type::IGVM_VHT_CORIM_DOCUMENT, &corim(DATA)))
                .with(header(Type::IGVM_VHT_CORIM_DOCUMENT, &corim(DATA))),
            Problem::Twice(ImagePlatform::Plain),
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_CORIM_DOCUMENT, &corim(DATA + DATA_LENGTH as u32 - 9))),
            Problem::Data { offset: DATA + DATA_LENGTH as u32 - 9, length: 10 },
        ),
        (after(Raw::new(), 0x107, b"\xff"), Problem::Text),
        (after(after(Raw::new(), 0x107, b"1"), 0x107, b"1"), Problem::TwiceInFile),
        // Pages.
        (page_data(page(0x1001, 0)), Problem::Unaligned { field: "gpa", value: 0x1001, unit: 0x1000 }),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { flags: none.with_is_2mb_page(true), ..page(0x1000, 0) }),
            Problem::Unaligned { field: "gpa", value: 0x1000, unit: 0x20_0000 },
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { flags: none.with_is_2mb_page(true), ..page(0, DATA) }),
            Problem::Data { offset: DATA, length: 0x20_0000 },
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { flags: none.with_reserved(1), ..page(0x1000, 0) }),
            Problem::Reserved("a flag"),
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { reserved: 1, ..page(0x1000, 0) }),
            Problem::Reserved("the last field"),
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { data_type: defs::IgvmPageDataType(4), ..page(0x1000, 0) }),
            Problem::Value { field: "data_type", value: 4 },
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA {
                data_type: defs::IgvmPageDataType::CPUID_DATA,
                flags: none.with_shared(true),
                ..page(0x1000, 0)
            }),
            Problem::Value { field: "flags", value: 4 },
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA {
                data_type: defs::IgvmPageDataType::SECRETS,
                flags: none.with_is_2mb_page(true),
                ..page(0, 0)
            }),
            Problem::Value { field: "flags", value: 1 },
        ),
        (page_data(page(!0xfff, 0)), Problem::Wraps { gpa: !0xfff, length: 0x1000 }),
        // Data in the headers, before them, at the end, and beyond.
        (page_data(page(0x1000, 64)), Problem::Data { offset: 64, length: 0x1000 }),
        (
            page_data(page(0x1000, DATA + DATA_LENGTH as u32 - 4095)),
            Problem::Data { offset: DATA + DATA_LENGTH as u32 - 4095, length: 0x1000 },
        ),
        (page_data(page(0x1000, u32::MAX)), Problem::Data { offset: u32::MAX, length: 0x1000 }),
        (
            page_data(page(0x1000, 0)).with(header(Type::IGVM_VHT_PAGE_DATA, &page(0x1000, 0))),
            Problem::Overlap { gpa: 0x1000, length: 0x1000, platform: ImagePlatform::Plain },
        ),
        (
            page_data(defs::IGVM_VHS_PAGE_DATA { compatibility_mask: 2, ..page(0x20_1000, 0) }).with(header(
                Type::IGVM_VHT_PAGE_DATA,
                &defs::IGVM_VHS_PAGE_DATA { flags: none.with_is_2mb_page(true), ..page(0x20_0000, 0) },
            )),
            Problem::Overlap { gpa: 0x20_0000, length: 0x20_0000, platform: ImagePlatform::Snp },
        ),
        // Parameters.
        (
            areas(area(0, 0x1001, 0)),
            Problem::Unaligned { field: "number_of_bytes", value: 0x1001, unit: 0x1000 },
        ),
        (areas(area(0, 0, 0)), Problem::Empty("number_of_bytes")),
        (
            areas(area(0, 1 << 60, 0)),
            Problem::TooMuch { limit: (16 << 20) + 256 * (u64::from(DATA) + DATA_LENGTH as u64) },
        ),
        (areas(area(0, 1 << 60, DATA)), Problem::Data { offset: DATA, length: 1 << 60 }),
        (
            areas(area(0, 0x1000, 0)).with(header(Type::IGVM_VHT_PARAMETER_AREA, &area(0, 0x1000, 0))),
            Problem::AreaTwice(0),
        ),
        (
            areas(area(0, 0x1000, 0)).with(header(Type::IGVM_VHT_MADT, &parameter(0, 0x1000))),
            Problem::OutsideArea { area: 0, offset: 0x1000, length: 0x1000 },
        ),
        (Raw::new().with(header(Type::IGVM_VHT_MADT, &parameter(3, 0))), Problem::NoArea(3)),
        (Raw::new().with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0, 3))), Problem::NoArea(3)),
        // Used again after it was inserted: the nearest that headers come to a cycle.
        (
            areas(area(0, 0x1000, 0))
                .with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0, 0)))
                .with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0x1000, 0))),
            Problem::NoArea(0),
        ),
        (
            areas(area(0, 0x1000, 0))
                .with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0, 0)))
                .with(header(Type::IGVM_VHT_SRAT, &parameter(0, 0))),
            Problem::NoArea(0),
        ),
        (
            areas(area(0, 0x1000, 0))
                .with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0, 0)))
                .with(header(Type::IGVM_VHT_PARAMETER_AREA, &area(0, 0x1000, 0))),
            Problem::AreaTwice(0),
        ),
        (
            areas(area(0, 0x2000, 0)).with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(!0xfff, 0))),
            Problem::Wraps { gpa: !0xfff, length: 0x2000 },
        ),
        (
            areas(area(0, 0x2000, 0)).with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0x800, 0))),
            Problem::Unaligned { field: "gpa", value: 0x800, unit: 0x1000 },
        ),
        (
            areas(area(0, 0x2000, 0))
                .with(header(Type::IGVM_VHT_PAGE_DATA, &page(0x3000, 0)))
                .with(header(Type::IGVM_VHT_PARAMETER_INSERT, &insert(0x2000, 0))),
            Problem::Overlap { gpa: 0x2000, length: 0x2000, platform: ImagePlatform::Plain },
        ),
        // Memory.
        (
            Raw::new().with(header(Type::IGVM_VHT_REQUIRED_MEMORY, &required(0x1000, 0))),
            Problem::Empty("number_of_bytes"),
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_REQUIRED_MEMORY, &required(0x1000, 0x800))),
            Problem::Unaligned { field: "number_of_bytes", value: 0x800, unit: 0x1000 },
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_REQUIRED_MEMORY, &required(!0xfff, 0xffff_f000))),
            Problem::Wraps { gpa: !0xfff, length: 0xffff_f000 },
        ),
        (
            Raw::new().with(header(
                Type::IGVM_VHT_ERROR_RANGE,
                &defs::IGVM_VHS_ERROR_RANGE { gpa: 1, compatibility_mask: 1, size_bytes: 0x1000 },
            )),
            Problem::Unaligned { field: "gpa", value: 1, unit: 0x1000 },
        ),
        // vCPUs.
        (context(3, DATA), Problem::NotOnePlatform(3)),
        (context(0, DATA), Problem::NotOnePlatform(0)),
        (context(0x10, DATA), Problem::NotOnePlatform(0x10)),
        (context(1, 0), Problem::NoData),
        (context(1, DATA + 0x5001), Problem::Data { offset: DATA + 0x5001, length: 0x1000 }),
        // The page number of the second page is in the reserved rest of the first one.
        (context(1, DATA + 0x800), Problem::Reserved("the rest of the context's page")),
        (
            context(2, DATA).with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(2, DATA))),
            Problem::VpTwice { index: 0, platform: ImagePlatform::Snp },
        ),
        (
            Raw::new()
                .with(platform(4, defs::IgvmPlatformType::TDX))
                .with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, DATA))),
            Problem::NotOnPlatform(ImagePlatform::Tdx),
        ),
        (
            // The count is the page's number, and the last one's registers reach beyond the file.
            vsm.clone().with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, DATA + 0x5ff0))),
            Problem::Empty("register_count"),
        ),
        (
            vsm.clone().with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, DATA + 0xffd))),
            Problem::Data { offset: DATA + 0xffd, length: (2 << 24) * 32 + 4 },
        ),
        (
            vsm.with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, 0))),
            Problem::Length { length: 0, expected: 4 },
        ),
        // ID blocks.
        (
            Raw::new().with(header(Type::IGVM_VHT_SNP_ID_BLOCK, &id_block(1))),
            Problem::NotOnPlatform(ImagePlatform::Plain),
        ),
        (
            Raw::new()
                .with(header(Type::IGVM_VHT_SNP_ID_BLOCK, &id_block(2)))
                .with(header(Type::IGVM_VHT_SNP_ID_BLOCK, &id_block(2))),
            Problem::Twice(ImagePlatform::Snp),
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_SNP_ID_BLOCK, &{
                let mut block = id_block(2);
                block.author_key_enabled = 2;
                block
            })),
            Problem::Value { field: "author_key_enabled", value: 2 },
        ),
        (
            Raw::new().with(header(Type::IGVM_VHT_SNP_ID_BLOCK, &{
                let mut block = id_block(2);
                block.author_public_key.qy[71] = 1;
                block
            })),
            Problem::Reserved("the author key, where it is not enabled,"),
        ),
    ];
    for (number, (raw, problem)) in cases.iter().enumerate() {
        assert_eq!(raw.problem(), *problem, "case {number}");
    }
}

#[test]
fn policies_of_cca() {
    let refused = |change: fn(&mut defs::IGVM_VHS_CCA_POLICY)| {
        let mut raw = defs::IGVM_VHS_CCA_POLICY::new_zeroed();
        raw.compatibility_mask = 1;
        change(&mut raw);
        let cca = platform(1, defs::IgvmPlatformType::CCA);
        let raw = Raw { headers: vec![cca, header(Type::IGVM_VHT_CCA_POLICY, &raw)], version: 2 };
        let mut file = raw.build();
        file[24] = 1;
        fix_checksum(&mut file);
        Igvm::new(&file).map(drop)
    };
    assert_eq!(refused(|_| ()), Ok(()));
    type Change = fn(&mut defs::IGVM_VHS_CCA_POLICY);
    let changes: [(Change, Problem); 4] = [
        (|it| it.hash_algorithm.0 = 3, Problem::Value { field: "hash_algorithm", value: 3 }),
        (|it| it.lfa_policy.0 = 2, Problem::Value { field: "lfa_policy", value: 2 }),
        (|it| it.reserved2[5] = 1, Problem::Reserved("the last field")),
        (
            |it| (it.attributes_required_zeroes, it.attributes_required_ones) = (3, 2),
            Problem::Value { field: "attribute required to be both 0 and 1,", value: 2 },
        ),
    ];
    for (change, problem) in changes {
        assert!(matches!(refused(change), Err(ReadError::Header(error)) if error.problem == problem));
    }
}

#[test]
fn registers_for_hyper_v() {
    let raw = Raw::new()
        .with(platform(4, defs::IgvmPlatformType::VSM_ISOLATION))
        .with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, DATA + 0x1000)));
    let mut file = raw.build();
    let register = |number: usize| DATA as usize + 0x1000 + 4 + number * 32;
    assert!(Igvm::new(&file).is_ok());
    file[register(1)] = 2;
    let problem = |file: &[u8]| match Igvm::new(file) {
        Err(ReadError::Header(HeaderError { problem, .. })) => problem,
        other => panic!("{other:?}"),
    };
    assert_eq!(problem(&file), Problem::VbsRegister(1));
    file[register(0)] = 2;
    assert!(Igvm::new(&file).is_ok());
    file[register(0) + 5] = 1;
    assert_eq!(problem(&file), Problem::VbsRegister(0));
}

#[test]
fn the_fixed_header() {
    let good = Raw::new().build();
    let with = |at: usize, value: u32, repair: bool| {
        let mut file = good.clone();
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        if repair {
            fix_checksum(&mut file);
        }
        Igvm::new(&file).map(drop)
    };
    let total = good.len();
    assert_eq!(with(0, 0x1234, false), Err(ReadError::Magic(0x1234)));
    assert_eq!(with(4, 3, false), Err(ReadError::Version(3)));
    assert_eq!(with(4, 0, false), Err(ReadError::Version(0)));
    for (offset, size) in [(24, 64), (36, 64), (32, u32::MAX), (!7, 64), (DATA, total as u32)] {
        let mut file = good.clone();
        file[8..12].copy_from_slice(&offset.to_le_bytes());
        file[12..16].copy_from_slice(&size.to_le_bytes());
        assert_eq!(Igvm::new(&file).map(drop), Err(ReadError::Section { offset, size }));
    }
    assert_eq!(
        with(16, total as u32 - 1, false),
        Err(ReadError::FileSize { header: total as u32 - 1, file: total })
    );
    assert!(matches!(with(20, 0, false), Err(ReadError::Checksum { header: 0, .. })));
    assert_eq!(with(24, 2, true), Err(ReadError::Architecture(2)));
    assert_eq!(with(28, 65536, true), Err(ReadError::PageSize(65536)));
    assert_eq!(with(12, 0, true), Err(ReadError::NoPlatform));
    let longer = [good.as_slice(), &[0]].concat();
    assert_eq!(
        Igvm::new(&longer).map(drop),
        Err(ReadError::FileSize { header: total as u32, file: total + 1 })
    );
    // Any bit of the headers.
    for at in 0..32 + 2 * 24 {
        let mut file = good.clone();
        file[at] ^= 1 << (at % 8);
        assert!(Igvm::new(&file).is_err(), "byte {at}");
    }
}

#[test]
fn padding_must_be_zero() {
    let raw = Raw::new().with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(1, DATA)));
    let mut file = raw.build();
    let last = 32 + 2 * 24 + 8 + 20;
    file[last] = 1;
    fix_checksum(&mut file);
    assert!(matches!(
        Igvm::new(&file),
        Err(ReadError::Header(HeaderError { index: 2, problem: Problem::Padding, .. }))
    ));
}

/// Counts what it is given.
#[derive(Default)]
struct Counter {
    pages: u64,
    items: usize,
}

impl<'a> Importer<'a> for Counter {
    type Error = std::convert::Infallible;

    fn platform(&mut self, _: &PlatformInfo) -> Result<(), Self::Error> {
        Ok(())
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), Self::Error> {
        assert_ne!(mask, 0);
        self.items += 1;
        match item {
            Item::Pages(run) => {
                assert!(run.content.bytes.len() as u64 <= run.length());
                self.pages += run.pages;
            }
            Item::Parameters(area) => self.pages += area.pages,
            _ => {}
        }
        Ok(())
    }
}

/// Reads and walks whatever `file` is. Nothing may panic, and the work is bounded by the file's size.
fn exercise(file: &[u8]) -> bool {
    let Ok(image) = Igvm::new(file) else { return false };
    let mut selections: Vec<_> = image.platforms().iter().map(|it| Selection::One(it.platform)).collect();
    selections.push(Selection::All);
    for selection in selections {
        let mut counter = Counter::default();
        let _ = walk(&image, selection, &mut counter);
        assert!(counter.pages * 4096 <= (16 << 20) + 256 * file.len() as u64);
        assert!(counter.items <= file.len() / 8);
    }
    true
}

#[test]
fn cut_off_at_every_byte() {
    let good = Raw::everything().build();
    assert!(exercise(&good));
    let end = good.len();
    for length in (0..DATA as usize).chain((DATA as usize..end).step_by(61)).chain(end - 70..end) {
        let mut file = good[..length].to_vec();
        assert!(!exercise(&file), "{length} bytes");
        if length >= 32 {
            // The same with a header that says so. It is good where the data was not needed.
            file[16..20].copy_from_slice(&(length as u32).to_le_bytes());
            fix_checksum(&mut file);
            exercise(&file);
        }
    }
    // The variable headers cut off at every byte.
    let size = u32::from_le_bytes(good[12..16].try_into().unwrap());
    let mut whole_headers = 0;
    for size in 0..size {
        let mut file = good.clone();
        file[12..16].copy_from_slice(&size.to_le_bytes());
        fix_checksum(&mut file);
        whole_headers += usize::from(exercise(&file));
    }
    assert!(whole_headers < Raw::everything().headers.len());
}

#[test]
fn every_field_at_its_extremes() {
    let good = Raw::everything().build();
    let size = u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
    let mut accepted = 0_usize;
    for at in 0..32 + size {
        for width in [1, 2, 4, 8] {
            if at % width != 0 || at + width > 32 + size {
                continue;
            }
            for value in
                [0, 1, 2, 0xfff, 0x1000, 1 << 31, 1 << 60, 1 << 63, u64::MAX >> 1, u64::MAX - 1, u64::MAX]
            {
                for repair in [true, false] {
                    let mut file = good.clone();
                    file[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                    if repair {
                        fix_checksum(&mut file);
                    }
                    accepted += usize::from(exercise(&file));
                }
            }
        }
    }
    // Not everything was refused by the checksum.
    assert!(accepted > 1000);
}

#[test]
fn a_small_file_cannot_ask_for_much() {
    let large = |gpa| {
        let flags = defs::IgvmPageDataFlags::new().with_is_2mb_page(true);
        header(Type::IGVM_VHT_PAGE_DATA, &defs::IGVM_VHS_PAGE_DATA { flags, ..page(gpa, 0) })
    };
    let mut raw = Raw::new();
    raw.headers.extend((0..12).map(|number| large(number << 21)));
    assert!(Igvm::new(&raw.build()).is_ok());
    raw.headers.push(large(12 << 21));
    assert!(matches!(raw.problem(), Problem::TooMuch { .. }));
}

#[test]
fn what_nothing_of_ours_can_do_is_refused_by_name() {
    let relocatable = defs::IGVM_VHS_RELOCATABLE_REGION { compatibility_mask: 2, ..FromZeros::new_zeroed() };
    let tables = defs::IGVM_VHS_PAGE_TABLE_RELOCATION { compatibility_mask: 2, ..FromZeros::new_zeroed() };
    let error = defs::IGVM_VHS_ERROR_RANGE { gpa: 0, compatibility_mask: 2, size_bytes: 0x1000 };
    for (header, message) in [
        (
            header(Type::IGVM_VHT_RELOCATABLE_REGION, &relocatable),
            "header 2 at file offset 0x50 (RELOCATABLE_REGION): images that want to be relocated are not supported",
        ),
        (
            header(Type::IGVM_VHT_PAGE_TABLE_RELOCATION_REGION, &tables),
            "header 2 at file offset 0x50 (PAGE_TABLE_RELOCATION_REGION): \
             images that want to be relocated are not supported",
        ),
        (
            header(Type::IGVM_VHT_ERROR_RANGE, &error),
            "header 2 at file offset 0x50 (ERROR_RANGE): ranges for error reports are not supported",
        ),
    ] {
        let file = Raw::new().with(header).build();
        let image = Igvm::new(&file).unwrap();
        let walked = walk(&image, Selection::One(ImagePlatform::Snp), &mut Counter::default());
        assert_eq!(walked.unwrap_err().to_string(), message);
        // The other platform does not have it.
        walk(&image, Selection::One(ImagePlatform::Plain), &mut Counter::default()).unwrap();
    }
    let file = Raw::everything().build();
    let image = Igvm::new(&file).unwrap();
    let walked = walk(&image, Selection::One(ImagePlatform::Vsm), &mut Counter::default());
    assert!(
        walked
            .unwrap_err()
            .to_string()
            .ends_with("(ERROR_RANGE): ranges for error reports are not supported")
    );
    let hyper_v = Raw::new()
        .with(platform(4, defs::IgvmPlatformType::VSM_ISOLATION))
        .with(header(Type::IGVM_VHT_VP_CONTEXT, &vp_context(4, DATA + 0x1000)))
        .build();
    let image = Igvm::new(&hyper_v).unwrap();
    let walked = walk(&image, Selection::One(ImagePlatform::Vsm), &mut Counter::default());
    assert!(
        walked.unwrap_err().to_string().ends_with("(VP_CONTEXT): registers for Hyper-V are not supported")
    );
}
