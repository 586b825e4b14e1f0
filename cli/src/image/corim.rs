//! Reference values as a CoRIM, which verifiers read (CBOR; *Concise Reference
//! Integrity Manifest*, draft-ietf-rats-corim-10).
//!
//! The document is not signed. It has a CoMID tag for each launch digest, so
//! that each stands with what must be pinned beside it. How a field is named
//! in there:
//!
//! - SNP: as draft-deeglaze-amd-sev-snp-corim-profile-02 has it, by the number of
//!   the report's field, for reports signed by a VCEK and by a VLEK. HOST_DATA
//!   is a raw value: the draft makes it a digest of 48 bytes, and it has 32.
//! - CCA: as draft-ydb-rats-cca-endorsements-04 has it, by `cca.rim` and `cca.rpv`.
//! - TDX: no profile has all the fields; they are named as in TDINFO_STRUCT, in
//!   an environment of vendor "Intel" and model "TDX".
//!
//! The same reference values give the same bytes (RFC 8949, 4.2.1).

use ciborium::Value as Cbor;
use cofferdam_confidential::digest::cca::HashAlgorithm;
use cofferdam_confidential::image::importer::ImagePlatform;

use super::reference::{LaunchDigest, Pin, Reference, Value};

/// Tag of an unsigned CoRIM.
const TAG_CORIM: u64 = 501;
/// Tag of a CoMID in a CoRIM.
const TAG_COMID: u64 = 506;
/// Tag of bytes where a type must be told.
const TAG_BYTES: u64 = 560;
/// Tag of an object identifier (RFC 9090).
const TAG_OID: u64 = 111;
/// Tag of a URI.
const TAG_URI: u64 = 32;

// Keys of maps that are more than counted up from 0 (all in draft-ietf-rats-corim-10).
const CORIM_ID: u64 = 0;
const CORIM_TAGS: u64 = 1;
const CORIM_PROFILE: u64 = 3;
const COMID_TAG_IDENTITY: u64 = 1;
const COMID_TRIPLES: u64 = 4;
const TAG_ID: u64 = 0;
const REFERENCE_TRIPLES: u64 = 0;
const ENVIRONMENT_CLASS: u64 = 0;
const CLASS_ID: u64 = 0;
const CLASS_VENDOR: u64 = 1;
const CLASS_MODEL: u64 = 2;
const MEASUREMENT_KEY: u64 = 0;
const MEASUREMENT_VALUE: u64 = 1;
const VALUE_DIGESTS: u64 = 2;
const VALUE_RAW: u64 = 4;

/// 1.3.6.1.4.1.3704.3.1 and .2: reports signed by a VCEK (a chip's key) and by a VLEK (a provider's).
const SNP_CLASSES: [[u8; 9]; 2] = [
    [0x2b, 0x06, 0x01, 0x04, 0x01, 0x9c, 0x78, 0x03, 0x01],
    [0x2b, 0x06, 0x01, 0x04, 0x01, 0x9c, 0x78, 0x03, 0x02],
];

/// That of the editor's copy of the draft, as Veraison's tools have it; revision 02 itself says 2024.
const SNP_PROFILE: &str = "tag:amd.com,2025:snp-corim-profile";
const CCA_PROFILE: &str = "tag:arm.com,2025:cca_realm#1.0.0";

/// The document.
pub fn document(reference: &Reference) -> Vec<u8> {
    let id = format!("cofferdam:sha256:{}:{}", reference.image_sha256, reference.platform.name());
    let tags = reference.digests.iter().map(|digest| comid(reference, digest, &id)).collect();
    let mut corim = vec![(CORIM_ID, Cbor::Text(id.clone())), (CORIM_TAGS, Cbor::Array(tags))];
    let profile = match reference.platform {
        ImagePlatform::Snp => Some(SNP_PROFILE),
        ImagePlatform::Cca => Some(CCA_PROFILE),
        _ => None,
    };
    if let Some(uri) = profile {
        corim.push((CORIM_PROFILE, tag(TAG_URI, Cbor::Text(uri.to_owned()))));
    }
    encode(&tag(TAG_CORIM, map(corim)))
}

fn comid(reference: &Reference, digest: &LaunchDigest, document: &str) -> Cbor {
    let id = match digest.vcpus {
        Some(vcpus) => format!("{document}:{vcpus}"),
        None => document.to_owned(),
    };
    let measurements = measurements(reference, digest);
    let triples = classes(reference.platform, digest).into_iter().map(|class| {
        let environment = map(vec![(ENVIRONMENT_CLASS, class)]);
        Cbor::Array(vec![environment, Cbor::Array(measurements.clone())])
    });
    let comid = map(vec![
        (COMID_TAG_IDENTITY, map(vec![(TAG_ID, Cbor::Text(id))])),
        (COMID_TRIPLES, map(vec![(REFERENCE_TRIPLES, Cbor::Array(triples.collect()))])),
    ]);
    tag(TAG_COMID, Cbor::Bytes(encode(&comid)))
}

/// What the values are about.
fn classes(platform: ImagePlatform, digest: &LaunchDigest) -> Vec<Cbor> {
    let class_id = |number, bytes: &[u8]| map(vec![(CLASS_ID, tag(number, Cbor::Bytes(bytes.to_vec())))]);
    match platform {
        ImagePlatform::Snp => SNP_CLASSES.iter().map(|oid| class_id(TAG_OID, oid)).collect(),
        // A realm is known by its measurement.
        ImagePlatform::Cca => vec![class_id(TAG_BYTES, &digest.digest.to_bytes())],
        _ => {
            let text = |text: &str| Cbor::Text(text.to_owned());
            vec![map(vec![(CLASS_VENDOR, text("Intel")), (CLASS_MODEL, text("TDX"))])]
        }
    }
}

fn measurements(reference: &Reference, digest: &LaunchDigest) -> Vec<Cbor> {
    let platform = reference.platform;
    let launch = measurement(element(platform, "measurement"), digests(reference.hash, &digest.digest));
    let pins = reference.pin.iter().filter_map(|Pin { name, value, .. }| {
        let is_key_digest = matches!(*name, "id_key_digest" | "author_key_digest");
        let value = value.as_ref()?;
        let value = if is_key_digest { digests(HashAlgorithm::Sha384, value) } else { raw(value) };
        Some(measurement(element(platform, name), value))
    });
    std::iter::once(launch).chain(pins).collect()
}

/// What a field is called.
fn element(platform: ImagePlatform, field: &str) -> Cbor {
    let text = |text: &str| Cbor::Text(text.to_owned());
    match (platform, field) {
        (ImagePlatform::Snp, "guest_svn") => number(1),
        (ImagePlatform::Snp, "policy") => number(2),
        (ImagePlatform::Snp, "family_id") => number(3),
        (ImagePlatform::Snp, "image_id") => number(4),
        (ImagePlatform::Snp, "vmpl") => number(5),
        (ImagePlatform::Snp, "measurement") => number(641),
        (ImagePlatform::Snp, "host_data") => number(642),
        (ImagePlatform::Snp, "id_key_digest") => number(643),
        (ImagePlatform::Snp, "author_key_digest") => number(644),
        (ImagePlatform::Cca, "measurement") => text("cca.rim"),
        (ImagePlatform::Cca, field) => Cbor::Text(format!("cca.{field}")),
        (_, "measurement") => text("MRTD"),
        (_, field) => Cbor::Text(field.to_uppercase()),
    }
}

fn measurement(element: Cbor, value: Cbor) -> Cbor {
    map(vec![(MEASUREMENT_KEY, element), (MEASUREMENT_VALUE, value)])
}

fn digests(hash: HashAlgorithm, digest: &Value) -> Cbor {
    // IANA's "Named Information Hash Algorithm Registry".
    let algorithm = match hash {
        HashAlgorithm::Sha256 => 1,
        HashAlgorithm::Sha384 => 7,
        HashAlgorithm::Sha512 => 8,
    };
    let digest = Cbor::Array(vec![number(algorithm), Cbor::Bytes(digest.to_bytes())]);
    map(vec![(VALUE_DIGESTS, Cbor::Array(vec![digest]))])
}

fn raw(value: &Value) -> Cbor {
    map(vec![(VALUE_RAW, tag(TAG_BYTES, Cbor::Bytes(value.to_bytes())))])
}

fn number(number: u64) -> Cbor {
    Cbor::Integer(number.into())
}

fn tag(number: u64, value: Cbor) -> Cbor {
    Cbor::Tag(number, Box::new(value))
}

/// A map; its keys come in ascending order.
fn map(entries: Vec<(u64, Cbor)>) -> Cbor {
    Cbor::Map(entries.into_iter().map(|(key, value)| (number(key), value)).collect())
}

fn encode(value: &Cbor) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to a Vec cannot fail, and there is nothing in a Cbor that cannot be encoded.
    let _ = ciborium::into_writer(value, &mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use corim::types::common::{ClassIdChoice, MeasuredElement};
    use corim::types::corim::ProfileChoice;
    use corim::types::measurement::{Digest, MeasurementMap, RawValueChoice};
    use corim::validate::decode_and_validate;

    use super::*;

    fn reference(platform: ImagePlatform, pin: Vec<Pin>) -> Reference {
        let digests = [Some(1), Some(2)].map(|vcpus| LaunchDigest {
            vcpus: vcpus.filter(|_| platform == ImagePlatform::Snp),
            digest: Value::Bytes(vec![vcpus.unwrap_or(0) as u8; 48]),
        });
        let count = if platform == ImagePlatform::Snp { 2 } else { 1 };
        Reference {
            platform,
            image_sha256: Value::Bytes(vec![0xab; 32]),
            digests: digests[..count].to_vec(),
            hash: HashAlgorithm::Sha384,
            pin,
        }
    }

    fn pin(name: &'static str, value: Option<Value>) -> Pin {
        Pin { name, value, note: "" }
    }

    fn of(measurements: &[MeasurementMap], key: MeasuredElement) -> &MeasurementMap {
        measurements.iter().find(|measurement| measurement.mkey == Some(key.clone())).unwrap()
    }

    #[test]
    fn snp_is_read_by_the_corim_crate() {
        let pins = vec![
            pin("policy", Some(Value::Flags(0x30000))),
            pin("guest_svn", Some(Value::Number(7))),
            pin("host_data", None),
            pin("id_key_digest", Some(Value::Bytes(vec![9; 48]))),
        ];
        let bytes = document(&reference(ImagePlatform::Snp, pins));
        let (corim, comids) = decode_and_validate(&bytes).unwrap();
        assert_eq!(corim.id.to_string(), format!("cofferdam:sha256:{}:snp", "ab".repeat(32)));
        assert_eq!(corim.profile, Some(ProfileChoice::Uri(SNP_PROFILE.into())));
        assert_eq!(comids.len(), 2);
        assert!(comids[1].tag_identity.tag_id.to_string().ends_with(":snp:2"));
        let triples = comids[1].triples.reference_triples.as_ref().unwrap();
        assert_eq!(triples.len(), 2);
        for triple in triples {
            let measurements = triple.measurements();
            assert_eq!(measurements.len(), 4);
            let launch = of(measurements, MeasuredElement::Uint(641)).mval.digests.as_ref().unwrap();
            assert_eq!(launch, &[Digest::new(7, vec![2; 48])]);
            let policy = &of(measurements, MeasuredElement::Uint(2)).mval.raw_value;
            assert_eq!(*policy, Some(RawValueChoice::Bytes(vec![0, 0, 3, 0, 0, 0, 0, 0])));
            let key = of(measurements, MeasuredElement::Uint(643)).mval.digests.as_ref().unwrap();
            assert_eq!(key, &[Digest::new(7, vec![9; 48])]);
        }
        let class = |triple: usize| triples[triple].environment().class.as_ref().unwrap().class_id.clone();
        assert_eq!(class(0), Some(ClassIdChoice::Oid(SNP_CLASSES[0].to_vec())));
        assert_eq!(class(1), Some(ClassIdChoice::Oid(SNP_CLASSES[1].to_vec())));
    }

    #[test]
    fn tdx_and_cca_are_read_by_the_corim_crate() {
        let tdx = reference(ImagePlatform::Tdx, vec![pin("attributes", Some(Value::Flags(1 << 28)))]);
        let (corim, comids) = decode_and_validate(&document(&tdx)).unwrap();
        assert_eq!((corim.profile, comids.len()), (None, 1));
        let triple = &comids[0].triples.reference_triples.as_ref().unwrap()[0];
        let class = triple.environment().class.as_ref().unwrap();
        assert_eq!((class.vendor.as_deref(), class.model.as_deref()), (Some("Intel"), Some("TDX")));
        let mrtd =
            of(triple.measurements(), MeasuredElement::Text("MRTD".into())).mval.digests.as_ref().unwrap();
        assert_eq!(mrtd, &[Digest::new(7, vec![1; 48])]);
        let attributes = of(triple.measurements(), MeasuredElement::Text("ATTRIBUTES".into()));
        assert_eq!(attributes.mval.raw_value, Some(RawValueChoice::Bytes(vec![0, 0, 0, 0x10, 0, 0, 0, 0])));

        let mut cca = reference(ImagePlatform::Cca, vec![pin("rpv", Some(Value::Bytes(vec![0; 64])))]);
        cca.hash = HashAlgorithm::Sha256;
        let (corim, comids) = decode_and_validate(&document(&cca)).unwrap();
        assert_eq!(corim.profile, Some(ProfileChoice::Uri(CCA_PROFILE.into())));
        let triple = &comids[0].triples.reference_triples.as_ref().unwrap()[0];
        let class = triple.environment().class.as_ref().unwrap();
        assert_eq!(class.class_id, Some(ClassIdChoice::Bytes(vec![1; 48])));
        let rim =
            of(triple.measurements(), MeasuredElement::Text("cca.rim".into())).mval.digests.as_ref().unwrap();
        assert_eq!(rim, &[Digest::new(1, vec![1; 48])]);
        of(triple.measurements(), MeasuredElement::Text("cca.rpv".into()));
    }
}
