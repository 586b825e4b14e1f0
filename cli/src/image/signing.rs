//! Signatures of SNP ID blocks: ECDSA on P-384 with SHA-384, deterministic (RFC
//! 6979), so that the same key and image always give the same bytes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cofferdam_confidential::digest::id_block::{
    ALGORITHM_ECDSA_P384_SHA384, CURVE_P384, EcdsaPublicKey, EcdsaSignature, IdAuthentication, IdBlock,
};
use p384::SecretKey;
use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature, SigningKey};
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of a number on the curve.
const NUMBER: usize = 48;
/// Largest key file. One with a P-384 key has some 300 bytes.
const MAX_KEY_FILE: u64 = 64 << 10;

/// Why a key file has no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too large to be one.
    #[error("{} is no key: it has more than {MAX_KEY_FILE} bytes", .0.display())]
    TooLarge(PathBuf),
    /// It has something else in it.
    #[error("{} is no private key for P-384 in PEM (PKCS#8 or SEC1, not encrypted): {reason}", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Reads a private key, `BEGIN PRIVATE KEY` or `BEGIN EC PRIVATE KEY`.
///
/// # Errors
/// Anything but one such key for P-384.
pub fn read_key(path: &Path) -> Result<SigningKey, KeyError> {
    let read = |source| KeyError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(read)?.len() > MAX_KEY_FILE {
        return Err(KeyError::TooLarge(path.to_owned()));
    }
    let text = fs::read_to_string(path).map_err(read)?;
    // `openssl ecparam -genkey` puts the name of the curve before the key.
    let key = text.find("-----BEGIN EC PRIVATE KEY-----").and_then(|start| text.get(start..));
    let secret = SecretKey::from_pem(key.unwrap_or(&text))
        .map_err(|error| KeyError::NoKey { path: path.to_owned(), reason: error.to_string() })?;
    Ok(SigningKey::from(secret))
}

/// Signs the ID block with the ID key, and that key with the author key if there is one.
pub fn sign(block: &IdBlock, id_key: &SigningKey, author_key: Option<&SigningKey>) -> IdAuthentication {
    let mut authentication = IdAuthentication {
        id_key_algorithm: ALGORITHM_ECDSA_P384_SHA384,
        id_block_signature: signature(id_key, block.as_bytes()),
        id_key: public_key(id_key),
        ..IdAuthentication::new_zeroed()
    };
    if let Some(author_key) = author_key {
        authentication.author_key_algorithm = ALGORITHM_ECDSA_P384_SHA384;
        authentication.id_key_signature = signature(author_key, authentication.id_key.as_bytes());
        authentication.author_key = public_key(author_key);
    }
    authentication
}

fn signature(key: &SigningKey, message: &[u8]) -> EcdsaSignature {
    let signature: Signature = key.sign(message);
    let (r, s) = signature.split_bytes();
    EcdsaSignature { r: little_endian(&r), s: little_endian(&s), ..EcdsaSignature::new_zeroed() }
}

fn public_key(key: &SigningKey) -> EcdsaPublicKey {
    // SEC1: a byte for the format, then x and y.
    let point = key.verifying_key().to_sec1_point(false);
    let mut numbers = point.as_bytes().get(1..).unwrap_or_default().chunks(NUMBER);
    let mut next = || little_endian(numbers.next().unwrap_or_default());
    EcdsaPublicKey { curve: CURVE_P384, qx: next(), qy: next(), ..EcdsaPublicKey::new_zeroed() }
}

/// A big-endian number as the firmware takes it.
fn little_endian(number: &[u8]) -> [u8; 72] {
    let mut bytes = [0; 72];
    for (to, from) in bytes.iter_mut().zip(number.iter().rev()) {
        *to = *from;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use openssl::bn::BigNum;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::ecdsa::EcdsaSig;
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use sev::certs::snp::ecdsa::Signature as SevSignature;
    use sev::measurement::idblock::{gen_id_auth_block, generate_key_digest};
    use sev::measurement::idblock_types::{IdAuth, IdBlock as SevIdBlock};
    use sev::parser::ByteParser;
    use tempfile::NamedTempFile;

    use super::*;

    fn group(curve: Nid) -> EcGroup {
        EcGroup::from_curve_name(curve).unwrap()
    }

    fn file(content: &[u8]) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        file
    }

    /// A file as `openssl genpkey` makes it.
    fn pkcs8(curve: Nid) -> NamedTempFile {
        let key = EcKey::generate(&group(curve)).unwrap();
        file(&PKey::from_ec_key(key).unwrap().private_key_to_pem_pkcs8().unwrap())
    }

    /// A file as `openssl ecparam -genkey -noout` makes it.
    fn sec1() -> NamedTempFile {
        file(&EcKey::generate(&group(Nid::SECP384R1)).unwrap().private_key_to_pem().unwrap())
    }

    fn block() -> IdBlock {
        IdBlock {
            launch_digest: std::array::from_fn(|index| index as u8),
            family_id: *b"a family of ours",
            image_id: *b"an image of ours",
            version: 1,
            guest_svn: 7,
            policy: 0x30000,
        }
    }

    /// Checks a signature with OpenSSL, from the bytes that the firmware would read.
    fn verify(key: &[u8], signature: &[u8], message: &[u8]) -> bool {
        let number =
            |bytes: &[u8]| BigNum::from_slice(&bytes.iter().rev().copied().collect::<Vec<_>>()).unwrap();
        assert_eq!(key[..4], [2, 0, 0, 0]);
        let (x, y) = (number(&key[4..76]), number(&key[76..148]));
        let key = EcKey::from_public_key_affine_coordinates(&group(Nid::SECP384R1), &x, &y).unwrap();
        let signature = SevSignature::from_bytes(signature).unwrap();
        let signature = EcdsaSig::try_from(&signature).unwrap();
        signature.verify(&openssl::sha::sha384(message), &key).unwrap()
    }

    #[test]
    fn openssl_and_the_sev_crate_accept_what_is_signed() {
        let (id_file, author_file) = (pkcs8(Nid::SECP384R1), sec1());
        let block = block();
        let author_key = read_key(author_file.path()).unwrap();
        let authentication = sign(&block, &read_key(id_file.path()).unwrap(), Some(&author_key));
        let bytes = authentication.as_bytes();

        // The sev crate signs with a random number; all but the signatures must be the same.
        let parsed = SevIdBlock::from_bytes(block.as_bytes()).unwrap();
        assert_eq!(parsed.to_bytes().unwrap(), block.as_bytes());
        assert_eq!((parsed.version, parsed.guest_svn), (1, 7));
        let theirs = gen_id_auth_block(&parsed, id_file.path().into(), author_file.path().into()).unwrap();
        let mut theirs = theirs.to_bytes().unwrap();
        for range in [0x40..0x240, 0x680..0x880] {
            theirs[range.clone()].copy_from_slice(&bytes[range]);
        }
        assert_eq!(theirs.as_slice(), bytes);
        IdAuth::from_bytes(bytes).unwrap();
        let digest = generate_key_digest(id_file.path().into()).unwrap().to_bytes().unwrap();
        assert_eq!(authentication.id_key.digest(), digest);

        let id_key = &bytes[0x240..0x644];
        assert!(verify(id_key, &bytes[0x40..0x240], block.as_bytes()));
        assert!(verify(&bytes[0x880..0xc84], &bytes[0x680..0x880], id_key));
        let mut other = block;
        other.guest_svn = 8;
        assert!(!verify(id_key, &bytes[0x40..0x240], other.as_bytes()));
    }

    #[test]
    fn the_author_key_is_optional() {
        let id_key = read_key(sec1().path()).unwrap();
        let authentication = sign(&block(), &id_key, None);
        assert_eq!(authentication.author_key_algorithm, 0);
        assert!(authentication.as_bytes()[0x680..].iter().all(|byte| *byte == 0));
    }

    /// RFC 6979, A.2.6, "With SHA-384, message = "sample"".
    #[test]
    fn signatures_are_deterministic() {
        let number = |hex: &str| BigNum::from_hex_str(hex).unwrap().to_vec();
        let key = number(
            "6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5",
        );
        let signature = signature(&SigningKey::from_slice(&key).unwrap(), b"sample");
        let r = "94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46";
        let s = "99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8";
        assert_eq!(signature.r, little_endian(&number(r)));
        assert_eq!(signature.s, little_endian(&number(s)));
    }

    #[test]
    fn parameters_before_a_key_are_skipped() {
        let key = sec1();
        let parameters = b"-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n";
        let with_parameters = file(&[parameters, fs::read(key.path()).unwrap().as_slice()].concat());
        assert_eq!(read_key(with_parameters.path()).unwrap(), read_key(key.path()).unwrap());
    }

    #[test]
    fn other_files_are_refused() {
        let refused = |content: &[u8]| read_key(file(content).path()).unwrap_err();
        let key = fs::read(pkcs8(Nid::SECP384R1).path()).unwrap();
        let other_curve = fs::read(pkcs8(Nid::X9_62_PRIME256V1).path()).unwrap();
        assert!(matches!(refused(&other_curve), KeyError::NoKey { .. }));
        assert!(matches!(refused(b""), KeyError::NoKey { .. }));
        assert!(matches!(refused(&key[..100]), KeyError::NoKey { .. }));
        assert!(matches!(refused(b"\xff"), KeyError::Read { .. }));
        assert!(matches!(refused(&vec![b' '; MAX_KEY_FILE as usize + 1]), KeyError::TooLarge(_)));
        assert!(matches!(read_key(Path::new("/nonexistent")).unwrap_err(), KeyError::Read { .. }));
    }
}
