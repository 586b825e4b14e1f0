//! The container in a domain, as it is configured. What it may do is in its manifest, which the monitor hands on
//! without reading it: it is the guest that checks everything against it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::validate::{ConfigError, check_path, check_range, check_text};

/// Fewest and most layers.
const LAYERS: (u64, u64) = (1, 32);
/// Most data volumes.
const MAX_VOLUMES: u64 = 16;
/// Smallest and largest scratch device that the monitor makes, in bytes.
const SCRATCH_SIZE: (u64, u64) = (4096, 1 << 40);
/// Most variables for a start, and the longest value of one, in bytes.
const MAX_VARIABLES: u64 = 64;
const MAX_VALUE: usize = 4096;
/// Longest name of a variable, in bytes.
const MAX_NAME: usize = 4096;

/// A container: its manifest, and the files that the manifest names by their hashes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Container {
    /// The manifest, at most 1 MiB. Its SHA-256 is the domain's host data.
    pub manifest: PathBuf,
    /// The layers in the manifest's order: EROFS file systems with dm-verity trees; 1 to 32.
    pub layers: Vec<PathBuf>,
    /// The data volumes in the order of the manifest's mounts, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<PathBuf>,
    /// The scratch device, if the manifest has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Scratch>,
    /// Values of this start for environment variables that the manifest declares: at most 64.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// A scratch device: a file, or memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Scratch {
    /// A file or block device of the manifest's size. What is in it is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// In place of a file, so many bytes of the monitor's own memory, taken as the guest writes to them: a multiple of
    /// 4,096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl Container {
    /// Everything that is a path or `fd:N`, by its field.
    pub fn paths(&self) -> Vec<(String, &Path)> {
        let mut paths = vec![("container.manifest".to_owned(), self.manifest.as_path())];
        for (name, list) in [("layers", &self.layers), ("volumes", &self.volumes)] {
            let named = |(index, path)| (format!("container.{name}[{index}]"), PathBuf::as_path(path));
            paths.extend(list.iter().enumerate().map(named));
        }
        if let Some(path) = self.scratch.as_ref().and_then(|scratch| scratch.path.as_deref()) {
            paths.push(("container.scratch.path".to_owned(), path));
        }
        paths
    }

    /// How many drives it has: the manifest's, layers, data volumes, scratch device.
    pub fn drive_count(&self) -> usize {
        let listed = self.layers.len().saturating_add(self.volumes.len());
        listed.saturating_add(usize::from(self.scratch.is_some())).saturating_add(1)
    }

    /// Checks what can be checked without the host.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_range("container.layers", self.layers.len() as u64, LAYERS)?;
        check_range("container.volumes", self.volumes.len() as u64, (0, MAX_VOLUMES))?;
        for (field, path) in self.paths() {
            check_path(&field, path)?;
        }
        if let Some(scratch) = &self.scratch {
            scratch.validate()?;
        }
        check_range("container.env", self.env.len() as u64, (0, MAX_VARIABLES))?;
        for (name, value) in &self.env {
            if name.is_empty() || name.contains('=') {
                return conflict("container.env", "a name is empty, or has \"=\" in it");
            }
            check_text("container.env", name.as_bytes(), MAX_NAME)?;
            // By its name: values may be confidential.
            check_text(&format!("container.env.{name}"), value.as_bytes(), MAX_VALUE)?;
        }
        Ok(())
    }
}

impl Scratch {
    fn validate(&self) -> Result<(), ConfigError> {
        match (&self.path, self.size) {
            (Some(_), None) => Ok(()),
            (None, Some(size)) => {
                check_range("container.scratch.size", size, SCRATCH_SIZE)?;
                match size.is_multiple_of(SCRATCH_SIZE.0) {
                    true => Ok(()),
                    false => conflict("container.scratch.size", "is not a multiple of 4096"),
                }
            }
            _ => conflict("container.scratch", "has a path or a size, and not both"),
        }
    }
}

fn conflict(field: &str, reason: &'static str) -> Result<(), ConfigError> {
    Err(ConfigError::Conflict { field: field.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::DomainConfig;

    /// A good configuration in which `change` is done to `container`.
    fn config(change: impl FnOnce(&mut Value)) -> Result<DomainConfig, String> {
        let mut config = json!({
            "boot-source": {"image_path": "domain.igvm"},
            "container": {"manifest": "manifest.json", "layers": ["a", "fd:7"]},
        });
        change(&mut config);
        let config =
            DomainConfig::from_json(config.to_string().as_bytes()).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| error.to_string()).map(|()| config)
    }

    #[test]
    fn a_container_in_full_and_back() {
        config(|_| {}).unwrap();
        let full = config(|config| {
            let container = &mut config["container"];
            container["volumes"] = json!(["v"]);
            container["scratch"] = json!({"size": 8192});
            container["env"] = json!({"A": "1"});
        });
        let full = full.unwrap();
        assert_eq!(full.container.as_ref().unwrap().drive_count(), 5);
        let text = serde_json::to_vec(&full).unwrap();
        assert_eq!(DomainConfig::from_json(&text).unwrap(), full);
    }

    #[test]
    fn refusals_name_the_field() {
        let set = |field: &'static str, value: Value| {
            config(move |config| config["container"][field] = value).unwrap_err()
        };
        let long = |count: usize| vec!["l"; count];
        let many: BTreeMap<_, _> = (0..65).map(|index| (index.to_string(), "")).collect();
        for (field, value, words) in [
            ("manifest", json!(""), "container.manifest: is empty"),
            ("manifest", json!("fd:1"), "container.manifest: \"1\" is not a descriptor"),
            (
                "manifest",
                json!("fd:7"),
                "container.layers[1]: fd:7 is given twice; container.manifest has it",
            ),
            ("layers", json!([]), "container.layers: 0 is not between 1 and 32"),
            ("layers", json!(long(33)), "container.layers: 33 is not between 1 and 32"),
            ("layers", json!(["a", ""]), "container.layers[1]: is empty"),
            ("volumes", json!(long(17)), "container.volumes: 17 is not between 0 and 16"),
            ("volumes", json!(["a\0"]), "container.volumes[0]: has a NUL byte at position 1"),
            ("scratch", json!({}), "container.scratch: has a path or a size, and not both"),
            ("scratch", json!({"path": "s", "size": 4096}), "container.scratch: has a path or a size"),
            ("scratch", json!({"path": "fd:x"}), "container.scratch.path: \"x\" is not a descriptor"),
            ("scratch", json!({"size": 0}), "container.scratch.size: 0 is not between 4096 and"),
            ("scratch", json!({"size": 4097}), "container.scratch.size: is not a multiple of 4096"),
            ("scratch", json!({"size": 2_u64 << 40}), "container.scratch.size: 2199023255552 is not between"),
            ("env", json!(many), "container.env: 65 is not between 0 and 64"),
            ("env", json!({"": "1"}), "container.env: a name is empty"),
            ("env", json!({"A=B": "1"}), "container.env: a name is empty, or has \"=\""),
            ("env", json!({"A\0": "1"}), "container.env: has a NUL byte"),
            ("env", json!({"A": "1\0"}), "container.env.A: has a NUL byte"),
            ("env", json!({"A": "x".repeat(4097)}), "container.env.A: 4097 bytes long"),
            ("env", json!({"A": 1}), "container.env.A: invalid type"),
            ("image", json!("x"), "unknown field `image`"),
        ] {
            let message = set(field, value);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn a_container_needs_an_image_and_no_other_drives() {
        let direct = config(|config| config["boot-source"] = json!({"kernel_image_path": "vmlinux"}));
        assert_eq!(direct.unwrap_err(), "container: needs an image: boot-source.image_path");
        let drive = config(|config| config["drives"] = json!([{"drive_id": "d", "path_on_host": "d"}]));
        assert_eq!(drive.unwrap_err(), "drives: the domain of a container has its container's drives only");
    }
}
