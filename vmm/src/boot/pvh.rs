//! What a kernel entered by PVH is handed: `hvm_start_info` (Xen's
//! public/arch-x86/hvm/start_info.h, version 1), and in the same page the list of modules
//! (the initrd) and the memory map that it points to.

use std::ops::Range;

use cofferdam_firmware::e820;
use cofferdam_firmware::layout::{self, PVH_START_INFO};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

/// The first version with a memory map.
const VERSION: u32 = 1;
/// Where the module list begins, from the start info.
const MODULES: u64 = 0x40;
/// Where the memory map begins, from the start info.
const MEMORY_MAP: u64 = 0x80;

const _: () = {
    assert!(size_of::<hvm_start_info>() as u64 <= MODULES);
    assert!(MODULES + size_of::<hvm_modlist_entry>() as u64 <= MEMORY_MAP);
};

/// The bytes for [`PVH_START_INFO`], for a domain with `memory` bytes of RAM and the
/// initrd at `initrd`.
pub(super) fn start_info(memory: u64, initrd: Option<Range<u64>>) -> Vec<u8> {
    let map: Vec<_> = e820::map(memory).collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { PVH_START_INFO + MODULES } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI_TABLES,
        memmap_paddr: PVH_START_INFO + MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let mut bytes = info.as_slice().to_vec();
    if let Some(initrd) = initrd {
        bytes.resize(MODULES as usize, 0);
        let size = initrd.end.saturating_sub(initrd.start);
        let module = hvm_modlist_entry { paddr: initrd.start, size, ..hvm_modlist_entry::default() };
        bytes.extend(module.as_slice());
    }
    bytes.resize(MEMORY_MAP as usize, 0);
    for entry in map {
        let entry =
            hvm_memmap_table_entry { addr: entry.address, size: entry.size, type_: entry.kind, reserved: 0 };
        bytes.extend(entry.as_slice());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use cofferdam_firmware::layout::{BOOT_PARAMS, GIB, MIB};

    use super::*;

    fn words(bytes: &[u8]) -> Vec<u64> {
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    #[test]
    fn start_info_module_and_map_as_the_header_file_has_them() {
        let bytes = start_info(4 * GIB, Some(0x0700_0000..0x0712_3456));
        assert!(PVH_START_INFO + bytes.len() as u64 <= BOOT_PARAMS);
        // magic and version, flags and module count, module list, command line, RSDP, map, entries
        assert_eq!(
            words(&bytes[..0x38]),
            [0x1_336e_c578, 0x1_0000_0000, 0x6040, 0x2_0000, 0xe_0000, 0x6080, 6]
        );
        assert_eq!(words(&bytes[0x40..0x60]), [0x0700_0000, 0x12_3456, 0, 0]);
        assert_eq!(
            words(&bytes[0x80..]),
            [
                0,
                0x9_0000,
                1,
                0x9_0000,
                0x5_0000,
                2,
                0xE_0000,
                0x1_F000,
                3,
                0xF_F000,
                0x1000,
                2,
                MIB,
                3 * GIB - MIB,
                1,
                4 * GIB,
                GIB,
                1
            ]
        );
    }

    #[test]
    fn without_initrd_there_is_no_module() {
        let bytes = start_info(64 * MIB, None);
        assert_eq!(words(&bytes[..0x38])[1..3], [0, 0]);
        assert_eq!(bytes[0x40..0x60], [0; 32]);
    }
}
