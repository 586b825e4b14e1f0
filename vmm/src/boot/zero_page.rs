//! `boot_params`, the "zero page" of the Linux/x86 boot protocol: the kernel's setup
//! header, and beside it what the loader has to say.

use std::ops::Range;

use cofferdam_firmware::{e820, layout};
use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params};

/// `boot_flag`.
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
pub(super) const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// `type_of_loader`: none that has a number.
pub(super) const TYPE_OF_LOADER: u8 = 0xff;

/// Protocol 2.15, for kernels that come without a header.
const VERSION_2_15: u16 = 0x20f;
/// The alignment that x86-64 Linux needs at least.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// A zero page with the header that a bzImage would have brought, for an ELF kernel.
pub(super) fn for_elf() -> Box<boot_params> {
    let mut params = Box::<boot_params>::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = VERSION_2_15;
    params.hdr.type_of_loader = TYPE_OF_LOADER;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmdline_size = (layout::COMMAND_LINE_MAX - 1) as u32;
    params
}

/// `template`, completed for a domain with `memory` bytes of RAM and the initrd at `initrd`.
pub(super) fn complete(template: &boot_params, memory: u64, initrd: Option<Range<u64>>) -> Box<boot_params> {
    let mut params = Box::new(*template);
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    // Both below 3 GiB, so the high halves (`ext_ramdisk_*`) stay zero.
    let initrd = initrd.unwrap_or(0..0);
    params.hdr.ramdisk_image = initrd.start as u32;
    params.hdr.ramdisk_size = initrd.end.saturating_sub(initrd.start) as u32;
    params.acpi_rsdp_addr = layout::ACPI_TABLES;

    let map: Vec<_> = e820::map(memory).collect();
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.address, size: entry.size, r#type: entry.kind };
    }
    params.e820_table = table;
    params
}

#[cfg(test)]
mod tests {
    use cofferdam_firmware::layout::{GIB, MIB};
    use vm_memory::ByteValued;

    use super::*;

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..][..8].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..][..4].try_into().unwrap())
    }

    /// The offsets are those of boot.rst and zero-page.rst.
    #[test]
    fn every_field_has_its_offset() {
        let params = complete(&for_elf(), 4 * GIB, Some(0x0700_0000..0x0712_3456));
        let bytes = params.as_slice();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(u64_at(bytes, 0x070), layout::ACPI_TABLES);
        assert_eq!(bytes[0x1e8], 6, "e820_entries");
        assert_eq!(bytes[0x1ef], 0, "sentinel");
        assert_eq!(bytes[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(&bytes[0x202..0x206], b"HdrS");
        assert_eq!(bytes[0x206..0x208], [0x0f, 0x02], "version");
        assert_eq!(bytes[0x210], 0xff, "type_of_loader");
        assert_eq!(bytes[0x211], 1, "loadflags");
        assert_eq!(u32_at(bytes, 0x218), 0x0700_0000, "ramdisk_image");
        assert_eq!(u32_at(bytes, 0x21c), 0x0012_3456, "ramdisk_size");
        assert_eq!(u32_at(bytes, 0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!(u32_at(bytes, 0x230), 0x20_0000, "kernel_alignment");
        assert_eq!(u32_at(bytes, 0x238), 2047, "cmdline_size");
        let e820 = [
            (0, 0x9_0000, 1),
            (0x9_0000, 0x5_0000, 2),
            (0xE_0000, 0x1_F000, 3),
            (0xF_F000, 0x1000, 2),
            (MIB, 3 * GIB - MIB, 1),
            (4 * GIB, GIB, 1),
            (0, 0, 0),
        ];
        for (index, (address, size, kind)) in e820.into_iter().enumerate() {
            let entry = &bytes[0x2d0 + 20 * index..];
            assert_eq!((u64_at(entry, 0), u64_at(entry, 8), u32_at(entry, 16)), (address, size, kind));
        }
    }

    #[test]
    fn without_initrd_its_fields_are_zero() {
        let params = complete(&for_elf(), 64 * MIB, None);
        assert_eq!(params.as_slice()[0x218..0x220], [0; 8]);
    }
}
