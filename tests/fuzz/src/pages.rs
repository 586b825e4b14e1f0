//! Changes of the two pages that tell the first stage what it may start and where.

use arbitrary::Arbitrary;
use cofferdam_firmware::layout::MIB;

use crate::kernel::patch;

/// A change of the parameter page.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum ParameterPatch {
    /// Whole MiB of memory, or less than that more.
    Memory(u32, Option<u32>),
    /// Any amount of memory.
    AnyMemory(u64),
    /// Number of vCPUs.
    Vcpus(u32),
    /// Number of devices.
    Slots(u32),
    /// Flags.
    Flags(u8),
    /// A byte of the host data, or all of it.
    HostData(Option<u8>, u8),
    /// Any byte.
    Byte(u8, u8),
}

impl ParameterPatch {
    /// Changes `page`, of which the parameters are the beginning.
    pub fn apply(self, page: &mut [u8]) {
        match self {
            Self::Memory(mib, more) => {
                let memory = u64::from(mib) * MIB + u64::from(more.unwrap_or(0) % MIB as u32);
                patch(page, 0x10, &memory.to_le_bytes());
            }
            Self::AnyMemory(memory) => patch(page, 0x10, &memory.to_le_bytes()),
            Self::Vcpus(vcpus) => patch(page, 0x18, &vcpus.to_le_bytes()),
            Self::Slots(slots) => patch(page, 0x1C, &slots.to_le_bytes()),
            Self::Flags(flags) => patch(page, 0xC, &[flags]),
            Self::HostData(None, byte) => patch(page, 0x20, &[byte; 32]),
            Self::HostData(Some(index), byte) => patch(page, 0x20 + usize::from(index % 32), &[byte]),
            Self::Byte(offset, byte) => patch(page, usize::from(offset % 64), &[byte]),
        }
    }
}

/// A change of the launch manifest.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum ManifestPatch {
    /// A field of one of the three items: which item, which field.
    Item(u8, u8, u64),
    /// A page of the load window for one of the three items, and a size.
    Place(u8, u16, u32),
    /// Most vCPUs.
    Vcpus(u32),
    /// Least or most memory, whole MiB.
    Memory(bool, u32),
    /// Any 8 bytes.
    Long(u8, u64),
    /// Any byte.
    Byte(u16, u8),
}

impl ManifestPatch {
    /// Changes `page`.
    pub fn apply(self, page: &mut [u8]) {
        let item = |number: u8| 0x10 + 0x40 * usize::from(number % 3);
        match self {
            Self::Item(number, field, value) => {
                patch(page, item(number) + 8 * usize::from(field % 8), &value.to_le_bytes());
            }
            Self::Place(number, place, size) => {
                patch(page, item(number), &(0xC000_0000 + (u64::from(place) << 12)).to_le_bytes());
                patch(page, item(number) + 8, &u64::from(size).to_le_bytes());
            }
            Self::Vcpus(vcpus) => patch(page, 0xD0, &vcpus.to_le_bytes()),
            Self::Memory(most, mib) => {
                patch(page, if most { 0xE0 } else { 0xD8 }, &(u64::from(mib) * MIB).to_le_bytes());
            }
            Self::Long(offset, value) => patch(page, offset.into(), &value.to_le_bytes()),
            Self::Byte(offset, byte) => patch(page, usize::from(offset % 4096), &[byte]),
        }
    }
}
