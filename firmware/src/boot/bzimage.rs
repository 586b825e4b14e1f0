//! The setup header of a bzImage (Linux: Documentation/arch/x86/boot.rst).
//!
//! The kernel decompresses itself to the address where it is going to run: the load address rounded up to its
//! alignment, but never below `pref_address`. From there on it owns `init_size` bytes. So loading it lower gains
//! nothing, and it is loaded at `pref_address`, or at the first aligned address from 1 MiB on if that is higher.

use super::{Kernel, KernelError, MAX_SEGMENTS, Segment, field, placed};
use crate::boot_params::{
    BOOT_FLAG, HEADER_LENGTH, HEADER_LENGTH_BASE, HEADER_MAGIC, HEADER_MAX_END, LOADED_HIGH,
};
use crate::layout::{COMMAND_LINE_MAX, GAP_START, HIGH_MEMORY};
use crate::manifest::KernelFormat;

const SECTOR: u64 = 512;
/// Where the header of protocol 2.12 ends (after `handover_offset`).
const HEADER_END_2_12: usize = 0x268;
/// The first version with `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u8 = 1;
/// The 64-bit entry, from the load address.
const ENTRY_64: u64 = 0x200;
/// The number of setup sectors that 0 stands for.
const DEFAULT_SETUP_SECTORS: u8 = 4;

/// Reads the header of a file of `length` bytes.
pub(super) fn read(head: &[u8], length: u64) -> Result<Kernel, KernelError> {
    // The header of every protocol since 2.12 has the same beginning, so that one look at the length is enough.
    let Some(header) = head.first_chunk::<HEADER_END_2_12>() else { return Err(KernelError::NotAKernel) };
    let u8_at = |offset| u8::from_le_bytes(field(header, offset).unwrap_or_default());
    let u16_at = |offset| u16::from_le_bytes(field(header, offset).unwrap_or_default());
    let u32_at = |offset| u32::from_le_bytes(field(header, offset).unwrap_or_default());
    if u16_at(0x1fe) != BOOT_FLAG || field(header, 0x202) != Some(HEADER_MAGIC) {
        return Err(KernelError::NotAKernel);
    }
    let version = u16_at(0x206);
    if version < VERSION_2_12 {
        return Err(KernelError::Version { given: version });
    }
    let header_end = (HEADER_LENGTH_BASE + usize::from(u8_at(HEADER_LENGTH))).min(HEADER_MAX_END);
    if header_end < HEADER_END_2_12 || header_end > head.len() {
        return Err(KernelError::Truncated { what: "setup header" });
    }
    if u8_at(0x211) & LOADED_HIGH == 0 || u8_at(0x236) & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }

    let sectors = match u8_at(0x1f1) {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    let start = (u64::from(sectors) + 1) * SECTOR;
    let code = u64::from(u32_at(0x1f4)) * 16;
    let payload = u64::from(u32_at(0x248)) + u64::from(u32_at(0x24c));
    if start + code.max(payload).max(ENTRY_64 + 1) > length {
        return Err(KernelError::Truncated { what: "code" });
    }

    let preferred = u64::from_le_bytes(field(header, 0x258).unwrap_or_default());
    let relocatable = u8_at(0x234) != 0;
    let alignment = u32_at(0x230);
    let address = if !relocatable {
        preferred
    } else if alignment.is_power_of_two() {
        // Wherever that would overflow, it is far from where a kernel can be.
        let mask = u64::from(alignment) - 1;
        (preferred.clamp(HIGH_MEMORY, GAP_START) + mask) & !mask
    } else {
        return Err(KernelError::Alignment { given: alignment });
    };
    let file_size = length - start;
    let memory_size = u64::from(u32_at(0x260)).max(file_size);
    let mut segments = [Segment::default(); MAX_SEGMENTS];
    segments[0] = placed(Segment { offset: start, file_size, address, memory_size })?;
    Ok(Kernel {
        format: KernelFormat::BzImage,
        length,
        segments,
        entry: address + ENTRY_64,
        initrd_limit: u64::from(u32_at(0x22c)) + 1,
        command_line_max: u64::from(u32_at(0x238)).min(COMMAND_LINE_MAX as u64),
    })
}
