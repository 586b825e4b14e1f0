//! How a domain is to be protected.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::BootMode;
use crate::hex;
use crate::validate::ConfigError;

/// How the domain is protected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Confidential {
    /// The platform asked for.
    #[serde(default)]
    pub platform: PlatformChoice,
    /// Whether a domain that is not protected must not start. `auto` then never falls back to plain.
    #[serde(default)]
    pub require_protected: bool,
    /// 32 bytes of the host's that attestation reports show, and that the kernel gets of images which want them: 64
    /// hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_data: Option<HostData>,
    /// What SEV-SNP is asked for; nothing on other platforms.
    #[serde(default)]
    pub snp: SnpConfig,
}

/// The platform asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum PlatformChoice {
    /// SEV-SNP where both host and image have it, else plain.
    #[default]
    Auto,
    /// An ordinary virtual machine; the host can read and change everything in it.
    Plain,
    /// AMD SEV-SNP; it needs an image.
    Snp,
}

/// What SEV-SNP is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SnpConfig {
    /// The guest policy (SNP firmware ABI, 4.3), in place of the image's. It is in attestation reports, and in an ID block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<u64>,
    /// A file with an ID block (96 bytes), in place of the image's. It comes with `id_auth`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_block: Option<PathBuf>,
    /// A file with the authentication of the ID block (4,096 bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_auth: Option<PathBuf>,
    /// A file with the certificates that a guest gets with its attestation report: GUID table and content, as the GHCB
    /// specification has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certs: Option<PathBuf>,
}

/// 32 bytes that attestation reports show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(with = "String"))]
pub struct HostData(pub [u8; 32]);

impl FromStr for HostData {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        hex::parse(text).map(Self).ok_or("it is 64 hexadecimal digits")
    }
}

impl TryFrom<String> for HostData {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<HostData> for String {
    fn from(data: HostData) -> Self {
        data.to_string()
    }
}

impl fmt::Display for HostData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Confidential {
    /// Checks what can be checked without the host, for a domain whose kernel is loaded as `mode` says.
    pub(crate) fn validate(&self, mode: BootMode) -> Result<(), ConfigError> {
        let conflict = |field: &str, reason| Err(ConfigError::Conflict { field: field.to_owned(), reason });
        let SnpConfig { id_block, id_auth, .. } = &self.snp;
        match (id_block, id_auth) {
            (Some(_), None) => return conflict("confidential.snp.id_block", "comes with an id_auth"),
            (None, Some(_)) => return conflict("confidential.snp.id_auth", "comes with an id_block"),
            _ => {}
        }
        if self.platform == PlatformChoice::Plain && self.require_protected {
            return conflict("confidential.require_protected", "asks for more than the platform plain");
        }
        if mode == BootMode::Direct {
            let of_images = [
                ("confidential.platform", self.platform == PlatformChoice::Snp),
                ("confidential.host_data", self.host_data.is_some()),
            ];
            if let Some((field, _)) = of_images.iter().find(|(_, given)| *given) {
                return conflict(field, "needs an image: boot_mode image, or an image_path");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Confidential, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn host_data_are_64_digits() {
        let text = "00f1".repeat(16);
        let with = |text: &str| read(&format!(r#"{{"host_data": "{text}"}}"#));
        let config = with(&text.to_uppercase()).unwrap();
        assert_eq!(config.host_data.unwrap().0[..3], [0, 0xf1, 0]);
        assert!(serde_json::to_string(&config).unwrap().contains(&text));
        for bad in [&text[1..], &text[2..], &format!("{text}00"), &text.replace('f', "g"), "", "é"] {
            let error = with(bad).unwrap_err();
            assert!(error.contains("it is 64 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn contradictions_are_named() {
        let refused =
            |json: &str, mode| read(json).unwrap().validate(mode).map_err(|error| error.to_string());
        let good = r#"{"platform": "snp", "require_protected": true, "snp": {"policy": 196608, "id_block": "b", "id_auth": "a"}}"#;
        assert_eq!(refused(good, BootMode::Image), Ok(()));
        for (json, mode, field) in [
            (good, BootMode::Direct, "confidential.platform"),
            (r#"{"snp": {"id_block": "b"}}"#, BootMode::Image, "confidential.snp.id_block"),
            (r#"{"snp": {"id_auth": "b"}}"#, BootMode::Image, "confidential.snp.id_auth"),
            (
                r#"{"platform": "plain", "require_protected": true}"#,
                BootMode::Image,
                "confidential.require_protected",
            ),
            (
                &format!(r#"{{"host_data": "{}"}}"#, "0".repeat(64)),
                BootMode::Direct,
                "confidential.host_data",
            ),
        ] {
            let error = refused(json, mode).unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
