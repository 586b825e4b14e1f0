//! FADT (ACPI 6.4, 5.2.9): the hardware-reduced fixed hardware. There is no
//! power-management timer, no event block and no SCI; what is left is the reset
//! register, the two sleep registers, and what the guest need not look for.

use super::table::{OEM_TABLE_ID, header};
use crate::bytes::Bytes;
use crate::layout;

const REVISION: u8 = 6;
const MINOR_REVISION: u8 = 4;

/// Offset of the 32-bit address of the DSDT.
pub(super) const DSDT: usize = 40;
/// Offset of the 64-bit address of the DSDT.
pub(super) const X_DSDT: usize = 140;

// "IA-PC Boot Architecture Flags". Bit 1 ("8042") is clear although the i8042
// stub knows the reset command: with it set, Linux would look for a keyboard.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

// "Fixed Feature Flags".
const WBINVD: u32 = 1 << 0;
const PROC_C1: u32 = 1 << 2;
/// The power button, if any, is a device in the DSDT.
const PWR_BUTTON: u32 = 1 << 4;
/// The sleep button, if any, is a device in the DSDT.
const SLP_BUTTON: u32 = 1 << 5;
const RESET_REG_SUP: u32 = 1 << 10;
const HEADLESS: u32 = 1 << 12;
const HW_REDUCED_ACPI: u32 = 1 << 20;

/// An 8-bit register in I/O space, as a generic address structure (5.2.3.2).
const fn port(port: u16) -> Bytes {
    const SYSTEM_IO: u8 = 1;
    const BYTE_ACCESS: u8 = 1;
    Bytes::new().u8(SYSTEM_IO).u8(8).u8(0).u8(BYTE_ACCESS).u64(port as u64)
}

const TABLE: Bytes = header(b"FACP", REVISION)
    .zeros_to(109)
    .u16(VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT)
    .zeros_to(112)
    .u32(WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HEADLESS | HW_REDUCED_ACPI)
    .then(port(layout::RESET_PORT))
    .u8(layout::RESET_VALUE)
    .zeros_to(131)
    .u8(MINOR_REVISION)
    .zeros_to(244)
    .then(port(layout::SLEEP_CONTROL_PORT))
    .then(port(layout::SLEEP_STATUS_PORT))
    .slice(&OEM_TABLE_ID); // hypervisor vendor identity

/// The table without length, checksum and addresses.
pub(super) static FADT: [u8; 276] = TABLE.array();
