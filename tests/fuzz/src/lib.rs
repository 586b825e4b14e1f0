//! What the fuzz targets share: guest memory and the numbers that a hostile guest would choose.
//!
//! Every target takes its input through `arbitrary`, as a list of things that a guest does rather than as raw bytes:
//! so the fuzzer starts behind the first checks, and mutations stay meaningful. Each asserts what the property tests
//! beside the code assert, not only that nothing panics.

use arbitrary::Arbitrary;
use cofferdam_devices::virtio::Memory;
use cofferdam_devices::virtio::testing::memory;
use vm_memory::{Bytes, GuestAddress};

pub mod device;
pub mod kernel;
pub mod packet;
pub mod pages;

/// First address behind the rings; from here on guests have their data.
pub const DATA: u64 = 0x1_0000;
/// Two regions touch here.
pub const BORDER: u64 = 0x4_0000;
/// End of the second region, and start of a hole.
pub const HOLE: u64 = 0x8_0000;
/// Start of the last region.
pub const LAST: u64 = 0x10_0000;
/// End of memory.
pub const END: u64 = 0x12_0000;

/// Two regions that touch, a hole, a third.
pub fn three_regions() -> Memory {
    memory(&[(0, BORDER as usize), (BORDER, (HOLE - BORDER) as usize), (LAST, (END - LAST) as usize)])
}

/// Makes `memory` as new, from 0 to `DATA`.
pub fn clear_rings(memory: &Memory) {
    memory.write_slice(&[0; DATA as usize], GuestAddress(0)).unwrap();
}

/// An address that a guest may name.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Address {
    /// Where data usually is.
    Data(u16),
    /// The same, elsewhere.
    Last(u16),
    /// Across the border of two regions, which is allowed.
    Border(u8),
    /// Into the hole, which is not, or up to it.
    Hole(u8),
    /// Past the end of memory, or up to it.
    End(u8),
    /// Over the rings.
    Rings(u16),
    /// Anywhere.
    Any(u64),
}

impl Address {
    /// The guest-physical address.
    pub fn get(self) -> u64 {
        match self {
            Self::Data(offset) => DATA + u64::from(offset),
            Self::Last(offset) => LAST + u64::from(offset),
            Self::Border(back) => BORDER - u64::from(back),
            Self::Hole(back) => HOLE - u64::from(back),
            Self::End(back) => END - u64::from(back),
            Self::Rings(offset) => u64::from(offset),
            Self::Any(address) => address,
        }
    }
}

/// A length that a guest may name.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    /// Up to 255 bytes.
    Short(u8),
    /// Whole sectors, or blocks of descriptors.
    Sectors(u8),
    /// Up to 64 KiB.
    Long(u16),
    /// Any.
    Any(u32),
}

impl Length {
    /// The length in bytes.
    pub fn get(self) -> u32 {
        match self {
            Self::Short(length) => length.into(),
            Self::Sectors(sectors) => u32::from(sectors % 32) * 512,
            Self::Long(length) => length.into(),
            Self::Any(length) => length,
        }
    }
}
