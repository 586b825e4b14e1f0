//! ELF kernels: program headers, and the Xen note that offers PVH.
//!
//! Only what loading needs is read: the file header, the table of program headers, and
//! the note segments. Sections and symbols are not looked at.

use cofferdam_firmware::layout;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

use super::error::{ElfError, KernelError, Part};
use super::file::ImageFile;
use super::kernel::{EntryPoint, KernelImage, Segment};
use super::{Protocol, zero_page};

/// The first bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_POSITION_INDEPENDENT: u16 = 3;
const MACHINE_X86_64: u16 = 62;

/// More program headers than any kernel has (Linux: 5).
const MAX_PROGRAM_HEADERS: u16 = 64;
/// More bytes of notes than any kernel has (Linux: some 500).
const MAX_NOTES: u64 = 64 << 10;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the physical address of the 32-bit entry point.
const XEN_PHYS32_ENTRY: u32 = 18;
const XEN_NAME: &[u8] = b"Xen\0";

/// Reads the headers of an ELF file.
pub(super) fn parse(file: &ImageFile, protocol: Protocol) -> Result<KernelImage, KernelError> {
    let header = read_header(file)?;
    let program_headers = read_program_headers(file, &header)?;
    let segments = load_segments(file, &program_headers)?;
    let pvh_entry = match protocol {
        Protocol::Linux64 => None,
        Protocol::Auto | Protocol::Pvh => find_pvh_entry(file, &program_headers)?,
    };
    let entry = match pvh_entry {
        Some(address) => EntryPoint::Pvh { address },
        None if protocol == Protocol::Pvh => return Err(KernelError::NoPvhEntry),
        None => EntryPoint::Linux64 { address: header.e_entry, zero_page: zero_page::for_elf() },
    };
    let (EntryPoint::Pvh { address } | EntryPoint::Linux64 { address, .. }) = entry;
    if !segments.iter().any(|segment| (segment.address..loaded_end(segment)).contains(&address)) {
        return Err(ElfError::Entry(address).into());
    }
    Ok(KernelImage {
        segments,
        entry,
        initrd_limit: layout::GAP_START,
        command_line_max: layout::COMMAND_LINE_MAX as u64,
    })
}

fn loaded_end(segment: &Segment) -> u64 {
    segment.address.saturating_add(segment.file_size)
}

fn read_header(file: &ImageFile) -> Result<Elf64_Ehdr, KernelError> {
    let mut header = Elf64_Ehdr::default();
    let bytes = header.as_mut_slice();
    check_within(file, Part::Header, 0, bytes.len() as u64)?;
    file.read_at(bytes, 0)?;
    let [_, _, _, _, class, data, ..] = header.e_ident;
    if (class, data) != (CLASS_64, DATA_LITTLE_ENDIAN) {
        return Err(ElfError::Class { class, data }.into());
    }
    if header.e_machine != MACHINE_X86_64 {
        return Err(ElfError::Machine(header.e_machine).into());
    }
    if !matches!(header.e_type, TYPE_EXECUTABLE | TYPE_POSITION_INDEPENDENT) {
        return Err(ElfError::Type(header.e_type).into());
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(ElfError::ProgramHeaderSize(header.e_phentsize).into());
    }
    if !(1..=MAX_PROGRAM_HEADERS).contains(&header.e_phnum) {
        return Err(ElfError::ProgramHeaderCount(header.e_phnum).into());
    }
    Ok(header)
}

fn read_program_headers(file: &ImageFile, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let size = u64::from(header.e_phentsize).saturating_mul(u64::from(header.e_phnum));
    check_within(file, Part::ProgramHeaders, header.e_phoff, size)?;
    let mut headers = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
    for (offset, entry) in (header.e_phoff..).step_by(size_of::<Elf64_Phdr>()).zip(&mut headers) {
        file.read_at(entry.as_mut_slice(), offset)?;
    }
    Ok(headers)
}

/// The segments to load, by rising address.
fn load_segments(file: &ImageFile, headers: &[Elf64_Phdr]) -> Result<Vec<Segment>, ElfError> {
    let mut segments = Vec::with_capacity(headers.len());
    for (index, header) in headers.iter().enumerate() {
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let &Elf64_Phdr { p_filesz: file_size, p_memsz: memory_size, p_paddr: address, .. } = header;
        check_within(file, Part::Segment(index), header.p_offset, file_size)?;
        if file_size > memory_size {
            return Err(ElfError::SegmentSize { index, file_size, memory_size });
        }
        let end = address.checked_add(memory_size);
        if address < layout::HIGH_MEMORY || end.is_none_or(|end| end > layout::GAP_START) {
            return Err(ElfError::SegmentPlace { index, address, size: memory_size });
        }
        segments.push(Segment { file_offset: header.p_offset, file_size, address, memory_size });
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegment);
    }
    segments.sort_unstable_by_key(|segment| segment.address);
    for (lower, upper) in segments.iter().zip(segments.iter().skip(1)) {
        if lower.memory().end > upper.address {
            return Err(ElfError::Overlap { first: lower.address, second: upper.address });
        }
    }
    Ok(segments)
}

/// Checks that `size` bytes at `offset` are in the file.
fn check_within(file: &ImageFile, part: Part, offset: u64, size: u64) -> Result<(), ElfError> {
    let end = offset.saturating_add(size);
    if end > file.length() {
        return Err(ElfError::Truncated { part, end, length: file.length() });
    }
    Ok(())
}

/// The entry point of the first Xen note that names one.
fn find_pvh_entry(file: &ImageFile, headers: &[Elf64_Phdr]) -> Result<Option<u64>, KernelError> {
    for (index, header) in headers.iter().enumerate().filter(|(_, header)| header.p_type == PT_NOTE) {
        check_within(file, Part::Segment(index), header.p_offset, header.p_filesz)?;
        if header.p_filesz > MAX_NOTES {
            return Err(ElfError::NotesTooLarge { index, size: header.p_filesz }.into());
        }
        let mut notes = vec![0; header.p_filesz as usize];
        file.read_at(&mut notes, header.p_offset)?;
        // The gABI pads to 4 bytes; segments aligned to 8 (GNU properties) pad to 8.
        let alignment = if header.p_align == 8 { 8 } else { 4 };
        let found = pvh_entry_in(&notes, alignment).map_err(|offset| ElfError::Notes { index, offset })?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Looks through the notes of one segment. The error is the offset of a note that makes no sense.
fn pvh_entry_in(notes: &[u8], alignment: usize) -> Result<Option<u64>, usize> {
    let mut rest = notes;
    while !rest.is_empty() {
        let offset = notes.len().saturating_sub(rest.len());
        let note = split_note(rest, alignment).ok_or(offset)?;
        if note.kind == XEN_PHYS32_ENTRY && note.name == XEN_NAME {
            return match note.description {
                // `.long` in the ABI's text, a 64-bit word in 64-bit Linux.
                &[a, b, c, d] | &[a, b, c, d, 0, 0, 0, 0] => {
                    Ok(Some(u64::from(u32::from_le_bytes([a, b, c, d]))))
                }
                _ => Err(offset),
            };
        }
        rest = note.rest;
    }
    Ok(None)
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    description: &'a [u8],
    rest: &'a [u8],
}

fn split_note(bytes: &[u8], alignment: usize) -> Option<Note<'_>> {
    let mut header = Elf64_Nhdr::default();
    let (head, body) = bytes.split_at_checked(size_of::<Elf64_Nhdr>())?;
    header.as_mut_slice().copy_from_slice(head);
    let name = body.get(..usize::try_from(header.n_namesz).ok()?)?;
    let start = (head.len().checked_add(name.len())?).checked_next_multiple_of(alignment)?;
    let end = start.checked_add(usize::try_from(header.n_descsz).ok()?)?;
    let description = bytes.get(start..end)?;
    // The padding of the last note may be missing.
    let rest = bytes.get(end.checked_next_multiple_of(alignment)?..).unwrap_or_default();
    Some(Note { kind: header.n_type, name, description, rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, description: &[u8], alignment: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, description.len() as u32, kind] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(alignment), 0);
        bytes.extend(description);
        bytes.resize(bytes.len().next_multiple_of(alignment), 0);
        bytes
    }

    #[test]
    fn xen_note_is_found_behind_others() {
        for alignment in [4, 8] {
            let mut notes = note(b"GNU\0", 3, &[1; 20], alignment);
            notes.extend(note(b"Linux\0", 18, &[2; 4], alignment));
            notes.extend(note(XEN_NAME, 6, b"linux\0", alignment));
            assert_eq!(pvh_entry_in(&notes, alignment), Ok(None));
            let four = [&notes[..], &note(XEN_NAME, 18, &0x100_0070_u32.to_le_bytes(), alignment)].concat();
            let eight = [&notes[..], &note(XEN_NAME, 18, &0x100_0070_u64.to_le_bytes(), alignment)].concat();
            assert_eq!(pvh_entry_in(&four, alignment), Ok(Some(0x100_0070)));
            assert_eq!(pvh_entry_in(&eight, alignment), Ok(Some(0x100_0070)));
        }
    }

    #[test]
    fn malformed_notes_name_their_offset() {
        let good = note(b"GNU\0", 3, &[1; 20], 4);
        let above_4_gib = note(XEN_NAME, 18, &0x1_0000_0000_u64.to_le_bytes(), 4);
        let odd_size = note(XEN_NAME, 18, &[0; 3], 4);
        let huge_name = [u32::MAX.to_le_bytes(), [0; 4], [0; 4]].concat();
        let huge_description = [[0; 4], u32::MAX.to_le_bytes(), [0; 4]].concat();
        for bad in [&above_4_gib[..], &odd_size, &huge_name, &huge_description, &[0; 11]] {
            assert_eq!(pvh_entry_in(&[&good, bad].concat(), 4), Err(good.len()), "{bad:?}");
        }
    }

    #[test]
    fn missing_padding_at_the_end_is_no_error() {
        let mut notes = note(b"GNU\0", 3, &[1; 3], 4);
        notes.pop();
        assert_eq!(pvh_entry_in(&notes, 4), Ok(None));
    }
}
