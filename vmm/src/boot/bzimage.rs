//! bzImage kernels (Documentation/arch/x86/boot.rst in Linux).
//!
//! ```text
//! file offset
//! 0x000                        boot sector, a stub that nobody runs
//! 0x1f1                        setup header; the byte at 0x201 says where it ends
//! (setup_sects + 1) * 512      protected-mode code: its first byte goes to the load address,
//!                              and 0x200 behind that is the 64-bit entry
//! ```
//!
//! The kernel decompresses itself to the address where it is going to run: the load
//! address rounded up to its alignment, but never below `pref_address`. From there on it
//! owns `init_size` bytes. So loading it lower gains nothing, and it is loaded at
//! `pref_address`, or at the first aligned address from 1 MiB on if that is higher.

use cofferdam_firmware::layout::{COMMAND_LINE_MAX, GAP_START, HIGH_MEMORY};
use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, boot_params, setup_header};
use vm_memory::ByteValued;

use super::Protocol;
use super::error::{BzImageError, KernelError};
use super::file::ImageFile;
use super::kernel::{EntryPoint, KernelImage, Segment};
use super::zero_page::{BOOT_FLAG, HEADER_MAGIC, TYPE_OF_LOADER};

const SECTOR: u64 = 512;
/// The setup header in the file and in `boot_params`: where it begins, the byte with its
/// length, from where that length counts, and the most that can be copied.
const HEADER_START: usize = 0x1f1;
const HEADER_LENGTH: usize = 0x201;
const HEADER_LENGTH_BASE: usize = 0x202;
const HEADER_MAX_END: usize = 0x290;
/// Where the header of protocol 2.12 ends (after `handover_offset`).
const HEADER_END_2_12: usize = 0x268;
/// The first version with `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
/// The 64-bit entry, from the load address.
const ENTRY_64: u64 = 0x200;
/// The number of setup sectors that 0 stands for.
const DEFAULT_SETUP_SECTORS: u8 = 4;

/// Reads the setup header of a bzImage.
pub(super) fn parse(file: &ImageFile, protocol: Protocol) -> Result<KernelImage, KernelError> {
    let mut zero_page = read_header(file)?;
    let header = zero_page.hdr;
    if protocol == Protocol::Pvh {
        return Err(KernelError::NoPvhEntry);
    }
    let segment = Segment { address: load_address(&header)?, ..code(file, &header)? };
    zero_page.hdr.type_of_loader = TYPE_OF_LOADER;
    Ok(KernelImage {
        segments: vec![segment],
        entry: EntryPoint::Linux64 { address: segment.address.saturating_add(ENTRY_64), zero_page },
        initrd_limit: u64::from(header.initrd_addr_max).saturating_add(1),
        command_line_max: u64::from(header.cmdline_size).min(COMMAND_LINE_MAX as u64),
    })
}

/// A `boot_params` that holds the setup header of the file, as long as that is, and nothing else.
fn read_header(file: &ImageFile) -> Result<Box<boot_params>, KernelError> {
    let mut start = [0; HEADER_MAX_END];
    let present = file.length().min(HEADER_MAX_END as u64) as usize;
    file.read_at(start.get_mut(..present).unwrap_or_default(), 0)?;

    let header_end = (HEADER_LENGTH_BASE + usize::from(start[HEADER_LENGTH])).min(HEADER_MAX_END);
    let mut zero_page = Box::<boot_params>::default();
    let header = start.get(HEADER_START..header_end).unwrap_or_default();
    for (target, byte) in zero_page.as_mut_slice().iter_mut().skip(HEADER_START).zip(header) {
        *target = *byte;
    }

    let setup_header { boot_flag, header, version, loadflags, xloadflags, .. } = zero_page.hdr;
    if boot_flag != BOOT_FLAG || header != HEADER_MAGIC {
        return Err(KernelError::NotAKernel);
    }
    check_within("setup header", header_end as u64, file.length())?;
    if version < VERSION_2_12 {
        return Err(BzImageError::Version(version).into());
    }
    if header_end < HEADER_END_2_12 {
        return Err(BzImageError::HeaderTooShort(header_end).into());
    }
    if loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::NotLoadedHigh.into());
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::No64BitEntry.into());
    }
    Ok(zero_page)
}

/// The protected-mode code, with no address yet. All that follows the setup code is
/// copied, as the size in the header leaves out what signing tools append or round.
fn code(file: &ImageFile, header: &setup_header) -> Result<Segment, BzImageError> {
    let setup_header { setup_sects, syssize, payload_offset, payload_length, init_size, .. } = *header;
    let sectors = if setup_sects == 0 { DEFAULT_SETUP_SECTORS } else { setup_sects };
    let start = u64::from(sectors).saturating_add(1).saturating_mul(SECTOR);
    let length = file.length();
    let parts = [
        ("64-bit entry", ENTRY_64 + 1),
        ("code", u64::from(syssize).saturating_mul(16)),
        ("compressed kernel", u64::from(payload_offset).saturating_add(u64::from(payload_length))),
    ];
    for (part, end) in parts {
        check_within(part, start.saturating_add(end), length)?;
    }
    let file_size = length.saturating_sub(start);
    Ok(Segment {
        file_offset: start,
        file_size,
        address: 0,
        memory_size: u64::from(init_size).max(file_size),
    })
}

/// Checks that a part that ends at byte `end` is in a file of `length` bytes.
fn check_within(part: &'static str, end: u64, length: u64) -> Result<(), BzImageError> {
    if end > length {
        return Err(BzImageError::Truncated { part, end, length });
    }
    Ok(())
}

fn load_address(header: &setup_header) -> Result<u64, BzImageError> {
    let setup_header { pref_address, relocatable_kernel, kernel_alignment, .. } = *header;
    let address = if relocatable_kernel == 0 {
        Some(pref_address)
    } else if kernel_alignment.is_power_of_two() {
        pref_address.max(HIGH_MEMORY).checked_next_multiple_of(u64::from(kernel_alignment))
    } else {
        return Err(BzImageError::Alignment(kernel_alignment));
    };
    match address {
        Some(address) if (HIGH_MEMORY..GAP_START).contains(&address) => Ok(address),
        _ => Err(BzImageError::Place(pref_address)),
    }
}
