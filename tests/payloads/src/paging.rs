//! All RAM that [`ram`] does not cover, also beyond the 4 GiB that the entry code maps.
#![allow(unsafe_code)] // the page tables, and accesses by guest-physical address

use cofferdam_firmware::layout::{GAP_END, GAP_START, GIB, MIB};

use crate::ram;

unsafe extern "C" {
    static directory_pointers: u8;
}

/// Page-table entry: present, writable; and one of 2 MiB.
const TABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x83;
/// Entries of a table.
const ENTRIES: u64 = 512;

/// Maps the GiB that begins at `start` (from 4 GiB on, below 512 GiB) onto itself, by a directory at `table`, a free
/// page of [`ram`].
pub fn map_gib(start: u64, table: u64) {
    assert!(start.is_multiple_of(GIB) && (4 * GIB..ENTRIES * GIB).contains(&start), "no GiB at {start:#x}");
    for index in 0..ENTRIES {
        ram::write_u64(table + 8 * index, (start + index * 2 * MIB) | LARGE_PAGE);
    }
    let entry = (&raw const directory_pointers).addr() as u64 + start / GIB * 8;
    // SAFETY: the table has 512 entries, and this one was empty: nothing has used the addresses that it maps.
    unsafe { (entry as *mut u64).write_volatile(table | TABLE) };
}

/// Checks that eight bytes at `address` lie in RAM above [`ram::END`], where nothing of this program is.
fn checked(address: u64) -> *mut u64 {
    let in_gap = (GAP_START..GAP_END).contains(&address);
    assert!(address >= ram::END && !in_gap && address.is_multiple_of(8), "no RAM of ours at {address:#x}");
    address as *mut u64
}

/// Writes eight bytes above [`ram::END`].
pub fn write(address: u64, value: u64) {
    // SAFETY: no Rust object lies there; where nothing is mapped, the guest ends.
    unsafe { checked(address).write_volatile(value) }
}

/// Reads eight bytes above [`ram::END`].
pub fn read(address: u64) -> u64 {
    // SAFETY: as in `write`.
    unsafe { checked(address).read_volatile() }
}
