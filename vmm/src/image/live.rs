//! The importer that puts an image into a plain domain.
//!
//! What lies in RAM is copied there. What lies outside becomes a memory slot of its own: the load window, on the mapped
//! files where that is possible; and firmware of other makers, below the end of the first 4 GiB, as a copy.

use std::borrow::Cow;
use std::ops::Range;

use cofferdam_confidential::MemorySlot;
use cofferdam_confidential::image::importer::{
    Content, ImagePlatform, Importer, Item, PageKind, PageRun, Parameter, ParameterArea, ParameterKind,
    PlatformInfo, VcpuContext,
};
use cofferdam_firmware::e820;
use cofferdam_firmware::layout::{
    GAP_END, LOAD_WINDOW, LOAD_WINDOW_SIZE, LOCAL_APIC, MIB, PAGE_SIZE, PARAMETER_PAGE, ram_ranges,
};
use cofferdam_firmware::parameters::Parameters;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

use super::error::ImportError;
use super::registers::FirstVcpu;
use crate::boot::file::ImageFile;

/// The number of the first slot: those before it are for RAM.
const FIRST_SLOT: u32 = 8;
/// Most bytes of one run outside RAM that are copied: other makers' firmware has 2 to 16 MiB.
const MAX_COPY: u64 = 16 * MIB;
/// Where such firmware may be: from the end of the local APICs' megabyte on.
const FIRMWARE: Range<u64> = LOCAL_APIC + MIB..GAP_END;

/// What an import left to be done.
pub(super) struct Import {
    /// Memory beside RAM.
    pub(super) slots: Vec<MemorySlot>,
    /// What is behind those slots that are not on a mapped file.
    pub(super) copies: Vec<MmapRegion>,
    /// How the first vCPU begins.
    pub(super) first_vcpu: FirstVcpu,
}

/// The domain.
#[derive(Clone, Copy)]
pub(super) struct Machine<'m> {
    /// Its fresh memory.
    pub(super) memory: &'m GuestMemoryMmap,
    /// How much that is, bytes.
    pub(super) size: u64,
    /// Number of its vCPUs.
    pub(super) vcpus: u8,
}

/// Puts items into a domain.
pub(super) struct LiveImporter<'m> {
    machine: Machine<'m>,
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
        machine: Machine<'m>,
        mapped: &'m [Range<usize>],
        file: Option<&'m ImageFile>,
        parameters: Option<&'m Parameters>,
    ) -> Self {
        let import = Import { slots: Vec::new(), copies: Vec::new(), first_vcpu: FirstVcpu::default() };
        Self { machine, mapped, file, parameters, import }
    }

    /// After the walk.
    pub(super) fn finish(self) -> Import {
        self.import
    }

    fn is_ram(&self, gpa: u64, length: u64) -> bool {
        ram_ranges(self.machine.size).iter().any(|&(start, size)| {
            gpa.checked_sub(start)
                .is_some_and(|offset| offset <= size && length <= size.saturating_sub(offset))
        })
    }

    fn no_memory(&self, gpa: u64, length: u64) -> ImportError {
        ImportError::NoMemory { gpa, length, memory: self.machine.size }
    }

    /// The bytes of `content`, to be looked at: in a mapped file that would be dangerous.
    fn look<'c>(&self, content: &Content<'c>) -> Result<Cow<'c, [u8]>, ImportError> {
        let address = content.bytes.as_ptr() as usize;
        if !self.mapped.iter().any(|file| file.contains(&address)) {
            return Ok(Cow::Borrowed(content.bytes));
        }
        let (Some(file), Some(offset)) = (self.file, content.file_offset) else {
            return Err(ImportError::Unsupported("a copy of what is to be mapped"));
        };
        let mut bytes = vec![0; content.bytes.len()];
        file.read_at(&mut bytes, offset).map_err(ImportError::File)?;
        Ok(Cow::Owned(bytes))
    }

    /// Copies to RAM. It is fresh, so that zeros need not be written.
    fn write(&self, gpa: u64, bytes: &[u8]) -> Result<(), ImportError> {
        self.machine
            .memory
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(|error| ImportError::Write { gpa, error })
    }

    fn pages(&mut self, run: &PageRun<'_>) -> Result<(), ImportError> {
        let (gpa, length) = (run.gpa, run.length());
        match run.kind {
            PageKind::Measured | PageKind::Unmeasured | PageKind::Shared => {}
            PageKind::SnpSecrets | PageKind::SnpCpuid | PageKind::SnpCpuidXf => {
                return Err(ImportError::Unsupported("a page of SEV-SNP"));
            }
        }
        if self.is_ram(gpa, length) {
            return self.write(gpa, &self.look(&run.content)?);
        }
        let inside = |range: &Range<u64>| range.contains(&gpa) && length <= range.end.saturating_sub(gpa);
        let window = LOAD_WINDOW..LOAD_WINDOW.saturating_add(LOAD_WINDOW_SIZE);
        let is_window = run.kind == PageKind::Shared && inside(&window);
        if !is_window && !inside(&FIRMWARE) {
            return Err(self.no_memory(gpa, length));
        }
        let host_address = match self.mapping(run) {
            Some(address) => address,
            None => self.copy(run)?,
        };
        // Fits: no image has so many headers.
        let slot = FIRST_SLOT.saturating_add(self.import.slots.len() as u32);
        let read_only = run.kind == PageKind::Shared;
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

    fn parameter_area(&mut self, area: &ParameterArea<'_>) -> Result<(), ImportError> {
        let (gpa, length) = (area.gpa, area.length());
        if !self.is_ram(gpa, length) {
            return Err(self.no_memory(gpa, length));
        }
        self.write(gpa, &self.look(&area.initial)?)?;
        if let Some(parameters) = self.parameters.filter(|_| gpa == PARAMETER_PAGE) {
            self.write(gpa, &parameters.encode())?;
        }
        for parameter in &area.values {
            self.parameter(area, parameter)?;
        }
        Ok(())
    }

    /// Writes a value that IGVM defines.
    fn parameter(&self, area: &ParameterArea<'_>, parameter: &Parameter) -> Result<(), ImportError> {
        let value = match parameter.kind {
            ParameterKind::VcpuCount => u32::from(self.machine.vcpus).to_le_bytes().to_vec(),
            // Bit 0: memory is shared until it is accepted, which is not so here.
            ParameterKind::EnvironmentInfo => vec![0; 4],
            ParameterKind::MemoryMap => memory_map(self.machine.size),
            other => return Err(ImportError::Parameter(other.name())),
        };
        let end = u64::from(parameter.offset).saturating_add(value.len() as u64);
        if end > area.length() {
            let (name, offset) = (parameter.kind.name(), parameter.offset);
            return Err(ImportError::ParameterPlace { name, gpa: area.gpa, offset });
        }
        self.write(area.gpa.saturating_add(parameter.offset.into()), &value)
    }
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
        match info.platform {
            ImagePlatform::Plain => Ok(()),
            other => Err(ImportError::Platform(other)),
        }
    }

    fn import(&mut self, _mask: u32, item: &Item<'a>) -> Result<(), ImportError> {
        match item {
            Item::Pages(run) => self.pages(run),
            Item::Parameters(area) => self.parameter_area(area),
            Item::Vcpu { index, context: VcpuContext::NativeX64(context) } => {
                if *index != 0 || !self.import.first_vcpu.set(context) {
                    return Err(ImportError::Vcpu(*index));
                }
                Ok(())
            }
            Item::Vcpu { .. } => Err(ImportError::Unsupported("a vCPU of another platform")),
            Item::RequiredMemory { gpa, length } if !self.is_ram(*gpa, *length) => {
                Err(self.no_memory(*gpa, *length))
            }
            Item::RequiredMemory { .. } => Ok(()),
            Item::SnpIdBlock(_) => Err(ImportError::Unsupported("an ID block of SEV-SNP")),
        }
    }
}
