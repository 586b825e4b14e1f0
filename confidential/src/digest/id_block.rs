//! The ID block of an SNP guest and its authentication.
//!
//! With them the owner of a guest says which launch digest it must have, names
//! it, and signs that with the *ID key*; an *author key* may vouch for the ID
//! key. The secure processor refuses to finish a launch that does not match,
//! and shows names and key digests in every attestation report (*SEV Secure Nested
//! Paging Firmware ABI Specification*, 56860 revision 1.55, SNP_LAUNCH_FINISH, and
//! appendix "Digital Signatures").
//!
//! Integers are little-endian; components of keys and signatures are too, with zeroes behind
//! them.

use sha2::{Digest, Sha384};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::Sha384Digest;
use crate::image::importer::{PublicKey, Signature, SnpIdBlock};

/// Version of the ID block.
pub const ID_BLOCK_VERSION: u32 = 1;
/// Algorithm: ECDSA on P-384 with SHA-384.
pub const ALGORITHM_ECDSA_P384_SHA384: u32 = 1;
/// Curve: P-384.
pub const CURVE_P384: u32 = 2;

/// What the owner signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct IdBlock {
    /// The launch digest that the guest must have.
    pub launch_digest: Sha384Digest,
    /// Family of the guest, as its owner calls it.
    pub family_id: [u8; 16],
    /// Image of the guest, as its owner calls it.
    pub image_id: [u8; 16],
    /// [`ID_BLOCK_VERSION`].
    pub version: u32,
    /// Security version of the guest.
    pub guest_svn: u32,
    /// The guest policy, the same as the launch is started with.
    pub policy: u64,
}

/// An ECDSA signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct EcdsaSignature {
    /// r.
    pub r: [u8; 72],
    /// s.
    pub s: [u8; 72],
    /// Zero.
    pub reserved: [u8; 368],
}

/// An ECDSA public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct EcdsaPublicKey {
    /// [`CURVE_P384`].
    pub curve: u32,
    /// x of the point.
    pub qx: [u8; 72],
    /// y of the point.
    pub qy: [u8; 72],
    /// Zero.
    pub reserved: [u8; 880],
}

impl EcdsaPublicKey {
    /// What an attestation report shows of the key: ID_KEY_DIGEST or AUTHOR_KEY_DIGEST.
    pub fn digest(&self) -> Sha384Digest {
        Sha384::digest(self.as_bytes()).into()
    }
}

/// Who signed the ID block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct IdAuthentication {
    /// [`ALGORITHM_ECDSA_P384_SHA384`].
    pub id_key_algorithm: u32,
    /// The same, or 0 without an author key.
    pub author_key_algorithm: u32,
    /// Zero.
    pub reserved_0x8: [u8; 56],
    /// Signature of the 96 bytes of the ID block by the ID key.
    pub id_block_signature: EcdsaSignature,
    /// The ID key.
    pub id_key: EcdsaPublicKey,
    /// Zero.
    pub reserved_0x644: [u8; 60],
    /// Signature of the 1028 bytes of the ID key by the author key, if there is one.
    pub id_key_signature: EcdsaSignature,
    /// The author key, if there is one.
    pub author_key: EcdsaPublicKey,
    /// Zero.
    pub reserved_0xc84: [u8; 892],
}

impl IdBlock {
    /// The bytes of a file.
    pub fn from_bytes(bytes: &[u8; 96]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// The ID block that an image has, for a launch with `policy`.
    pub const fn of_image(block: &SnpIdBlock, policy: u64) -> Self {
        Self {
            launch_digest: block.launch_digest,
            family_id: block.family_id,
            image_id: block.image_id,
            version: block.version,
            guest_svn: block.guest_svn,
            policy,
        }
    }
}

impl IdAuthentication {
    /// The bytes of a file.
    pub fn from_bytes(bytes: &[u8; 4096]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// The authentication of the ID block that an image has.
    pub fn of_image(block: &SnpIdBlock) -> Self {
        let mut authentication = Self {
            id_key_algorithm: block.id_key_algorithm,
            id_block_signature: (&block.id_signature).into(),
            id_key: (&block.id_key).into(),
            ..Self::new_zeroed()
        };
        if let Some((signature, key)) = &block.author {
            authentication.author_key_algorithm = block.author_key_algorithm;
            authentication.id_key_signature = signature.into();
            authentication.author_key = key.into();
        }
        authentication
    }
}

impl From<&Signature> for EcdsaSignature {
    fn from(signature: &Signature) -> Self {
        Self { r: signature.r, s: signature.s, reserved: [0; 368] }
    }
}

impl From<&PublicKey> for EcdsaPublicKey {
    fn from(key: &PublicKey) -> Self {
        Self { curve: key.curve, qx: key.x, qy: key.y, reserved: [0; 880] }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn layout_of_the_specification() {
        assert_eq!(size_of::<IdBlock>(), 96);
        assert_eq!(offset_of!(IdBlock, family_id), 0x30);
        assert_eq!(offset_of!(IdBlock, image_id), 0x40);
        assert_eq!(offset_of!(IdBlock, version), 0x50);
        assert_eq!(offset_of!(IdBlock, guest_svn), 0x54);
        assert_eq!(offset_of!(IdBlock, policy), 0x58);
        assert_eq!(size_of::<EcdsaSignature>(), 512);
        assert_eq!(size_of::<EcdsaPublicKey>(), 1028);
        assert_eq!(size_of::<IdAuthentication>(), 4096);
        assert_eq!(offset_of!(IdAuthentication, id_block_signature), 0x40);
        assert_eq!(offset_of!(IdAuthentication, id_key), 0x240);
        assert_eq!(offset_of!(IdAuthentication, id_key_signature), 0x680);
        assert_eq!(offset_of!(IdAuthentication, author_key), 0x880);
        assert_eq!(offset_of!(IdAuthentication, reserved_0xc84), 0xc84);
    }
}
