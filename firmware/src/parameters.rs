//! The parameter page: what the monitor tells the first stage of the domain that
//! it made. Nobody measures it, so the first stage copies it once, believes
//! nothing, and compares everything with the launch manifest; the monitor makes
//! the same comparison before it starts anything.
//!
//! The fields are the first [`SIZE`] bytes of the page at
//! [`layout::PARAMETER_PAGE`]; the rest of the page is not looked at. All numbers are
//! little-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x00 | 8 | magic, "COFFERPP" |
//! | 0x08 | 4 | version, 1 |
//! | 0x0C | 4 | flags: bit 0, there is a serial port; bit 1, CPUID may be believed about the SHA instructions |
//! | 0x10 | 8 | memory, bytes: the RAM is that of [`layout::ram_ranges`] |
//! | 0x18 | 4 | vCPUs |
//! | 0x1C | 4 | virtio-mmio slots with a device, which are the first ones |
//! | 0x20 | 32 | host data: zero unless the image wants them |
//!
//! As the memory is one number, a map with holes or one that overlaps the image
//! cannot be said; a size that is no number of whole MiB is refused.

use core::fmt;

use crate::fields::{Fields, Place, is_zero};
use crate::layout::{self, MIB};
use crate::manifest::Manifest;

/// Size of the parameters, bytes.
pub const SIZE: usize = 64;
/// Their first bytes.
pub const MAGIC: [u8; 8] = *b"COFFERPP";
/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;

const FLAG_SERIAL: u32 = 1 << 0;
const FLAG_SHA: u32 = 1 << 1;

/// What the monitor says of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Memory, bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// How many virtio-mmio slots have a device.
    pub virtio_mmio_slots: u8,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Whether the SHA instructions work if CPUID has them. There are hosts whose KVM interprets the guest's code, does
    /// not know them, and shows the guest the host's own CPUID. The hash is the same either way.
    pub sha_instructions: bool,
    /// Host data.
    pub host_data: [u8; 32],
}

/// What is wrong with parameters, in themselves or for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParametersError {
    /// They do not begin with [`MAGIC`].
    Magic,
    /// Another version.
    Version {
        /// The version given.
        given: u32,
    },
    /// Flags that this version does not have.
    Flags {
        /// The flags given.
        given: u32,
    },
    /// The memory is no multiple of 1 MiB, or not between the image's bounds.
    Memory {
        /// The memory given, bytes.
        given: u64,
        /// The image's least memory, bytes.
        min: u64,
        /// The image's most memory, bytes.
        max: u64,
    },
    /// No vCPU, or more than the image allows.
    Vcpus {
        /// The number given.
        given: u32,
        /// The image's bound.
        max: u8,
    },
    /// More than [`layout::VIRTIO_MMIO_SLOTS`] devices.
    VirtioMmioSlots {
        /// The number given.
        given: u32,
    },
    /// Host data, which the image does not want.
    HostData,
}

impl fmt::Display for ParametersError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("the parameters do not begin with \"COFFERPP\""),
            Self::Version { given } => write!(f, "parameters of version {given}, not {VERSION}"),
            Self::Flags { given } => write!(f, "unknown flags {given:#x} among the parameters"),
            Self::Memory { given, min, max } if given.is_multiple_of(MIB) => write!(
                f,
                "the image takes {} to {} MiB of memory, not {} MiB",
                min / MIB,
                max / MIB,
                given / MIB
            ),
            Self::Memory { given, .. } => write!(f, "{given} bytes of memory are not whole MiB"),
            Self::Vcpus { given, max } => write!(f, "the image takes 1 to {max} vCPUs, not {given}"),
            Self::VirtioMmioSlots { given } => {
                write!(f, "{given} virtio-mmio devices, at most {} are possible", layout::VIRTIO_MMIO_SLOTS)
            }
            Self::HostData => f.write_str("the image takes no host data"),
        }
    }
}

impl core::error::Error for ParametersError {}

impl Parameters {
    /// Reads parameters and checks them against what `manifest` allows.
    ///
    /// # Errors
    /// See [`ParametersError`].
    pub fn decode(bytes: &[u8; SIZE], manifest: &Manifest) -> Result<Self, ParametersError> {
        let mut fields = Fields(bytes);
        if fields.bytes() != MAGIC {
            return Err(ParametersError::Magic);
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(ParametersError::Version { given: version });
        }
        let flags = fields.u32();
        if flags & !(FLAG_SERIAL | FLAG_SHA) != 0 {
            return Err(ParametersError::Flags { given: flags });
        }
        let memory = fields.u64();
        if !manifest.memory().contains(&memory) || !memory.is_multiple_of(MIB) {
            let (min, max) = (manifest.min_memory, manifest.max_memory);
            return Err(ParametersError::Memory { given: memory, min, max });
        }
        let vcpus = fields.u32();
        if vcpus == 0 || vcpus > u32::from(manifest.max_vcpus) {
            return Err(ParametersError::Vcpus { given: vcpus, max: manifest.max_vcpus });
        }
        let slots = fields.u32();
        if slots > u32::from(layout::VIRTIO_MMIO_SLOTS) {
            return Err(ParametersError::VirtioMmioSlots { given: slots });
        }
        let host_data = fields.bytes();
        if !is_zero(&host_data) && !manifest.host_data {
            return Err(ParametersError::HostData);
        }
        Ok(Self {
            memory,
            vcpus: vcpus as u8,
            virtio_mmio_slots: slots as u8,
            serial: flags & FLAG_SERIAL != 0,
            sha_instructions: flags & FLAG_SHA != 0,
            host_data,
        })
    }

    /// Checks them against what `manifest` allows, as the first stage will.
    ///
    /// # Errors
    /// See [`ParametersError`].
    pub fn check(&self, manifest: &Manifest) -> Result<(), ParametersError> {
        Self::decode(&self.encode(), manifest).map(drop)
    }

    /// The bytes, for the start of the parameter page.
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut place = Place(&mut bytes);
        place.put(&MAGIC);
        place.put(&VERSION.to_le_bytes());
        let serial = if self.serial { FLAG_SERIAL } else { 0 };
        let sha = if self.sha_instructions { FLAG_SHA } else { 0 };
        place.put(&(serial | sha).to_le_bytes());
        place.put(&self.memory.to_le_bytes());
        place.put(&u32::from(self.vcpus).to_le_bytes());
        place.put(&u32::from(self.virtio_mmio_slots).to_le_bytes());
        place.put(&self.host_data);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::GIB;
    use crate::manifest::tests::manifest;

    fn parameters() -> Parameters {
        Parameters {
            memory: 256 * MIB,
            vcpus: 2,
            virtio_mmio_slots: 3,
            serial: true,
            sha_instructions: false,
            host_data: [7; 32],
        }
    }

    #[test]
    fn every_field_has_its_offset() {
        let bytes = parameters().encode();
        assert_eq!(&bytes[..8], b"COFFERPP");
        assert_eq!(bytes[8..0x10], [1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[0x10..0x18], (256_u64 << 20).to_le_bytes());
        assert_eq!(bytes[0x18..0x20], [2, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[0x20..], [7; 32]);
        assert_eq!(Parameters::decode(&bytes, &manifest()), Ok(parameters()));
        parameters().check(&manifest()).unwrap();
        let sha = Parameters { serial: false, sha_instructions: true, ..parameters() };
        assert_eq!(sha.encode()[0x0C], 2);
        assert_eq!(Parameters::decode(&sha.encode(), &manifest()), Ok(sha));
    }

    #[test]
    fn each_field_is_checked() {
        use ParametersError as E;
        let memory = |given| E::Memory { given, min: 128 * MIB, max: 2 * GIB };
        let vcpus = |given| E::Vcpus { given, max: 8 };
        let word = |value: u64| value.to_le_bytes();
        let cases: &[(usize, &[u8], E)] = &[
            (0, b"x", E::Magic),
            (8, &[0], E::Version { given: 0 }),
            (0xC, &[4], E::Flags { given: 4 }),
            (0x10, &word(127 * MIB), memory(127 * MIB)),
            (0x10, &word(2 * GIB + MIB), memory(2 * GIB + MIB)),
            (0x10, &word(256 * MIB + 4096), memory(256 * MIB + 4096)),
            (0x10, &word(u64::MAX), memory(u64::MAX)),
            (0x10, &word(0), memory(0)),
            (0x18, &[0], vcpus(0)),
            (0x18, &[9], vcpus(9)),
            (0x19, &[1], vcpus(258)),
            (0x1C, &[65], E::VirtioMmioSlots { given: 65 }),
            (0x1F, &[1], E::VirtioMmioSlots { given: 0x100_0003 }),
        ];
        for (offset, patch, error) in cases {
            let mut bytes = parameters().encode();
            bytes[*offset..][..patch.len()].copy_from_slice(patch);
            assert_eq!(Parameters::decode(&bytes, &manifest()), Err(*error), "{offset:#x} {patch:?}");
            assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn host_data_are_for_images_that_want_them() {
        let without = Manifest { host_data: false, ..manifest() };
        assert_eq!(parameters().check(&without), Err(ParametersError::HostData));
        Parameters { host_data: [0; 32], ..parameters() }.check(&without).unwrap();
    }

    #[test]
    fn messages_say_what_the_image_takes() {
        let message = |parameters: Parameters| parameters.check(&manifest()).unwrap_err().to_string();
        assert_eq!(
            message(Parameters { memory: 64 * MIB, ..parameters() }),
            "the image takes 128 to 2048 MiB of memory, not 64 MiB"
        );
        assert_eq!(message(Parameters { vcpus: 16, ..parameters() }), "the image takes 1 to 8 vCPUs, not 16");
    }

    proptest! {
        /// Whatever the bytes: refused, or within the image's bounds and the same when they are written again.
        #[test]
        fn any_bytes_are_refused_or_kept(changes in proptest::collection::vec((0..SIZE, any::<u8>()), 0..4)) {
            let mut bytes = parameters().encode();
            changes.into_iter().for_each(|(offset, byte)| bytes[offset] = byte);
            if let Ok(read) = Parameters::decode(&bytes, &manifest()) {
                prop_assert_eq!(read.encode(), bytes);
                prop_assert!(manifest().memory().contains(&read.memory));
                prop_assert!((1..=manifest().max_vcpus).contains(&read.vcpus));
                prop_assert!(read.virtio_mmio_slots <= layout::VIRTIO_MMIO_SLOTS);
            }
        }
    }
}
