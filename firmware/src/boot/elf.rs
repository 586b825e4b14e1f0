//! The file header and the program headers of an ELF kernel; sections and notes are not looked at. `e_entry` is
//! taken as a physical address, which is what Linux stores there.

use super::{Kernel, KernelError, MAX_SEGMENTS, Segment, field, placed};
use crate::layout::{COMMAND_LINE_MAX, GAP_START};
use crate::manifest::KernelFormat;

/// The first bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
/// Most program headers (Linux has 5).
pub(super) const MAX_PROGRAM_HEADERS: u16 = 16;

/// `EI_CLASS` and `EI_DATA`: 64-bit, little-endian.
const CLASS_AND_DATA: [u8; 2] = [2, 1];
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_POSITION_INDEPENDENT: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PROGRAM_HEADER_SIZE: u16 = 56;
const PT_LOAD: u32 = 1;

/// Reads the headers of a file of `length` bytes.
pub(super) fn read(head: &[u8], length: u64) -> Result<Kernel, KernelError> {
    let Some(header) = head.first_chunk::<64>() else {
        return Err(KernelError::Truncated { what: "ELF header" });
    };
    let u16_at = |offset| u16::from_le_bytes(field(header, offset).unwrap_or_default());
    let u64_at = |offset| u64::from_le_bytes(field(header, offset).unwrap_or_default());
    let is_program = matches!(u16_at(16), TYPE_EXECUTABLE | TYPE_POSITION_INDEPENDENT);
    let class_and_data = field(header, 4);
    if !is_program
        || class_and_data != Some(CLASS_AND_DATA)
        || u16_at(18) != MACHINE_X86_64
        || u16_at(54) != PROGRAM_HEADER_SIZE
    {
        return Err(KernelError::Machine);
    }
    let count = u16_at(56);
    if count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::SegmentCount { given: count });
    }
    let table = usize::try_from(u64_at(32))
        .ok()
        .and_then(|start| head.get(start..)?.get(..usize::from(count) * usize::from(PROGRAM_HEADER_SIZE)))
        .ok_or(KernelError::Truncated { what: "program header table" })?;

    let entry = u64_at(24);
    let mut entry_is_loaded = false;
    let mut segments = [Segment::default(); MAX_SEGMENTS];
    let mut places = segments.iter_mut();
    let mut end = 0;
    for header in table.as_chunks::<{ PROGRAM_HEADER_SIZE as usize }>().0 {
        let Some(segment) = load_segment(header, length)? else { continue };
        if segment.address < end {
            return Err(KernelError::Segment { address: segment.address });
        }
        end = segment.address + segment.memory_size;
        entry_is_loaded |= (segment.address..segment.address + segment.file_size).contains(&entry);
        match places.next() {
            Some(place) => *place = segment,
            None => return Err(KernelError::SegmentCount { given: count }),
        }
    }
    if end == 0 {
        return Err(KernelError::SegmentCount { given: count });
    }
    if !entry_is_loaded {
        return Err(KernelError::Entry { address: entry });
    }
    Ok(Kernel {
        format: KernelFormat::Elf,
        length,
        segments,
        entry,
        initrd_limit: GAP_START,
        command_line_max: COMMAND_LINE_MAX as u64,
    })
}

/// The segment of a program header, if it is to be loaded.
fn load_segment(
    header: &[u8; PROGRAM_HEADER_SIZE as usize],
    length: u64,
) -> Result<Option<Segment>, KernelError> {
    let u64_at = |offset| u64::from_le_bytes(field(header, offset).unwrap_or_default());
    let memory_size = u64_at(40);
    if u32::from_le_bytes(field(header, 0).unwrap_or_default()) != PT_LOAD || memory_size == 0 {
        return Ok(None);
    }
    let (offset, address, file_size) = (u64_at(8), u64_at(24), u64_at(32));
    if offset > length || file_size > length - offset {
        return Err(KernelError::Truncated { what: "segment" });
    }
    if file_size > memory_size {
        return Err(KernelError::Segment { address });
    }
    placed(Segment { offset, file_size, address, memory_size }).map(Some)
}
