//! The ACPI tables of a domain: ACPI 6.4, hardware-reduced. They tell a stock
//! kernel everything it cannot find by itself, so that no device needs a hint
//! on the command line.
//!
//! ```text
//! RSDP ── XSDT ─┬─ FADT ── DSDT    registers for reset and power-off; devices
//!               └─ MADT            vCPUs and I/O APIC
//! ```
//!
//! All addresses, ports and pins are those of [`layout`]. The tables are
//! constants put together by the compiler (`bytes`); at run time they are
//! copied, filled in where the [`Config`] decides, and given their checksums,
//! which keeps the code small enough to be measured with the first stage.

mod aml;
mod dsdt;
mod fadt;
mod madt;
mod table;
#[cfg(test)]
mod tests;

use core::fmt;

use crate::bytes::Bytes;
use crate::layout;
use table::{HEADER_SIZE, OEM_ID, Tables, header};

/// Size of the largest tables, bytes: what a buffer needs for any [`Config`].
pub const MAX_SIZE: usize = 5668;
const _: () = assert!(MAX_SIZE as u64 <= layout::ACPI_TABLES_SIZE);

/// What differs from one domain to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of vCPUs, 1 to [`layout::MAX_VCPUS`]. The identifier of each local APIC is the vCPU's index.
    pub vcpus: u8,
    /// How many virtio-mmio slots have a device, 0 to [`layout::VIRTIO_MMIO_SLOTS`]; they are the first ones.
    pub virtio_mmio_slots: u8,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// Why no tables were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiError {
    /// [`Config::vcpus`] is out of range.
    Vcpus {
        /// The value given.
        given: u8,
    },
    /// [`Config::virtio_mmio_slots`] is out of range.
    VirtioMmioSlots {
        /// The value given.
        given: u8,
    },
    /// The address is not a multiple of 16, or the tables would not end below 4 GiB.
    Base {
        /// The address given.
        base: u64,
    },
    /// The buffer is too small.
    BufferTooSmall {
        /// Size of the tables, bytes.
        needed: usize,
        /// Size of the buffer, bytes.
        given: usize,
    },
}

// By hand, so that the measured first stage links no other crate for it.
impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus { given } => {
                write!(f, "ACPI tables describe 1 to {} vCPUs, not {given}", layout::MAX_VCPUS)
            }
            Self::VirtioMmioSlots { given } => write!(
                f,
                "ACPI tables describe at most {} virtio-mmio slots, not {given}",
                layout::VIRTIO_MMIO_SLOTS
            ),
            Self::Base { base } => {
                write!(f, "ACPI tables cannot be at {base:#x}: not a multiple of 16, or too close to 4 GiB")
            }
            Self::BufferTooSmall { needed, given } => {
                write!(f, "the ACPI tables take {needed} bytes, their buffer has {given}")
            }
        }
    }
}

impl core::error::Error for AcpiError {}

/// Offset of the XSDT's address in the RSDP.
const RSDP_XSDT: usize = 24;
/// RSDP (ACPI 6.4, 5.2.5.3), revision 2, without a 32-bit RSDT.
static RSDP: [u8; 36] =
    Bytes::new().slice(b"RSD PTR ").u8(0).slice(&OEM_ID).u8(2).u32(0).u32(36).zeros_to(36).array();
static XSDT: [u8; HEADER_SIZE] = header(b"XSDT", 1).array();

/// Writes the tables of a domain to the start of `out`, which the guest sees at
/// the guest-physical address `base`: the RSDP first, at `base` itself, then the
/// tables it leads to. Returns the number of bytes, at most
/// [`MAX_SIZE`]; what follows in `out` is left alone.
///
/// # Errors
/// See [`AcpiError`]. If the buffer is too small, its content is unspecified.
pub fn build(config: &Config, base: u64, out: &mut [u8]) -> Result<usize, AcpiError> {
    if !(1..=layout::MAX_VCPUS).contains(&config.vcpus) {
        return Err(AcpiError::Vcpus { given: config.vcpus });
    }
    if config.virtio_mmio_slots > layout::VIRTIO_MMIO_SLOTS {
        return Err(AcpiError::VirtioMmioSlots { given: config.virtio_mmio_slots });
    }
    if !base.is_multiple_of(16) || base > 4 * layout::GIB - layout::ACPI_TABLES_SIZE {
        return Err(AcpiError::Base { base });
    }
    let given = out.len();
    let mut tables = Tables::new(out, base);
    let rsdp = tables.begin(&RSDP);

    let dsdt = dsdt::write(&mut tables, config);
    let fadt = write_fadt(&mut tables, dsdt);
    let madt = madt::write(&mut tables, config.vcpus);
    let xsdt = write_xsdt(&mut tables, &[fadt, madt]);

    tables.patch(rsdp + RSDP_XSDT, &xsdt.to_le_bytes());
    tables.seal(rsdp, 20, 8); // the part of ACPI 1.0
    tables.seal(rsdp, RSDP.len(), 32);

    let needed = tables.len();
    if needed > given {
        return Err(AcpiError::BufferTooSmall { needed, given });
    }
    Ok(needed)
}

/// Writes the FADT, with both addresses of the DSDT, and returns its address.
fn write_fadt(tables: &mut Tables<'_>, dsdt: u64) -> u64 {
    let start = tables.begin(&fadt::FADT);
    tables.patch(start + fadt::DSDT, &(dsdt as u32).to_le_bytes());
    tables.patch(start + fadt::X_DSDT, &dsdt.to_le_bytes());
    tables.finish(start)
}

/// Writes the XSDT (5.2.8) and returns its address.
fn write_xsdt(tables: &mut Tables<'_>, entries: &[u64]) -> u64 {
    let start = tables.begin(&XSDT);
    for entry in entries {
        tables.put(&entry.to_le_bytes());
    }
    tables.finish(start)
}
