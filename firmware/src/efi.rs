//! The EFI tables by which a kernel learns which memory it has to accept itself (UEFI 2.10, 4.3, 4.6, 7.2.3).
//!
//! There is no EFI firmware. Linux takes the table of [`crate::acceptance`] from an EFI configuration table only, and is content with
//! a system table without services. The memory map has one entry, for these tables. RAM is in the e820
//! map alone: with RAM in this one, the decompressor of a bzImage would choose a random place in memory that is not
//! accepted, and accept it page by page.
//!
//! | offset | what |
//! |---|---|
//! | 0x000 | system table |
//! | 0x080 | name of the vendor, UTF-16 |
//! | 0x0C0 | configuration table: one entry |
//! | 0x100 | memory map: one descriptor |

use crate::bytes::Bytes;
use crate::fields::Place;
use crate::layout::{EFI_TABLES, LOW_MEMORY_END, PAGE_SIZE, UNACCEPTED_TABLE};

/// Size of the tables, bytes.
pub const SIZE: usize = MEMORY_MAP + DESCRIPTOR_SIZE;

const VENDOR: usize = 0x80;
const CONFIGURATION: usize = 0xC0;
const MEMORY_MAP: usize = 0x100;
const DESCRIPTOR_SIZE: usize = 48;
const DESCRIPTOR_VERSION: u32 = 1;

const SYSTEM_TABLE_SIGNATURE: u64 = u64::from_le_bytes(*b"IBI SYST");
/// UEFI 2.7.
const REVISION: u32 = 2 << 16 | 70;
const SYSTEM_TABLE_SIZE: u32 = 120;
/// LINUX_EFI_UNACCEPTED_MEM_TABLE_GUID, d5d1de3c-105c-44f9-9ea9-bcef98120031.
const UNACCEPTED_GUID: [u8; 16] =
    [0x3c, 0xde, 0xd1, 0xd5, 0x5c, 0x10, 0xf9, 0x44, 0x9e, 0xa9, 0xbc, 0xef, 0x98, 0x12, 0x00, 0x31];
/// EfiReservedMemoryType.
const RESERVED: u64 = 0;
/// EFI_MEMORY_WB.
const WRITE_BACK: u64 = 8;
/// End of the memory that the map describes: it is reserved in the e820 map too.
const DESCRIBED_END: u64 = 0xA_0000;

/// `efi_info` of `boot_params` (Linux: arch/x86/include/uapi/asm/bootparam.h), for offset 0x1c0 there.
pub(crate) const INFO: [u32; 8] = [
    u32::from_le_bytes(*b"EL64"),
    EFI_TABLES as u32,
    DESCRIPTOR_SIZE as u32,
    DESCRIPTOR_VERSION,
    EFI_TABLES as u32 + MEMORY_MAP as u32,
    DESCRIPTOR_SIZE as u32,
    0, // the upper halves of the two addresses
    0,
];

/// The tables.
static TABLES: [u8; SIZE] = Bytes::new()
    .u64(SYSTEM_TABLE_SIGNATURE)
    .u32(REVISION)
    .u32(SYSTEM_TABLE_SIZE)
    .zeros_to(24) // a checksum, which Linux does not look at
    .u64(EFI_TABLES + VENDOR as u64)
    .zeros_to(104) // no console, no services
    .u64(1)
    .u64(EFI_TABLES + CONFIGURATION as u64)
    .zeros_to(VENDOR)
    .slice(b"C\0o\0f\0f\0e\0r\0d\0a\0m\0")
    .zeros_to(CONFIGURATION)
    .slice(&UNACCEPTED_GUID)
    .u64(UNACCEPTED_TABLE)
    .zeros_to(MEMORY_MAP)
    .u64(RESERVED)
    .u64(LOW_MEMORY_END)
    .u64(0) // virtual address
    .u64((DESCRIBED_END - LOW_MEMORY_END) / PAGE_SIZE)
    .u64(WRITE_BACK)
    .zeros_to(SIZE)
    .array();

/// Writes the tables for [`EFI_TABLES`].
pub(crate) fn build(place: &mut [u8]) {
    Place(place).put(&TABLES);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..][..8].try_into().unwrap())
    }

    /// The offsets are those of `efi_system_table_64_t`, `efi_config_table_64_t` and `efi_memory_desc_t`.
    #[test]
    fn the_tables_lead_to_the_unaccepted_memory() {
        let mut tables = [0xEE; SIZE];
        build(&mut tables);
        assert_eq!(u64_at(&tables, 0), 0x5453_5953_2049_4249);
        assert_eq!(u64_at(&tables, 8), 120 << 32 | 0x2_0046);
        assert_eq!(u64_at(&tables, 24), 0x9_4080, "vendor");
        assert_eq!((u64_at(&tables, 88), u64_at(&tables, 96)), (0, 0), "runtime and boot services");
        assert_eq!((u64_at(&tables, 104), u64_at(&tables, 112)), (1, 0x9_40C0));
        assert_eq!(tables[0x80..0x94], *b"C\0o\0f\0f\0e\0r\0d\0a\0m\0\0\0");
        assert_eq!(
            (u64_at(&tables, 0xC0), u64_at(&tables, 0xC8)),
            (0x44f9_105c_d5d1_de3c, 0x3100_1298_efbc_a99e)
        );
        assert_eq!(u64_at(&tables, 0xD0), 0x9_5000);
        let descriptor: Vec<u64> = (0x100..SIZE).step_by(8).map(|offset| u64_at(&tables, offset)).collect();
        assert_eq!(descriptor, [0, 0x9_0000, 0, 16, 8, 0], "reserved, no RAM, no runtime services");
    }

    #[test]
    fn efi_info_is_that_of_a_64_bit_loader() {
        assert_eq!(INFO, [u32::from_le_bytes(*b"EL64"), 0x9_4000, 48, 1, 0x9_4100, 48, 0, 0]);
    }
}
