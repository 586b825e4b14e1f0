//! The domain's memory by its guest-physical addresses, which the page tables map onto themselves.
//!
//! It belongs to the one value of the platform that there is: whoever has it for writing has the memory.

use core::arch::asm;
use core::ops::Range;
use core::slice;

use cofferdam_firmware::layout::{
    COMMAND_LINE, EFI_TABLES, GAP_START, LAUNCH_MANIFEST, PAGE_SIZE, SNP_CC_BLOB, SNP_GHCB, SNP_SECRETS,
    STAGE,
};
use cofferdam_firmware::manifest;

/// Memory that holds nothing of the first stage or of its image. Address 0 is left out, as no slice may be there.
const FREE: [Range<u64>; 4] =
    [PAGE_SIZE..STAGE, COMMAND_LINE..SNP_GHCB, SNP_CC_BLOB..SNP_SECRETS, EFI_TABLES..GAP_START];

/// Whether `length` bytes at `address` are in [`FREE`].
fn is_free(address: u64, length: u64) -> bool {
    FREE.iter().any(|range| range.contains(&address) && length <= range.end - address)
}

/// `length` bytes at `address`; none, if they are not free.
///
/// # Safety
/// No other slice of them is in use. They are private memory that was accepted.
pub unsafe fn slice<'a>(address: u64, length: u64) -> &'a mut [u8] {
    if !is_free(address, length) {
        return &mut [];
    }
    // SAFETY: mapped, and no part of this program; the caller keeps other slices away.
    unsafe { slice::from_raw_parts_mut(address as *mut u8, length as usize) }
}

/// Copies `length` bytes from `from` to `to`, by rising address, each read once; none, if those at `to` are not free.
///
/// # Safety
/// No slice of what is written is in use. It is private memory that was accepted.
pub unsafe fn copy(from: u64, to: u64, length: u64) {
    if !is_free(to, length) {
        return;
    }
    // SAFETY: writes memory that is no part of this program.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, edx",
            "rep movsb",
            inout("rsi") from => _,
            inout("rdi") to => _,
            inout("rcx") length / 8 => _,
            in("edx") (length % 8) as u32,
            options(nostack, preserves_flags)
        );
    }
}

/// The page at `address`, which is the image's.
///
/// # Safety
/// Nothing writes it.
pub unsafe fn image_page<'a>(address: u64) -> &'a [u8; manifest::SIZE] {
    // SAFETY: mapped; it is not in `FREE`, and the caller knows that nobody else writes it.
    unsafe { &*(address as *const [u8; manifest::SIZE]) }
}

/// The launch manifest.
pub fn launch_manifest<'a>() -> &'a [u8; manifest::SIZE] {
    // SAFETY: nothing of this program writes it.
    unsafe { image_page(LAUNCH_MANIFEST) }
}
