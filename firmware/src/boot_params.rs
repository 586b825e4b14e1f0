//! `boot_params`, the "zero page" of the Linux/x86 boot protocol (Linux:
//! Documentation/arch/x86/boot.rst and zero-page.rst): the kernel's own setup header,
//! and beside it what the loader has to say.

use core::ops::Range;

use crate::{e820, efi, layout};

/// Size of `boot_params`, bytes.
pub const SIZE: usize = layout::PAGE_SIZE as usize;

/// The setup header in `boot_params` and in a bzImage: where it begins, the byte from which its length counts, that
/// byte's own offset, and the most that can be copied.
pub(crate) const HEADER_START: usize = 0x1f1;
pub(crate) const HEADER_LENGTH: usize = 0x201;
pub(crate) const HEADER_LENGTH_BASE: usize = 0x202;
pub(crate) const HEADER_MAX_END: usize = 0x290;
/// `boot_flag`.
pub(crate) const BOOT_FLAG: u16 = 0xaa55;
/// `header`.
pub(crate) const HEADER_MAGIC: [u8; 4] = *b"HdrS";
/// `loadflags`: the code is loaded at 1 MiB or above.
pub(crate) const LOADED_HIGH: u8 = 1;

/// `type_of_loader`: none that has a number.
const TYPE_OF_LOADER: u8 = 0xff;
/// Protocol 2.15, for kernels that come without a header.
const VERSION_2_15: u16 = 0x20f;
/// The alignment that x86-64 Linux needs at least.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;
/// Size of an entry of the e820 map.
const E820_ENTRY: usize = 20;

/// Writes `value` at `offset`, if there is room.
fn put<const N: usize>(page: &mut [u8], offset: usize, value: [u8; N]) {
    if let Some(place) = page.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value;
    }
}

/// Begins with the setup header of a bzImage. So far, `page` is the beginning of its file, in which the header lies where
/// it does in `boot_params`.
pub(crate) fn begin_from_header(page: &mut [u8]) {
    let length = page.get(HEADER_LENGTH).copied().unwrap_or(0);
    let end = (HEADER_LENGTH_BASE + usize::from(length)).min(HEADER_MAX_END);
    for (offset, byte) in page.iter_mut().enumerate() {
        if !(HEADER_START..end).contains(&offset) {
            *byte = 0;
        }
    }
}

/// Begins with the header that a bzImage would have brought, for an ELF kernel.
pub(crate) fn begin_for_elf(page: &mut [u8]) {
    page.fill(0);
    put(page, 0x1fe, BOOT_FLAG.to_le_bytes());
    put(page, 0x202, HEADER_MAGIC);
    put(page, 0x206, VERSION_2_15.to_le_bytes());
    put(page, 0x211, [LOADED_HIGH]);
    put(page, 0x230, KERNEL_ALIGNMENT.to_le_bytes());
    put(page, 0x238, (layout::COMMAND_LINE_MAX as u32 - 1).to_le_bytes());
}

/// Adds what the loader says, for a domain with `memory` bytes of RAM: `initrd` lies below 4 GiB, and is empty if there
/// is none; `setup_data` is the address of the first node, or 0; `efi` says whether there are the tables of [`efi`].
pub(crate) fn complete(page: &mut [u8], memory: u64, initrd: Range<u64>, setup_data: u64, efi: bool) {
    put(page, 0x070, layout::ACPI_TABLES.to_le_bytes());
    if efi {
        let info = efi::INFO.map(u32::to_le_bytes);
        (0x1c0..).step_by(4).zip(info).for_each(|(offset, word)| put(page, offset, word));
    }
    put(page, 0x210, [TYPE_OF_LOADER]);
    put(page, 0x218, (initrd.start as u32).to_le_bytes());
    put(page, 0x21c, (initrd.end.wrapping_sub(initrd.start) as u32).to_le_bytes());
    put(page, 0x228, (layout::COMMAND_LINE as u32).to_le_bytes());
    put(page, 0x250, setup_data.to_le_bytes());
    let mut entries = 0;
    for (range, offset) in e820::map(memory).zip((0x2d0..).step_by(E820_ENTRY)) {
        put(page, offset, range.address.to_le_bytes());
        put(page, offset + 8, range.size.to_le_bytes());
        put(page, offset + 16, range.kind.to_le_bytes());
        entries += 1;
    }
    put(page, 0x1e8, [entries]);
}
