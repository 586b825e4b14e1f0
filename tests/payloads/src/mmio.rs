//! Accesses to the space of devices: any width, any offset, at devices and
//! beside them.
#![allow(unsafe_code)] // accesses by guest-physical address

use core::arch::asm;
use core::ops::Range;

use cofferdam_firmware::layout::{GAP_START, IO_APIC, IO_APIC_SIZE, VIRTIO_MMIO};

use crate::snp;

/// Devices and nothing else: above the RAM of every payload, below the local APIC.
const SPACE: Range<u64> = VIRTIO_MMIO..IO_APIC + IO_APIC_SIZE;
const _: () = assert!(SPACE.start >= GAP_START);

fn checked(address: u64, length: u64) -> u64 {
    assert!(SPACE.contains(&address) && address + length <= SPACE.end, "no device at {address:#x}");
    address
}

macro_rules! accessors {
    ($read:ident, $write:ident, $kind:ty, $register:tt) => {
        /// Reads at `address`, which need not be aligned.
        pub fn $read(address: u64) -> $kind {
            let address = checked(address, size_of::<$kind>() as u64);
            if snp::is_active() {
                return snp::mmio_read(address, size_of::<$kind>() as u64) as $kind;
            }
            let value;
            // SAFETY: no Rust object lies in the space of devices. Assembly, as the address may be odd.
            unsafe {
                asm!(concat!("mov ", $register, ", [{}]"), in(reg) address, out($register) value,
                    options(nostack, preserves_flags));
            }
            value
        }

        /// Writes at `address`, which need not be aligned.
        pub fn $write(address: u64, value: $kind) {
            let address = checked(address, size_of::<$kind>() as u64);
            if snp::is_active() {
                return snp::mmio_write(address, size_of::<$kind>() as u64, value.into());
            }
            // SAFETY: as above.
            unsafe {
                asm!(concat!("mov [{}], ", $register), in(reg) address, in($register) value,
                    options(nostack, preserves_flags));
            }
        }
    };
}

accessors!(read_u8, write_u8, u8, "al");
accessors!(read_u16, write_u16, u16, "ax");
accessors!(read_u32, write_u32, u32, "eax");
accessors!(read_u64, write_u64, u64, "rax");

/// Reads `width` (1, 2, 4 or 8) bytes at `address`.
pub fn read(address: u64, width: u64) -> u64 {
    match width {
        1 => read_u8(address).into(),
        2 => read_u16(address).into(),
        4 => read_u32(address).into(),
        _ => read_u64(address),
    }
}

/// Writes the lowest `width` (1, 2, 4 or 8) bytes of `value` at `address`.
pub fn write(address: u64, width: u64, value: u64) {
    match width {
        1 => write_u8(address, value as u8),
        2 => write_u16(address, value as u16),
        4 => write_u32(address, value as u32),
        _ => write_u64(address, value),
    }
}
