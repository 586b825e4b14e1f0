//! The importer that puts an image into a domain.
//!
//! What lies in RAM goes there by way of the platform, which may measure and hide it. What lies outside becomes a memory
//! slot of its own: the load window, on the mapped files where that is possible; and firmware of other makers, below
//! the end of the first 4 GiB, as a copy.

use std::borrow::Cow;
use std::ops::Range;

use cofferdam_confidential::MemorySlot;
use cofferdam_confidential::image::importer::{
    Content, ImagePlatform, Importer, Item, PageKind, PageRun, Parameter, ParameterArea, ParameterKind,
    PlatformInfo, VcpuContext,
};
use cofferdam_confidential::launch::{Launch, Populated};
use cofferdam_confidential::platform::LaunchPages;
use cofferdam_confidential::snp::cpuid::CpuidPage;
use cofferdam_firmware::e820;
use cofferdam_firmware::layout::{
    GAP_END, LOAD_WINDOW, LOAD_WINDOW_SIZE, LOCAL_APIC, MIB, PAGE_SIZE, PARAMETER_PAGE, ram_ranges,
};
use cofferdam_firmware::parameters::Parameters;
use tracing::warn;
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory};

use super::error::ImportError;
use super::registers::NativeVcpus;
use crate::arch::CpuTemplate;
use crate::boot::file::ImageFile;

/// The number of the first slot: those before it are for RAM.
const FIRST_SLOT: u32 = 8;
/// Most bytes of one run outside RAM that are copied: other makers' firmware has 2 to 16 MiB.
const MAX_COPY: u64 = 16 * MIB;
/// Most bytes of a parameter area that are not zero.
const MAX_PARAMETERS: u64 = MIB;
/// Where such firmware may be: from the end of the local APICs' megabyte on.
const FIRMWARE: Range<u64> = LOCAL_APIC + MIB..GAP_END;

/// What an import left to be done.
pub(super) struct Import {
    /// Memory beside RAM.
    pub(super) slots: Vec<MemorySlot>,
    /// What is behind those slots that are not on a mapped file.
    pub(super) copies: Vec<MmapRegion>,
    /// How the vCPUs begin, where the platform does not say.
    pub(super) vcpus: NativeVcpus,
}

/// The domain.
#[derive(Clone, Copy)]
pub(super) struct Machine {
    /// How much memory it has, bytes.
    pub(super) memory: u64,
    /// Number of its vCPUs.
    pub(super) vcpus: u8,
}

/// Puts items into a domain.
pub(super) struct LiveImporter<'m> {
    launch: &'m mut Launch<Populated>,
    machine: Machine,
    /// What CPUID says to its vCPUs.
    cpuid: &'m mut CpuTemplate,
    /// Files that are mapped as long as the domain may see them.
    mapped: &'m [Range<usize>],
    /// The image file, if there is one.
    file: Option<&'m ImageFile>,
    /// For an image of ours: what its parameter page says.
    parameters: Option<&'m Parameters>,
    import: Import,
}

impl<'m> LiveImporter<'m> {
    /// Before the walk.
    pub(super) fn new(
        launch: &'m mut Launch<Populated>,
        machine: Machine,
        cpuid: &'m mut CpuTemplate,
        mapped: &'m [Range<usize>],
        file: Option<&'m ImageFile>,
        parameters: Option<&'m Parameters>,
    ) -> Self {
        let import = Import { slots: Vec::new(), copies: Vec::new(), vcpus: NativeVcpus::default() };
        Self { launch, machine, cpuid, mapped, file, parameters, import }
    }

    /// After the walk.
    pub(super) fn finish(self) -> Import {
        self.import
    }

    fn is_ram(&self, gpa: u64, length: u64) -> bool {
        ram_ranges(self.machine.memory).iter().any(|&(start, size)| {
            gpa.checked_sub(start)
                .is_some_and(|offset| offset <= size && length <= size.saturating_sub(offset))
        })
    }

    fn no_memory(&self, gpa: u64, length: u64) -> ImportError {
        ImportError::NoMemory { gpa, length, memory: self.machine.memory }
    }

    /// The bytes of `content`, to be looked at: in a mapped file that would be dangerous.
    fn look<'c>(&self, content: &Content<'c>) -> Result<Cow<'c, [u8]>, ImportError> {
        let address = content.bytes.as_ptr() as usize;
        if !self.mapped.iter().any(|file| file.contains(&address)) {
            return Ok(Cow::Borrowed(content.bytes));
        }
        let (Some(file), Some(offset)) = (self.file, content.file_offset) else {
            return Err(ImportError::CopyOfMapping);
        };
        let mut bytes = vec![0; content.bytes.len()];
        file.read_at(&mut bytes, offset).map_err(ImportError::File)?;
        Ok(Cow::Owned(bytes))
    }

    fn pages(&mut self, run: &PageRun<'_>) -> Result<(), ImportError> {
        let (gpa, length) = (run.gpa, run.length());
        if self.is_ram(gpa, length) {
            return self.load(run);
        }
        let inside = |range: &Range<u64>| range.contains(&gpa) && length <= range.end.saturating_sub(gpa);
        let window = LOAD_WINDOW..LOAD_WINDOW.saturating_add(LOAD_WINDOW_SIZE);
        let is_shared = run.kind == PageKind::Shared;
        let is_firmware =
            inside(&FIRMWARE) && (is_shared || self.launch.image_platform() == ImagePlatform::Plain);
        let is_window = is_shared && inside(&window);
        if !is_window && !is_firmware {
            return Err(self.no_memory(gpa, length));
        }
        let host_address = match self.mapping(run) {
            Some(address) => address,
            None => self.copy(run)?,
        };
        // Fits: no image has so many headers.
        let slot = FIRST_SLOT.saturating_add(self.import.slots.len() as u32);
        let read_only = is_shared;
        self.import.slots.push(MemorySlot { slot, guest_address: gpa, length, host_address, read_only });
        Ok(())
    }

    /// The address of the run's content, if it is all that a mapped file has there, in whole pages.
    fn mapping(&self, run: &PageRun<'_>) -> Option<u64> {
        let address = run.content.bytes.as_ptr() as usize;
        let end = address.checked_add(run.content.bytes.len())?;
        let whole = (run.content.bytes.len() as u64).next_multiple_of(PAGE_SIZE) == run.length();
        let aligned = (address as u64).is_multiple_of(PAGE_SIZE);
        let mapped = self.mapped.iter().any(|file| file.start <= address && end <= file.end);
        // Within its last page a file is followed by zeros, but anywhere else by something that was not meant.
        let padded = self.mapped.iter().any(|file| file.end == end) || (end as u64).is_multiple_of(PAGE_SIZE);
        (run.kind == PageKind::Shared && whole && aligned && mapped && padded).then_some(address as u64)
    }

    fn copy(&mut self, run: &PageRun<'_>) -> Result<u64, ImportError> {
        let (gpa, length) = (run.gpa, run.length());
        if length > MAX_COPY {
            return Err(ImportError::Unaligned { gpa, length });
        }
        let failed = |error: String| ImportError::Copy { gpa, length, error };
        let copy = MmapRegion::new(length as usize).map_err(|error| failed(error.to_string()))?;
        let bytes = self.look(&run.content)?;
        let place = copy.get_slice(0, bytes.len()).map_err(|error| failed(error.to_string()))?;
        place.copy_from(&bytes);
        let address = copy.as_ptr() as u64;
        self.import.copies.push(copy);
        Ok(address)
    }

    /// Puts pages into RAM.
    fn load(&mut self, run: &PageRun<'_>) -> Result<(), ImportError> {
        let (gpa, pages, kind) = (run.gpa, run.pages, run.kind);
        let cpuid;
        let content = self.look(&run.content)?;
        let bytes = match kind {
            PageKind::Shared => {
                let memory = self.launch.memory();
                let written = memory.write_slice(&content, GuestAddress(gpa));
                return written.map_err(|error| ImportError::Write { gpa, error });
            }
            PageKind::SnpCpuid => {
                cpuid = self.cpuid_page()?;
                cpuid.bytes()
            }
            PageKind::Measured | PageKind::Unmeasured | PageKind::SnpSecrets | PageKind::SnpCpuidXf => {
                &content
            }
        };
        self.hand_over(&LaunchPages { kind, gpa, pages, bytes })
    }

    fn hand_over(&mut self, pages: &LaunchPages<'_>) -> Result<(), ImportError> {
        if let Some(change) = self.launch.load(pages)? {
            warn!("{change}");
        }
        Ok(())
    }

    fn cpuid_page(&mut self) -> Result<CpuidPage, ImportError> {
        // What differs from vCPU to vCPU is not taken from the page.
        CpuidPage::new(self.cpuid.for_vcpu(0).as_slice()).map_err(ImportError::CpuidPage)
    }

    fn parameter_area(&mut self, area: &ParameterArea<'_>) -> Result<(), ImportError> {
        let (gpa, length) = (area.gpa, area.length());
        if !self.is_ram(gpa, length) {
            return Err(self.no_memory(gpa, length));
        }
        let mut bytes = self.look(&area.initial)?.into_owned();
        if let Some(parameters) = self.parameters.filter(|_| gpa == PARAMETER_PAGE) {
            put(&mut bytes, 0, &parameters.encode());
        }
        for parameter in &area.values {
            self.parameter(area, parameter, &mut bytes)?;
        }
        let (kind, pages) = (PageKind::Unmeasured, area.pages);
        self.hand_over(&LaunchPages { kind, gpa, pages, bytes: &bytes })
    }

    /// Adds a value that IGVM defines to the bytes of its area.
    fn parameter(
        &self,
        area: &ParameterArea<'_>,
        parameter: &Parameter,
        bytes: &mut Vec<u8>,
    ) -> Result<(), ImportError> {
        let value = match parameter.kind {
            ParameterKind::VcpuCount => u32::from(self.machine.vcpus).to_le_bytes().to_vec(),
            // Bit 0: memory is shared until it is accepted. Where it is so, the guest knows it from its processor.
            ParameterKind::EnvironmentInfo => vec![0; 4],
            ParameterKind::MemoryMap => memory_map(self.machine.memory),
            other => return Err(ImportError::Parameter(other.name())),
        };
        let end = u64::from(parameter.offset).saturating_add(value.len() as u64);
        if end > area.length().min(MAX_PARAMETERS) {
            let (name, offset) = (parameter.kind.name(), parameter.offset);
            return Err(ImportError::ParameterPlace { name, gpa: area.gpa, offset });
        }
        put(bytes, parameter.offset as usize, &value);
        Ok(())
    }
}

/// Writes `value` at `offset`, after zeroes where there was nothing.
fn put(bytes: &mut Vec<u8>, offset: usize, value: &[u8]) {
    let end = offset.saturating_add(value.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes.iter_mut().skip(offset).zip(value).for_each(|(to, from)| *to = *from);
}

/// `IGVM_VHS_MEMORY_MAP_ENTRY`s, the last one empty: first page, number of pages, type (0 memory, 1 reserved), flags.
fn memory_map(memory: u64) -> Vec<u8> {
    let end = e820::Range { address: 0, size: 0, kind: e820::RAM };
    let mut bytes = Vec::new();
    for range in e820::map(memory).chain([end]) {
        bytes.extend((range.address >> 12).to_le_bytes());
        bytes.extend((range.size >> 12).to_le_bytes());
        bytes.extend(u16::from(range.kind != e820::RAM).to_le_bytes());
        bytes.extend([0; 6]);
    }
    bytes
}

impl<'a> Importer<'a> for LiveImporter<'_> {
    type Error = ImportError;

    fn platform(&mut self, info: &PlatformInfo) -> Result<(), ImportError> {
        Ok(self.launch.begin(info)?)
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), ImportError> {
        match item {
            Item::Pages(run) => self.pages(run),
            Item::Parameters(area) => self.parameter_area(area),
            Item::Vcpu { index, context } => {
                self.launch.set_context(*index, context)?;
                let is_there = *index < u16::from(self.machine.vcpus);
                match context {
                    VcpuContext::NativeX64(context) if !self.import.vcpus.set(*index, context) => {
                        Err(ImportError::Vcpu(*index))
                    }
                    _ if !is_there => Err(ImportError::Vcpu(*index)),
                    _ => Ok(()),
                }
            }
            Item::RequiredMemory { gpa, length } if !self.is_ram(*gpa, *length) => {
                Err(self.no_memory(*gpa, *length))
            }
            Item::RequiredMemory { .. } => Ok(()),
            Item::SnpIdBlock(block) => Ok(self.launch.set_id_block(block)?),
        }
    }
}
