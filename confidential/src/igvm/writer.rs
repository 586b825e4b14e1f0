//! Writes IGVM files that can be mapped.
//!
//! The file data begin at a multiple of 4 KiB: first what is private, which is little, then what is shared,
//! each in the order of the headers, each content filled up with zeroes to 4 KiB. So shared pages that
//! follow each other in memory do so in the file, and a domain can map them from it. Pages of zeroes take no
//! space. No two headers have the same data, no time and no name goes in: the bytes follow from the items alone.

use std::borrow::Cow;
use std::io::{self, Write};

use igvm_defs as defs;
use igvm_defs::IgvmVariableHeaderType as Type;
use thiserror::Error;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::image::importer::{
    Content, ImagePlatform, Importer, Item, NativeContext, PAGE, PageKind, PageRun, ParameterArea,
    ParameterKind, PlatformInfo, PublicKey, Signature, SnpIdBlock, VcpuContext,
};

/// Bytes of a page.
const PAGE_SIZE: u64 = defs::PAGE_SIZE_4K;
/// What variable headers are aligned to, bytes.
const ALIGNMENT: usize = 8;

/// Why a file cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The format's fields have 32 bits.
    #[error("an IGVM file has less than 4 GiB; this one would have more")]
    TooLarge,
    /// An item that the format cannot express.
    #[error("{length} bytes of content do not fit into {pages} pages at {gpa:#x}")]
    Content {
        /// Guest-physical address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
        /// Length of the content, bytes.
        length: usize,
    },
    /// A field of the format that is too small.
    #[error("{what} {value:#x} does not fit into its field")]
    Field {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The output did not take it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A file in the making: the importer that writes an image down.
#[derive(Debug, Default)]
pub struct Writer<'a> {
    platforms: Vec<u8>,
    initialization: Vec<u8>,
    directives: Vec<u8>,
    private: Data<'a>,
    shared: Data<'a>,
    areas: u32,
    aarch64: bool,
}

/// One of the two parts of the file data.
#[derive(Debug, Default)]
struct Data<'a> {
    contents: Vec<Cow<'a, [u8]>>,
    /// Length so far, bytes; a multiple of a page.
    length: u64,
    /// Positions in the directives of 32-bit file offsets that count from the beginning of this part.
    offsets: Vec<usize>,
}

impl<'a> Data<'a> {
    /// Takes `bytes`. Returns where they begin.
    fn add(&mut self, bytes: Cow<'a, [u8]>) -> u64 {
        let start = self.length;
        self.length = start.saturating_add(bytes.len().next_multiple_of(PAGE) as u64);
        self.contents.push(bytes);
        start
    }

    /// Lets the field at `position` of the directives say where `offset` of this part is.
    fn refer(&mut self, directives: &mut [u8], position: usize, offset: u64) -> Result<(), WriteError> {
        let offset = u32::try_from(offset).map_err(|_| WriteError::TooLarge)?;
        if let Some(field) = directives.get_mut(position..).and_then(<[u8]>::first_chunk_mut) {
            *field = offset.to_le_bytes();
        }
        self.offsets.push(position);
        Ok(())
    }

    /// Makes the offsets count from the beginning of the file, in which this part begins at `start`.
    fn place(&self, directives: &mut [u8], start: u64) -> Result<(), WriteError> {
        for position in &self.offsets {
            if let Some(field) = directives.get_mut(*position..).and_then(<[u8]>::first_chunk_mut) {
                let offset = u64::from(u32::from_le_bytes(*field)).saturating_add(start);
                *field = u32::try_from(offset).map_err(|_| WriteError::TooLarge)?.to_le_bytes();
            }
        }
        Ok(())
    }
}

impl<'a> Importer<'a> for Writer<'a> {
    type Error = WriteError;

    fn platform(&mut self, info: &PlatformInfo) -> Result<(), WriteError> {
        self.aarch64 |= info.platform == ImagePlatform::Cca;
        let header = defs::IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: info.mask,
            highest_vtl: info.highest_vtl,
            platform_type: platform_type(info.platform),
            platform_version: 1,
            shared_gpa_boundary: info.shared_gpa_boundary,
        };
        append(&mut self.platforms, Type::IGVM_VHT_SUPPORTED_PLATFORM, &header);
        if let Some(policy) = info.policy {
            let header = defs::IGVM_VHS_GUEST_POLICY { policy, compatibility_mask: info.mask, reserved: 0 };
            append(&mut self.initialization, Type::IGVM_VHT_GUEST_POLICY, &header);
        }
        if let Some(policy) = info.cca_policy {
            let header = defs::IGVM_VHS_CCA_POLICY {
                compatibility_mask: info.mask,
                reserved: 0,
                attributes_required_zeroes: policy.required_zeroes,
                attributes_required_ones: policy.required_ones,
                hash_algorithm: defs::CcaHashAlgorithm(policy.hash_algorithm),
                lfa_policy: defs::CcaLfaPolicy(policy.lfa_policy),
                reserved2: [0; 6],
            };
            append(&mut self.initialization, Type::IGVM_VHT_CCA_POLICY, &header);
        }
        Ok(())
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), WriteError> {
        match item {
            Item::Pages(run) => self.pages(mask, run),
            Item::Parameters(area) => self.parameters(mask, area),
            Item::Vcpu { index, context } => self.vcpu(mask, *index, context),
            Item::RequiredMemory { gpa, length } => self.required_memory(mask, *gpa, *length),
            Item::SnpIdBlock(block) => {
                append(&mut self.directives, Type::IGVM_VHT_SNP_ID_BLOCK, &id_block(mask, block));
                Ok(())
            }
        }
    }
}

impl<'a> Writer<'a> {
    /// Writes the file.
    ///
    /// # Errors
    /// If it would have 4 GiB or more, or if `out` does not take it.
    pub fn write(mut self, mut out: impl Write) -> Result<(), WriteError> {
        let fixed = size_of::<defs::IGVM_FIXED_HEADER_V2>();
        let headers = [self.platforms.len(), self.initialization.len(), self.directives.len()]
            .iter()
            .fold(0, |sum: usize, length| sum.saturating_add(*length));
        let data_start = fixed.saturating_add(headers).next_multiple_of(PAGE) as u64;
        let shared_start = data_start.saturating_add(self.private.length);
        let total = shared_start.saturating_add(self.shared.length);
        let total = u32::try_from(total).map_err(|_| WriteError::TooLarge)?;
        self.private.place(&mut self.directives, data_start)?;
        self.shared.place(&mut self.directives, shared_start)?;

        let sections = [&self.platforms, &self.initialization, &self.directives];
        let mut header = defs::IGVM_FIXED_HEADER_V2 {
            magic: defs::IGVM_MAGIC_VALUE,
            format_version: defs::IGVM_FORMAT_VERSION_2,
            variable_header_offset: fixed as u32,
            variable_header_size: u32::try_from(headers).map_err(|_| WriteError::TooLarge)?,
            total_file_size: total,
            checksum: 0,
            architecture: match self.aarch64 {
                false => defs::IgvmArchitecture::X64,
                true => defs::IgvmArchitecture::AARCH64,
            },
            page_size: PAGE as u32,
        };
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(header.as_bytes());
        sections.iter().for_each(|section| hasher.update(section));
        header.checksum = hasher.finalize();

        out.write_all(header.as_bytes())?;
        for section in sections {
            out.write_all(section)?;
        }
        write_padding(&mut out, fixed.saturating_add(headers))?;
        for content in self.private.contents.iter().chain(&self.shared.contents) {
            out.write_all(content)?;
            write_padding(&mut out, content.len())?;
        }
        out.flush()?;
        Ok(())
    }

    fn pages(&mut self, mask: u32, run: &PageRun<'a>) -> Result<(), WriteError> {
        check_content(run.gpa, run.pages, &run.content)?;
        let data = if run.kind == PageKind::Shared { &mut self.shared } else { &mut self.private };
        let first = data.add(Cow::Borrowed(run.content.bytes));
        let with_data = run.content.bytes.len().div_ceil(PAGE) as u64;
        let (flags, data_type) = page_type(run.kind);
        for page in 0..run.pages {
            let offset = page.saturating_mul(PAGE_SIZE);
            let header = defs::IGVM_VHS_PAGE_DATA {
                gpa: run.gpa.saturating_add(offset),
                compatibility_mask: mask,
                file_offset: 0,
                flags,
                data_type,
                reserved: 0,
            };
            let start = append(&mut self.directives, Type::IGVM_VHT_PAGE_DATA, &header);
            if page < with_data {
                let field = start.saturating_add(std::mem::offset_of!(defs::IGVM_VHS_PAGE_DATA, file_offset));
                data.refer(&mut self.directives, field, first.saturating_add(offset))?;
            }
        }
        Ok(())
    }

    fn parameters(&mut self, mask: u32, area: &ParameterArea<'a>) -> Result<(), WriteError> {
        let index = self.areas;
        self.areas = self.areas.saturating_add(1);
        // The initial content is all of the area, or nothing.
        check_content(area.gpa, area.pages, &area.initial)?;
        let first = self.private.add(Cow::Borrowed(area.initial.bytes));
        let missing = (area.pages as usize).saturating_mul(PAGE).saturating_sub(area.initial.bytes.len());
        if !area.initial.bytes.is_empty() && missing >= PAGE {
            self.private.add(Cow::Owned(vec![0; missing.saturating_sub(missing % PAGE)]));
        }
        let header = defs::IGVM_VHS_PARAMETER_AREA {
            number_of_bytes: area.length(),
            parameter_area_index: index,
            file_offset: 0,
        };
        let start = append(&mut self.directives, Type::IGVM_VHT_PARAMETER_AREA, &header);
        if !area.initial.bytes.is_empty() {
            let field =
                start.saturating_add(std::mem::offset_of!(defs::IGVM_VHS_PARAMETER_AREA, file_offset));
            self.private.refer(&mut self.directives, field, first)?;
        }
        for value in &area.values {
            let header = defs::IGVM_VHS_PARAMETER { parameter_area_index: index, byte_offset: value.offset };
            append(&mut self.directives, parameter_type(value.kind), &header);
        }
        let header = defs::IGVM_VHS_PARAMETER_INSERT {
            gpa: area.gpa,
            compatibility_mask: mask,
            parameter_area_index: index,
        };
        append(&mut self.directives, Type::IGVM_VHT_PARAMETER_INSERT, &header);
        Ok(())
    }

    fn vcpu(&mut self, mask: u32, index: u16, context: &VcpuContext<'a>) -> Result<(), WriteError> {
        let (gpa, page) = match context {
            VcpuContext::NativeX64(registers) => (0, padded(&native_context(registers))),
            VcpuContext::SnpVmsa { gpa, vmsa } => (*gpa, Cow::Borrowed(vmsa.as_slice())),
            VcpuContext::Cca { x, pc, flags } => {
                let [x0, x1, x2, x3, x4, x5, x6, x7] = *x;
                let (pc, flags) = (*pc, *flags);
                (0, padded(&defs::IgvmVpContextAArch64Cca { x0, x1, x2, x3, x4, x5, x6, x7, pc, flags }))
            }
        };
        let offset = self.private.add(page);
        let header = defs::IGVM_VHS_VP_CONTEXT {
            gpa: gpa.into(),
            compatibility_mask: mask,
            file_offset: 0,
            vp_index: index,
            reserved: 0,
        };
        let start = append(&mut self.directives, Type::IGVM_VHT_VP_CONTEXT, &header);
        let field = start.saturating_add(std::mem::offset_of!(defs::IGVM_VHS_VP_CONTEXT, file_offset));
        self.private.refer(&mut self.directives, field, offset)
    }

    fn required_memory(&mut self, mask: u32, gpa: u64, length: u64) -> Result<(), WriteError> {
        let header = defs::IGVM_VHS_REQUIRED_MEMORY {
            gpa,
            compatibility_mask: mask,
            number_of_bytes: u32::try_from(length)
                .map_err(|_| WriteError::Field { what: "required memory of", value: length })?,
            flags: defs::RequiredMemoryFlags::new(),
            reserved: 0,
        };
        append(&mut self.directives, Type::IGVM_VHT_REQUIRED_MEMORY, &header);
        Ok(())
    }
}

fn check_content(gpa: u64, pages: u64, content: &Content<'_>) -> Result<(), WriteError> {
    let length = content.bytes.len();
    if length as u64 > pages.saturating_mul(PAGE_SIZE) {
        return Err(WriteError::Content { gpa, pages, length });
    }
    Ok(())
}

/// Appends a variable header. Returns the position of its content.
fn append<T: IntoBytes + Immutable>(section: &mut Vec<u8>, header_type: Type, content: &T) -> usize {
    let head = defs::IGVM_VHS_VARIABLE_HEADER { typ: header_type, length: content.as_bytes().len() as u32 };
    section.extend_from_slice(head.as_bytes());
    let start = section.len();
    section.extend_from_slice(content.as_bytes());
    section.resize(section.len().next_multiple_of(ALIGNMENT), 0);
    start
}

/// Fills up to a whole page after `length` bytes.
fn write_padding(out: &mut impl Write, length: usize) -> io::Result<()> {
    let missing = length.next_multiple_of(PAGE).saturating_sub(length);
    out.write_all([0; PAGE].get(..missing).unwrap_or_default())
}

/// A page that begins with `value`.
fn padded<T: IntoBytes + Immutable>(value: &T) -> Cow<'static, [u8]> {
    let mut page = value.as_bytes().to_vec();
    page.resize(PAGE, 0);
    Cow::Owned(page)
}

fn platform_type(platform: ImagePlatform) -> defs::IgvmPlatformType {
    match platform {
        ImagePlatform::Plain => defs::IgvmPlatformType::NATIVE,
        ImagePlatform::Vsm => defs::IgvmPlatformType::VSM_ISOLATION,
        ImagePlatform::Snp => defs::IgvmPlatformType::SEV_SNP,
        ImagePlatform::Tdx => defs::IgvmPlatformType::TDX,
        ImagePlatform::Sev => defs::IgvmPlatformType::SEV,
        ImagePlatform::SevEs => defs::IgvmPlatformType::SEV_ES,
        ImagePlatform::Cca => defs::IgvmPlatformType::CCA,
    }
}

fn page_type(kind: PageKind) -> (defs::IgvmPageDataFlags, defs::IgvmPageDataType) {
    let none = defs::IgvmPageDataFlags::new();
    match kind {
        PageKind::Measured => (none, defs::IgvmPageDataType::NORMAL),
        PageKind::Unmeasured => (none.with_unmeasured(true), defs::IgvmPageDataType::NORMAL),
        PageKind::Shared => (none.with_shared(true), defs::IgvmPageDataType::NORMAL),
        PageKind::SnpSecrets => (none, defs::IgvmPageDataType::SECRETS),
        PageKind::SnpCpuid => (none, defs::IgvmPageDataType::CPUID_DATA),
        PageKind::SnpCpuidXf => (none, defs::IgvmPageDataType::CPUID_XF),
    }
}

fn parameter_type(kind: ParameterKind) -> Type {
    match kind {
        ParameterKind::VcpuCount => Type::IGVM_VHT_VP_COUNT_PARAMETER,
        ParameterKind::EnvironmentInfo => Type::IGVM_VHT_ENVIRONMENT_INFO_PARAMETER,
        ParameterKind::CommandLine => Type::IGVM_VHT_COMMAND_LINE,
        ParameterKind::MemoryMap => Type::IGVM_VHT_MEMORY_MAP,
        ParameterKind::MmioRanges => Type::IGVM_VHT_MMIO_RANGES,
        ParameterKind::Srat => Type::IGVM_VHT_SRAT,
        ParameterKind::Madt => Type::IGVM_VHT_MADT,
        ParameterKind::Slit => Type::IGVM_VHT_SLIT,
        ParameterKind::Pptt => Type::IGVM_VHT_PPTT,
        ParameterKind::DeviceTree => Type::IGVM_VHT_DEVICE_TREE,
    }
}

fn native_context(registers: &NativeContext) -> defs::IgvmNativeVpContextX64 {
    defs::IgvmNativeVpContextX64 {
        rax: registers.rax,
        rcx: registers.rcx,
        rdx: registers.rdx,
        rbx: registers.rbx,
        rsp: registers.rsp,
        rbp: registers.rbp,
        rsi: registers.rsi,
        rdi: registers.rdi,
        r8: registers.r8,
        r9: registers.r9,
        r10: registers.r10,
        r11: registers.r11,
        r12: registers.r12,
        r13: registers.r13,
        r14: registers.r14,
        r15: registers.r15,
        rip: registers.rip,
        rflags: registers.rflags,
        idtr_base: registers.idtr.base,
        idtr_limit: registers.idtr.limit,
        reserved: [0; 2],
        gdtr_limit: registers.gdtr.limit,
        gdtr_base: registers.gdtr.base,
        code_selector: registers.code.selector,
        code_attributes: registers.code.attributes,
        code_base: registers.code.base,
        code_limit: registers.code.limit,
        data_selector: registers.data.selector,
        data_attributes: registers.data.attributes,
        data_base: registers.data.base,
        data_limit: registers.data.limit,
        gs_base: registers.gs_base,
        cr0: registers.cr0,
        cr3: registers.cr3,
        cr4: registers.cr4,
        efer: registers.efer,
    }
}

fn id_block(mask: u32, block: &SnpIdBlock) -> defs::IGVM_VHS_SNP_ID_BLOCK {
    let signature = |it: &Signature| defs::IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: it.r, s_comp: it.s };
    let key = |it: &PublicKey| defs::IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY {
        curve: it.curve,
        reserved: 0,
        qx: it.x,
        qy: it.y,
    };
    let (author_key_signature, author_public_key) = match &block.author {
        Some((by, author)) => (signature(by), key(author)),
        None => (FromZeros::new_zeroed(), FromZeros::new_zeroed()),
    };
    defs::IGVM_VHS_SNP_ID_BLOCK {
        compatibility_mask: mask,
        author_key_enabled: block.author.is_some().into(),
        reserved: [0; 3],
        ld: block.launch_digest,
        family_id: block.family_id,
        image_id: block.image_id,
        version: block.version,
        guest_svn: block.guest_svn,
        id_key_algorithm: block.id_key_algorithm,
        author_key_algorithm: block.author_key_algorithm,
        id_key_signature: signature(&block.id_signature),
        id_public_key: key(&block.id_key),
        author_key_signature,
        author_public_key,
    }
}
