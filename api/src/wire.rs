//! The configuration as it is read. It knows the fields of Firecracker's
//! configuration file that ask for things this monitor does not have: left at
//! "nothing asked for" (`null`, `false`, `[]`, `"None"` …) they are ignored, so that
//! its files are read unchanged; with a value they are refused by name instead
//! of being ignored.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{
    BootSource, CacheType, Confidential, Container, DomainConfig, Drive, IoEngine, MachineConfig,
    RateLimiter, Serial, SerialMode, TokenBucket, Vsock, default_block_size, default_stop_timeout_ms,
    root_first,
};
use crate::lacking;
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::requests::MachinePatch;
use crate::validate::{ConfigError, VCPU_COUNT};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "DomainConfig"))]
pub(crate) struct WireDomain {
    #[serde(rename = "machine-config", default)]
    machine: MachineConfig,
    #[serde(rename = "boot-source")]
    boot: BootSource,
    #[serde(default)]
    drives: Vec<Drive>,
    #[serde(default)]
    container: Option<Container>,
    #[serde(default)]
    vsock: Option<Vsock>,
    #[serde(default)]
    serial: Option<Serial>,
    #[serde(default)]
    confidential: Confidential,
    #[serde(default = "default_stop_timeout_ms")]
    stop_timeout_ms: u64,
    #[serde(default)]
    logger: Option<LoggerConfig>,
    #[serde(default)]
    metrics: Option<MetricsConfig>,

    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    balloon: Value,
    #[serde(rename = "cpu-config", default)]
    #[cfg_attr(test, schemars(skip))]
    cpu_config: Value,
    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    entropy: Value,
    #[serde(rename = "memory-hotplug", default)]
    #[cfg_attr(test, schemars(skip))]
    memory_hotplug: Value,
    #[serde(rename = "mmds-config", default)]
    #[cfg_attr(test, schemars(skip))]
    mmds_config: Value,
    #[serde(rename = "network-interfaces", default)]
    #[cfg_attr(test, schemars(skip))]
    network_interfaces: Value,
    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    pmem: Value,
}

impl TryFrom<WireDomain> for DomainConfig {
    type Error = String;

    fn try_from(wire: WireDomain) -> Result<Self, String> {
        refuse([
            ("balloon", wire.balloon, lacking::BALLOON),
            ("cpu-config", wire.cpu_config, lacking::CPU_CONFIG),
            ("entropy", wire.entropy, lacking::ENTROPY),
            ("memory-hotplug", wire.memory_hotplug, lacking::HOTPLUG),
            ("mmds-config", wire.mmds_config, lacking::MMDS),
            ("network-interfaces", wire.network_interfaces, lacking::NETWORK),
            ("pmem", wire.pmem, lacking::PMEM),
        ])?;
        let mut drives = wire.drives;
        root_first(&mut drives);
        Ok(Self {
            machine: wire.machine,
            boot: wire.boot,
            drives,
            container: wire.container,
            vsock: wire.vsock,
            serial: wire.serial.unwrap_or_default(),
            confidential: wire.confidential,
            stop_timeout_ms: wire.stop_timeout_ms,
            logger: wire.logger,
            metrics: wire.metrics,
        })
    }
}

/// Of the whole machine, `N` is a number; of a patch, a number that may be left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MachineConfig"))]
pub(crate) struct WireMachine<N> {
    vcpu_count: N,
    mem_size_mib: N,

    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    cpu_template: Value,
    /// Of Firecracker: only `None` is possible.
    #[serde(default)]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    huge_pages: Value,
    /// Of Firecracker: only false is possible.
    #[serde(default)]
    #[cfg_attr(test, schemars(with = "Option<bool>"))]
    smt: Value,
    /// Of Firecracker: only false is possible.
    #[serde(default)]
    #[cfg_attr(test, schemars(with = "Option<bool>"))]
    track_dirty_pages: Value,
}

/// A machine as it is told: with what Firecracker says of one besides, which is never otherwise here.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct WrittenMachine {
    vcpu_count: u8,
    mem_size_mib: u64,
    smt: bool,
    track_dirty_pages: bool,
    huge_pages: &'static str,
}

impl From<MachineConfig> for WrittenMachine {
    fn from(MachineConfig { vcpu_count, mem_size_mib }: MachineConfig) -> Self {
        Self { vcpu_count, mem_size_mib, smt: false, track_dirty_pages: false, huge_pages: "None" }
    }
}

impl<N> WireMachine<N> {
    /// `vcpu_count` and `mem_size_mib`, if nothing else is asked for.
    fn numbers(self) -> Result<(N, N), String> {
        refuse([
            ("machine-config.cpu_template", self.cpu_template, lacking::CPU_CONFIG),
            ("machine-config.huge_pages", self.huge_pages, lacking::HUGE_PAGES),
            ("machine-config.smt", self.smt, lacking::SMT),
            ("machine-config.track_dirty_pages", self.track_dirty_pages, lacking::DIRTY_PAGES),
        ])?;
        Ok((self.vcpu_count, self.mem_size_mib))
    }
}

impl TryFrom<WireMachine<u64>> for MachineConfig {
    type Error = String;

    fn try_from(wire: WireMachine<u64>) -> Result<Self, String> {
        let (count, mem_size_mib) = wire.numbers()?;
        let vcpu_count = vcpu_count(count).map_err(|error| error.to_string())?;
        Ok(Self { vcpu_count, mem_size_mib })
    }
}

/// A number that `u8` cannot hold is refused as any other out of the range is, by the field's name.
pub(crate) fn vcpu_count(value: u64) -> Result<u8, ConfigError> {
    u8::try_from(value).map_err(|_| {
        let (min, max) = VCPU_COUNT;
        ConfigError::OutOfRange { field: "machine-config.vcpu_count".to_owned(), value, min, max }
    })
}

impl TryFrom<WireMachine<Option<u64>>> for MachinePatch {
    type Error = String;

    fn try_from(wire: WireMachine<Option<u64>>) -> Result<Self, String> {
        let others = [&wire.cpu_template, &wire.huge_pages, &wire.smt, &wire.track_dirty_pages];
        let has_others = others.iter().any(|value| !value.is_null());
        let (vcpu_count, mem_size_mib) = wire.numbers()?;
        if (vcpu_count, mem_size_mib) == (None, None) && !has_others {
            return Err("machine-config: a patch without a field".to_owned());
        }
        Ok(Self { vcpu_count, mem_size_mib })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Drive"))]
pub(crate) struct WireDrive {
    drive_id: String,
    // Firecracker's drives with a `socket` have none, and are refused for that.
    #[cfg_attr(test, schemars(with = "PathBuf"))]
    path_on_host: Option<PathBuf>,
    #[serde(default)]
    is_root_device: bool,
    #[serde(default)]
    is_read_only: bool,
    #[serde(default)]
    cache_type: CacheType,
    #[serde(default)]
    io_engine: IoEngine,
    #[serde(default = "default_block_size")]
    block_size: u32,
    #[serde(default)]
    rate_limiter: Option<RateLimiter>,

    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    partuuid: Value,
    #[serde(default)]
    #[cfg_attr(test, schemars(skip))]
    socket: Value,
}

impl TryFrom<WireDrive> for Drive {
    type Error = String;

    fn try_from(wire: WireDrive) -> Result<Self, String> {
        refuse([
            ("drives[].partuuid", wire.partuuid, lacking::PARTUUID),
            ("drives[].socket", wire.socket, lacking::VHOST_USER),
        ])?;
        Ok(Self {
            drive_id: wire.drive_id,
            path_on_host: wire.path_on_host.ok_or("drives[].path_on_host: is missing")?,
            is_root_device: wire.is_root_device,
            is_read_only: wire.is_read_only,
            cache_type: wire.cache_type,
            io_engine: wire.io_engine,
            block_size: wire.block_size,
            rate_limiter: wire.rate_limiter,
        })
    }
}

/// Firecracker's `vsock_id` is a name that nothing reads any more.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Vsock"))]
pub(crate) struct WireVsock {
    guest_cid: u32,
    uds_path: PathBuf,
    #[serde(default, rename = "vsock_id")]
    #[cfg_attr(test, schemars(skip))]
    _vsock_id: Option<String>,
}

impl From<WireVsock> for Vsock {
    fn from(wire: WireVsock) -> Self {
        Self { guest_cid: wire.guest_cid, uds_path: wire.uds_path }
    }
}

/// A path without a mode, which is all that Firecracker's has, means mode `File`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Serial"))]
pub(crate) struct WireSerial {
    #[serde(default)]
    mode: Option<SerialMode>,
    #[serde(default)]
    serial_out_path: Option<PathBuf>,
    #[serde(default)]
    rate_limiter: Option<TokenBucket>,
}

impl From<WireSerial> for Serial {
    fn from(wire: WireSerial) -> Self {
        let implied = if wire.serial_out_path.is_some() { SerialMode::File } else { SerialMode::Stdio };
        Self {
            mode: wire.mode.unwrap_or(implied),
            serial_out_path: wire.serial_out_path,
            rate_limiter: wire.rate_limiter,
        }
    }
}

/// Refuses the first field that asks for something. Each comes with what to use instead.
fn refuse<const N: usize>(fields: [(&str, Value, &str); N]) -> Result<(), String> {
    let asked = fields.into_iter().find(|(_, value, _)| asks_for_something(value));
    asked.map_or(Ok(()), |(name, _, instead)| Err(lacking::refusal(name, instead)))
}

fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::String(text) => !text.is_empty() && text != "None",
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Number(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape of the sample file in Firecracker's documentation.
    const FIRECRACKER: &str = r#"{
        "boot-source": {"kernel_image_path": "vmlinux.bin", "boot_args": "console=ttyS0 panic=1", "initrd_path": null},
        "drives": [{"drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Unsafe",
                    "is_read_only": false, "path_on_host": "ubuntu.ext4", "io_engine": "Sync",
                    "rate_limiter": null, "socket": null}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false,
                           "huge_pages": "None"},
        "cpu-config": null, "balloon": null, "network-interfaces": [],
        "vsock": {"guest_cid": 3, "uds_path": "./v.sock", "vsock_id": "v"},
        "logger": null, "metrics": null, "mmds-config": null, "entropy": null,
        "pmem": [], "memory-hotplug": null, "serial": null
    }"#;

    #[test]
    fn a_firecracker_file_is_read_unchanged() {
        let config = DomainConfig::from_json(FIRECRACKER.as_bytes()).unwrap();
        config.validate().unwrap();
        assert_eq!(config.machine, MachineConfig { vcpu_count: 2, mem_size_mib: 1024 });
        assert_eq!(config.drives[0].cache_type, CacheType::Unsafe);
        assert_eq!(config.drives[0].io_engine, IoEngine::Sync);
        assert_eq!(config.command_line(), "console=ttyS0 panic=1 root=/dev/vda rw");
    }

    #[test]
    fn what_this_monitor_lacks_is_refused_by_name() {
        let cases = [
            ("\"smt\": false", "\"smt\": true", "machine-config.smt"),
            ("\"huge_pages\": \"None\"", "\"huge_pages\": \"2M\"", "machine-config.huge_pages"),
            ("\"balloon\": null", "\"balloon\": {\"amount_mib\": 5}", "balloon"),
            ("\"network-interfaces\": []", "\"network-interfaces\": [{}]", "network-interfaces"),
            ("\"socket\": null", "\"socket\": \"s\"", "drives[].socket"),
        ];
        for (from, to, field) in cases {
            let changed = FIRECRACKER.replace(from, to);
            assert_ne!(changed, FIRECRACKER);
            let message = DomainConfig::from_json(changed.as_bytes()).unwrap_err().to_string();
            let instead = message.strip_prefix(&format!("{field}: not supported by this monitor; "));
            assert!(instead.is_some_and(|instead| instead.len() > 10), "{message}");
        }
    }

    #[test]
    fn a_drive_of_vhost_user_is_refused_for_its_socket_and_not_for_its_lacking_file() {
        let refusal = |text: &str| serde_json::from_str::<Drive>(text).unwrap_err().to_string();
        let socket = refusal(r#"{"drive_id": "d", "is_root_device": false, "socket": "s"}"#);
        assert!(
            socket.starts_with("drives[].socket: not supported by this monitor; give a file"),
            "{socket}"
        );
        assert_eq!(refusal(r#"{"drive_id": "d"}"#), "drives[].path_on_host: is missing");
    }

    #[test]
    fn a_machine_is_written_with_all_that_firecracker_says_of_one() {
        let machine = MachineConfig { vcpu_count: 2, mem_size_mib: 64 };
        let text = serde_json::to_string(&machine).unwrap();
        let expected =
            r#"{"vcpu_count":2,"mem_size_mib":64,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#;
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), machine);
    }

    #[test]
    fn a_serial_path_alone_means_a_file() {
        let read = |text: &str| serde_json::from_str::<Serial>(text).unwrap().mode;
        assert_eq!(read(r#"{"serial_out_path": "log"}"#), SerialMode::File);
        assert_eq!(read("{}"), SerialMode::Stdio);
        assert_eq!(read(r#"{"mode": "None"}"#), SerialMode::None);
        assert_eq!(read(r#"{"rate_limiter": null}"#), SerialMode::Stdio);
    }

    #[test]
    fn a_patch_of_the_machine_has_a_field() {
        let read = serde_json::from_str::<MachinePatch>;
        for empty in ["{}", r#"{"vcpu_count": null}"#] {
            assert!(read(empty).unwrap_err().to_string().contains("a patch without a field"), "{empty}");
        }
        for text in [r#"{"smt": false}"#, r#"{"mem_size_mib": 64}"#] {
            read(text).unwrap();
        }
    }
}
