//! MADT (ACPI 6.4, 5.2.12): the local APICs and the I/O APIC. There is no 8259,
//! so that no legacy interrupt exists that an override could move.

use super::table::{HEADER_SIZE, Tables, header};
use crate::layout;

const REVISION: u8 = 5;

// Types of the interrupt controller structures.
const PROCESSOR_LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;

const PROCESSOR_LOCAL_APIC_SIZE: u8 = 8;
const IO_APIC_SIZE: u8 = 12;
/// Local APIC flags: the processor is ready to be used.
const ENABLED: u8 = 1;

/// Header, address of the local APICs, flags (none), and the I/O APIC with the
/// identifier that its register has after a reset, and the first interrupt 0.
static START: [u8; HEADER_SIZE + 8 + IO_APIC_SIZE as usize] = header(b"APIC", REVISION)
    .u32(layout::LOCAL_APIC as u32)
    .u32(0)
    .u8(IO_APIC)
    .u8(IO_APIC_SIZE)
    .u8(0)
    .u8(0)
    .u32(layout::IO_APIC as u32)
    .u32(0)
    .array();

/// Writes the table; the local APIC of each vCPU has the vCPU's index. Returns its address.
pub(super) fn write(tables: &mut Tables<'_>, vcpus: u8) -> u64 {
    let start = tables.begin(&START);
    for index in 0..vcpus {
        let flags = [ENABLED, 0, 0, 0];
        tables.put(&[PROCESSOR_LOCAL_APIC, PROCESSOR_LOCAL_APIC_SIZE, index, index]);
        tables.put(&flags);
    }
    tables.finish(start)
}
