//! Reference values of an image: what a verifier compares the evidence of a
//! domain with, as text and as JSON. ([`super::corim`] writes them as a CoRIM.)

use std::fmt::{self, Write as _};

use cofferdam_confidential::digest::cca::HashAlgorithm;
use cofferdam_confidential::image::importer::ImagePlatform;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// All of it for one platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// The platform.
    #[serde(serialize_with = "platform_name")]
    pub platform: ImagePlatform,
    /// SHA-256 of the image file.
    pub image_sha256: Value,
    /// What the hardware measures.
    pub digests: Vec<LaunchDigest>,
    /// With what it does so.
    #[serde(skip)]
    pub hash: HashAlgorithm,
    /// What is not in the digest and must be checked beside it.
    #[serde(serialize_with = "pins_by_name")]
    pub pin: Vec<Pin>,
}

/// A digest, and for which domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LaunchDigest {
    /// Number of virtual CPUs, or none if they do not matter.
    pub vcpus: Option<u32>,
    /// The digest.
    pub digest: Value,
}

/// A field of the evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Its name in the platform's specification, in lower case.
    pub name: &'static str,
    /// What must be there, if the image decides that.
    pub value: Option<Value>,
    /// What else there is to say of it.
    pub note: &'static str,
}

/// What is in a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Four bytes, decimal.
    Number(u32),
    /// Eight bytes, hexadecimal.
    Flags(u64),
    /// Bytes, hexadecimal.
    Bytes(Vec<u8>),
}

impl Value {
    /// The bytes as they stand in the evidence.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Number(number) => number.to_le_bytes().to_vec(),
            Self::Flags(flags) => flags.to_le_bytes().to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Flags(flags) => write!(f, "{flags:#x}"),
            Self::Bytes(bytes) => bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u32(*number),
            Self::Flags(_) | Self::Bytes(_) => serializer.collect_str(self),
        }
    }
}

fn platform_name<S: Serializer>(platform: &ImagePlatform, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(platform.name())
}

fn pins_by_name<S: Serializer>(pins: &[Pin], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(pins.len()))?;
    for pin in pins {
        map.serialize_entry(pin.name, &pin.value)?;
    }
    map.end()
}

impl Reference {
    /// For a person.
    pub fn to_text(&self) -> String {
        let name = match self.platform {
            ImagePlatform::Tdx => "MRTD",
            ImagePlatform::Cca => "RIM",
            _ => "launch digest",
        };
        let mut rows = vec![("image sha256".to_owned(), self.image_sha256.to_string())];
        for digest in &self.digests {
            let label = match digest.vcpus {
                None => name.to_owned(),
                Some(1) => format!("{name}, 1 vCPU"),
                Some(count) => format!("{name}, {count} vCPUs"),
            };
            rows.push((label, digest.digest.to_string()));
        }
        let mut text = format!("platform {}\n", self.platform.name());
        write_rows(&mut text, &rows);
        text.push_str("\nNot in the digest, and to be checked in the evidence as well:\n");
        let rows: Vec<_> = self.pin.iter().map(|pin| (pin.name.to_owned(), pin.to_text())).collect();
        write_rows(&mut text, &rows);
        text
    }
}

impl Pin {
    fn to_text(&self) -> String {
        match &self.value {
            Some(value) if self.note.is_empty() => value.to_string(),
            Some(value) => format!("{value}  ({})", self.note),
            None => self.note.to_owned(),
        }
    }
}

fn write_rows(text: &mut String, rows: &[(String, String)]) {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    for (label, value) in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {label:width$}  {value}");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reference() -> Reference {
        Reference {
            platform: ImagePlatform::Snp,
            image_sha256: Value::Bytes(vec![0xab; 32]),
            digests: vec![
                LaunchDigest { vcpus: Some(1), digest: Value::Bytes(vec![1, 2]) },
                LaunchDigest { vcpus: Some(16), digest: Value::Bytes(vec![0xff]) },
            ],
            hash: HashAlgorithm::Sha384,
            pin: vec![
                Pin { name: "policy", value: Some(Value::Flags(0x30000)), note: "" },
                Pin { name: "guest_svn", value: Some(Value::Number(7)), note: "set by the ID block" },
                Pin { name: "host_data", value: None, note: "what was given at the launch" },
            ],
        }
    }

    #[test]
    fn json_has_the_documented_shape() {
        assert_eq!(
            serde_json::to_value(reference()).unwrap(),
            json!({
                "platform": "snp",
                "image_sha256": "ab".repeat(32),
                "digests": [{"vcpus": 1, "digest": "0102"}, {"vcpus": 16, "digest": "ff"}],
                "pin": {"policy": "0x30000", "guest_svn": 7, "host_data": null},
            })
        );
    }

    #[test]
    fn text_is_aligned() {
        let mut reference = reference();
        assert_eq!(
            reference.to_text(),
            format!(
                "platform snp\n\
                 \x20 image sha256             {}\n\
                 \x20 launch digest, 1 vCPU    0102\n\
                 \x20 launch digest, 16 vCPUs  ff\n\
                 \n\
                 Not in the digest, and to be checked in the evidence as well:\n\
                 \x20 policy     0x30000\n\
                 \x20 guest_svn  7  (set by the ID block)\n\
                 \x20 host_data  what was given at the launch\n",
                "ab".repeat(32)
            )
        );
        reference.platform = ImagePlatform::Tdx;
        reference.digests = vec![LaunchDigest { vcpus: None, digest: Value::Bytes(vec![3]) }];
        assert!(reference.to_text().contains("\n  MRTD          03\n"), "{}", reference.to_text());
    }

    #[test]
    fn bytes_of_the_evidence_are_little_endian() {
        assert_eq!(Value::Number(7).to_bytes(), [7, 0, 0, 0]);
        assert_eq!(Value::Flags(0x30000).to_bytes(), [0, 0, 3, 0, 0, 0, 0, 0]);
    }
}
