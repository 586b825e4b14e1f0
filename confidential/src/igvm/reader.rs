//! Reads IGVM files where they lie.

use std::collections::{BTreeMap, BTreeSet};

use igvm_defs as defs;
use zerocopy::{FromBytes, IntoBytes};

use super::error::{HeaderError, Problem, ReadError};
use super::header::{self, FileBytes, Header, Surroundings};
use super::pages::{Budget, Pages};
use crate::image::importer::{ImagePlatform, PlatformInfo};

/// What variable headers are aligned to.
const ALIGNMENT: usize = 8;

/// The processor architecture of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// x86-64.
    X64,
    /// AArch64.
    Aarch64,
}

/// A file that was checked.
///
/// The checks were made on the bytes that were there then. Should somebody change a mapped file under
/// its reader, [`Igvm::headers`] gives what is there now, or an error, and never anything outside the file.
#[derive(Clone, Debug)]
pub struct Igvm<'a> {
    file: FileBytes<'a>,
    version: u32,
    architecture: Architecture,
    section: Section<'a>,
    platforms: Vec<PlatformInfo>,
}

/// The variable headers.
#[derive(Clone, Copy, Debug)]
struct Section<'a> {
    bytes: &'a [u8],
    /// Where they begin in the file.
    offset: usize,
}

/// A variable header, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Number of the header in the file, from 0.
    pub index: u32,
    /// Where it begins in the file, bytes.
    pub offset: u64,
    /// Its type, without the optional bit.
    pub header_type: u32,
    /// What it says.
    pub header: Header<'a>,
}

impl Entry<'_> {
    /// `problem` with this header.
    pub fn problem(&self, problem: Problem) -> HeaderError {
        HeaderError { index: self.index, offset: self.offset, header_type: self.header_type, problem }
    }
}

impl<'a> Igvm<'a> {
    /// Checks the whole of `file`, headers and all references into it, but reads no page of it.
    ///
    /// For a file that this accepts, for each of its platforms: no two pages have the same address, and each parameter
    /// lies inside an area that is inserted later or never. Memory for pages and areas is at most 16 MiB and 256 times
    /// the file's size in all.
    pub fn new(file: &'a [u8]) -> Result<Self, ReadError> {
        Self::with_head(file, file)
    }

    /// As [`Igvm::new`], of a file that is mapped and may be cut off by somebody at any time, which would end whoever
    /// reads it by SIGBUS: `head` is a copy of its first bytes. If that is as long as [`length_of_headers`] says, the
    /// mapped file is read only for contexts of vCPUs that lie further behind (in our own images they do not, if there
    /// are some 20 pages more). Content that lies in `head` is a slice of it, other content of `file`.
    pub fn with_head(head: &'a [u8], file: &'a [u8]) -> Result<Self, ReadError> {
        let file = FileBytes { head, mapped: file };
        let fixed = FixedHeader::new(file)?;
        let mut igvm = Self {
            file,
            version: fixed.version,
            architecture: fixed.architecture,
            section: fixed.section,
            platforms: Vec::new(),
        };
        let mut check = Check::new(&igvm);
        let mut headers = Headers::new(igvm.section, file);
        while let Some(entry) = headers.next_entry()? {
            check.header(&entry.header).map_err(|problem| entry.problem(problem))?;
        }
        if check.platforms.is_empty() {
            return Err(ReadError::NoPlatform);
        }
        igvm.platforms = check.platforms.into_iter().map(|platform| platform.info).collect();
        Ok(igvm)
    }

    /// The bytes of the file.
    pub(crate) fn file(&self) -> FileBytes<'a> {
        self.file
    }

    /// Version of the format: 1 or 2.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The architecture; files of version 1 are for x86-64.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The platforms that the file names, with their policies, in the file's order.
    pub fn platforms(&self) -> &[PlatformInfo] {
        &self.platforms
    }

    /// The variable headers, in the file's order.
    pub fn headers(&self) -> impl Iterator<Item = Result<Entry<'a>, HeaderError>> + use<'a> {
        let mut headers = Headers::new(self.section, self.file);
        std::iter::from_fn(move || headers.next_entry().transpose())
    }
}

/// Where the variable headers of a file end, bytes, by its first 32 bytes: so many must be there before a file can be
/// read. (The fixed header of version 1 has 24 bytes, but a file has more.)
pub fn length_of_headers(beginning: &[u8]) -> Result<u64, ReadError> {
    let short = || ReadError::Short { length: beginning.len() };
    let (header, _) = defs::IGVM_FIXED_HEADER::read_from_prefix(beginning).map_err(|_| short())?;
    if header.magic != defs::IGVM_MAGIC_VALUE {
        return Err(ReadError::Magic(header.magic));
    }
    Ok(u64::from(header.variable_header_offset).saturating_add(header.variable_header_size.into()))
}

/// What the fixed header says.
struct FixedHeader<'a> {
    version: u32,
    architecture: Architecture,
    section: Section<'a>,
}

impl<'a> FixedHeader<'a> {
    fn new(file: FileBytes<'a>) -> Result<Self, ReadError> {
        let short = || ReadError::Short { length: file.len() };
        let beginning =
            file.get(0..size_of::<defs::IGVM_FIXED_HEADER_V2>().min(file.len())).unwrap_or_default();
        let (mut header, _) = defs::IGVM_FIXED_HEADER::read_from_prefix(beginning).map_err(|_| short())?;
        if header.magic != defs::IGVM_MAGIC_VALUE {
            return Err(ReadError::Magic(header.magic));
        }
        // The fields of version 2 that follow those of version 1.
        let mut more: &[u8] = &[];
        let mut architecture = Architecture::X64;
        match header.format_version {
            defs::IGVM_FORMAT_VERSION_1 => {}
            defs::IGVM_FORMAT_VERSION_2 => {
                let (second, _) =
                    defs::IGVM_FIXED_HEADER_V2::read_from_prefix(beginning).map_err(|_| short())?;
                architecture = match second.architecture {
                    defs::IgvmArchitecture::X64 => Architecture::X64,
                    defs::IgvmArchitecture::AARCH64 => Architecture::Aarch64,
                    other => return Err(ReadError::Architecture(other.0)),
                };
                if u64::from(second.page_size) != defs::PAGE_SIZE_4K {
                    return Err(ReadError::PageSize(second.page_size));
                }
                let fields = size_of::<defs::IGVM_FIXED_HEADER>()..size_of::<defs::IGVM_FIXED_HEADER_V2>();
                more = beginning.get(fields).unwrap_or_default();
            }
            other => return Err(ReadError::Version(other)),
        }
        if u32::try_from(file.len()) != Ok(header.total_file_size) {
            return Err(ReadError::FileSize { header: header.total_file_size, file: file.len() });
        }

        let offset = header.variable_header_offset as usize;
        let end = offset.checked_add(header.variable_header_size as usize);
        let inside = offset.is_multiple_of(ALIGNMENT)
            && offset >= size_of::<defs::IGVM_FIXED_HEADER>().saturating_add(more.len());
        let bytes =
            end.filter(|_| inside).and_then(|end| file.get(offset..end)).ok_or(ReadError::Section {
                offset: header.variable_header_offset,
                size: header.variable_header_size,
            })?;

        let said = header.checksum;
        header.checksum = 0;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(header.as_bytes());
        hasher.update(more);
        hasher.update(bytes);
        let computed = hasher.finalize();
        if computed != said {
            return Err(ReadError::Checksum { header: said, computed });
        }
        Ok(Self { version: header.format_version, architecture, section: Section { bytes, offset } })
    }
}

/// The sections of the variable headers, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Platform,
    Initialization,
    Directive,
}

/// Goes through the variable headers.
struct Headers<'a> {
    section: Section<'a>,
    file: FileBytes<'a>,
    /// Where the next header begins in the section.
    position: usize,
    index: u32,
    stage: Stage,
    platforms: Vec<(u32, ImagePlatform)>,
}

impl<'a> Headers<'a> {
    fn new(section: Section<'a>, file: FileBytes<'a>) -> Self {
        let platforms = Vec::new();
        Self { section, file, position: 0, index: 0, stage: Stage::Platform, platforms }
    }

    /// The next header; after an error there is none.
    fn next_entry(&mut self) -> Result<Option<Entry<'a>>, HeaderError> {
        let rest = self.section.bytes.get(self.position..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(None);
        }
        let mut entry = Entry {
            index: self.index,
            offset: self.section.offset.saturating_add(self.position) as u64,
            header_type: 0,
            header: Header::Skipped,
        };
        self.position = self.section.bytes.len();
        let cut_off = Problem::Truncated { left: rest.len() };
        let Ok((head, rest)) = defs::IGVM_VHS_VARIABLE_HEADER::read_from_prefix(rest) else {
            return Err(entry.problem(cut_off));
        };
        entry.header_type = head.typ.0 & !defs::IGVM_VHT_OPTIONAL_BIT;
        let optional = head.typ.0 & defs::IGVM_VHT_OPTIONAL_BIT != 0;
        let padded = (head.length as usize).checked_next_multiple_of(ALIGNMENT);
        let Some((content, after)) = padded.and_then(|padded| rest.split_at_checked(padded)) else {
            return Err(entry.problem(cut_off));
        };
        let (content, padding) = content.split_at_checked(head.length as usize).unwrap_or((content, &[]));
        let header = self
            .parse(entry.header_type, optional, content, padding)
            .map_err(|problem| entry.problem(problem))?;
        if let Header::Platform { mask, platform, .. } = &header {
            self.platforms.push((*mask, *platform));
        }
        entry.header = header;
        self.position = self.section.bytes.len().saturating_sub(after.len());
        self.index = self.index.saturating_add(1);
        Ok(Some(entry))
    }

    fn parse(
        &mut self,
        header_type: u32,
        optional: bool,
        content: &'a [u8],
        padding: &[u8],
    ) -> Result<Header<'a>, Problem> {
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Problem::Padding);
        }
        let stage = if defs::IGVM_VHT_RANGE_PLATFORM.contains(&header_type) {
            Stage::Platform
        } else if defs::IGVM_VHT_RANGE_INIT.contains(&header_type) {
            Stage::Initialization
        } else if defs::IGVM_VHT_RANGE_DIRECTIVE.contains(&header_type) {
            Stage::Directive
        } else {
            self.stage
        };
        if stage < self.stage {
            return Err(Problem::Order);
        }
        self.stage = stage;
        let around = Surroundings {
            file: self.file,
            data_start: self.section.offset.saturating_add(self.section.bytes.len()),
            platforms: &self.platforms,
        };
        header::parse(header_type, optional, content, &around)
    }
}

/// What must hold between the headers of a file.
struct Check {
    architecture: Architecture,
    platforms: Vec<PlatformCheck>,
    /// The length of each parameter area; `None` once it was inserted.
    areas: BTreeMap<u32, Option<u64>>,
    version_string: bool,
    budget: Budget,
}

/// What must hold between the headers for one platform.
struct PlatformCheck {
    info: PlatformInfo,
    pages: Pages,
    vcpus: BTreeSet<u16>,
    corim_document: bool,
    corim_signature: bool,
    id_block: bool,
}

impl Check {
    fn new(igvm: &Igvm<'_>) -> Self {
        Self {
            architecture: igvm.architecture,
            platforms: Vec::new(),
            areas: BTreeMap::new(),
            version_string: false,
            budget: Budget::new(igvm.file.len() as u64),
        }
    }

    fn header(&mut self, header: &Header<'_>) -> Result<(), Problem> {
        match *header {
            Header::Platform { mask, platform, highest_vtl, shared_gpa_boundary } => {
                self.platform(PlatformInfo {
                    platform,
                    mask,
                    highest_vtl,
                    shared_gpa_boundary,
                    policy: None,
                    cca_policy: None,
                })
            }
            Header::GuestPolicy { mask, policy } => {
                self.each(mask, |it| once(it.info.platform, it.info.policy.replace(policy).is_some()))
            }
            Header::CcaPolicy { mask, policy } => self.each(mask, |it| match it.info.platform {
                ImagePlatform::Cca => once(it.info.platform, it.info.cca_policy.replace(policy).is_some()),
                other => Err(Problem::NotOnPlatform(other)),
            }),
            Header::CorimDocument { mask, .. } => {
                self.each(mask, |it| once(it.info.platform, std::mem::replace(&mut it.corim_document, true)))
            }
            Header::CorimSignature { mask, .. } => self.each(mask, |it| {
                if !it.corim_document {
                    return Err(Problem::NoCorim);
                }
                once(it.info.platform, std::mem::replace(&mut it.corim_signature, true))
            }),
            Header::VersionString(_) => match std::mem::replace(&mut self.version_string, true) {
                true => Err(Problem::TwiceInFile),
                false => Ok(()),
            },
            Header::PageData { mask, gpa, length, .. } => self.pages(mask, gpa, length),
            Header::ParameterArea { area, length, .. } => {
                self.budget.take(length).map_err(|limit| Problem::TooMuch { limit })?;
                match self.areas.insert(area, Some(length)) {
                    None => Ok(()),
                    Some(_) => Err(Problem::AreaTwice(area)),
                }
            }
            Header::Parameter { area, offset, .. } => match self.areas.get(&area) {
                Some(Some(length)) if u64::from(offset) < *length => Ok(()),
                Some(Some(length)) => Err(Problem::OutsideArea { area, offset, length: *length }),
                _ => Err(Problem::NoArea(area)),
            },
            Header::ParameterInsert { mask, gpa, area } => {
                let length = self.areas.get_mut(&area).and_then(Option::take).ok_or(Problem::NoArea(area))?;
                gpa.checked_add(length).ok_or(Problem::Wraps { gpa, length })?;
                self.occupy(mask, gpa, length)
            }
            Header::VpContext { mask, index, .. } => self.each(mask, |it| {
                let platform = it.info.platform;
                if it.vcpus.insert(index) { Ok(()) } else { Err(Problem::VpTwice { index, platform }) }
            }),
            Header::SnpIdBlock { mask, .. } => self.each(mask, |it| match it.info.platform {
                ImagePlatform::Snp => once(it.info.platform, std::mem::replace(&mut it.id_block, true)),
                other => Err(Problem::NotOnPlatform(other)),
            }),
            Header::Relocation { .. }
            | Header::RequiredMemory { .. }
            | Header::ErrorRange { .. }
            | Header::VbsMeasurement { .. }
            | Header::Skipped => Ok(()),
        }
    }

    fn platform(&mut self, info: PlatformInfo) -> Result<(), Problem> {
        let architecture = match info.platform {
            ImagePlatform::Vsm => self.architecture,
            ImagePlatform::Cca => Architecture::Aarch64,
            _ => Architecture::X64,
        };
        if architecture != self.architecture {
            return Err(Problem::PlatformArchitecture(info.platform));
        }
        for other in &self.platforms {
            if other.info.mask == info.mask {
                return Err(Problem::MaskTaken(info.mask));
            }
            once(info.platform, other.info.platform == info.platform)?;
        }
        self.platforms.push(PlatformCheck {
            info,
            pages: Pages::default(),
            vcpus: BTreeSet::new(),
            corim_document: false,
            corim_signature: false,
            id_block: false,
        });
        Ok(())
    }

    fn each(
        &mut self,
        mask: u32,
        mut check: impl FnMut(&mut PlatformCheck) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        self.platforms.iter_mut().filter(|it| it.info.mask & mask != 0).try_for_each(&mut check)
    }

    fn pages(&mut self, mask: u32, gpa: u64, length: u64) -> Result<(), Problem> {
        self.budget.take(length).map_err(|limit| Problem::TooMuch { limit })?;
        self.occupy(mask, gpa, length)
    }

    fn occupy(&mut self, mask: u32, gpa: u64, length: u64) -> Result<(), Problem> {
        self.each(mask, |it| match it.pages.insert(gpa, gpa.saturating_add(length)) {
            true => Ok(()),
            false => Err(Problem::Overlap { gpa, length, platform: it.info.platform }),
        })
    }
}

fn once(platform: ImagePlatform, there_already: bool) -> Result<(), Problem> {
    if there_already { Err(Problem::Twice(platform)) } else { Ok(()) }
}
