//! Memory that a payload shares with devices: a few MiB of RAM that hold nothing
//! of the payload itself. Accesses outside panic. They happen in program order,
//! except that a read may overtake an earlier write to another address.
#![allow(unsafe_code)] // accesses by guest-physical address

use cofferdam_firmware::layout::MIB;

use crate::snp;

/// First address; the payload lies below (`link.ld`).
pub const START: u64 = 8 * MIB;
/// End; even the smallest domain has RAM here.
pub const END: u64 = 16 * MIB;

/// Checks that `length` bytes at `address` are in the area, and aligned to `length`. Returns where they are mapped.
fn checked(address: u64, length: u64) -> u64 {
    let inside = address >= START && address.checked_add(length).is_some_and(|end| end <= END);
    assert!(inside && address.is_multiple_of(length), "no {length} bytes at {address:#x}");
    snp::alias() + address
}

macro_rules! accessors {
    ($read:ident, $write:ident, $kind:ty) => {
        /// Reads what a device may write at the same time.
        pub fn $read(address: u64) -> $kind {
            let address = checked(address, size_of::<$kind>() as u64) as *const $kind;
            // SAFETY: in RAM that no Rust object lies in, and aligned.
            unsafe { address.read_volatile() }
        }

        /// Writes what a device may read at the same time.
        pub fn $write(address: u64, value: $kind) {
            let address = checked(address, size_of::<$kind>() as u64) as *mut $kind;
            // SAFETY: in RAM that no Rust object lies in, and aligned.
            unsafe { address.write_volatile(value) }
        }
    };
}

accessors!(read_u8, write_u8, u8);
accessors!(read_u16, write_u16, u16);
accessors!(read_u32, write_u32, u32);
accessors!(read_u64, write_u64, u64);

/// Sets `length` bytes at `address` to `value`.
pub fn fill(address: u64, length: u64, value: u8) {
    (address..address + length).for_each(|address| write_u8(address, value));
}
