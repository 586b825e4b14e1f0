//! The configuration of one domain, as JSON. What can be checked without
//! touching the host is checked by [`DomainConfig::validate`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::confidential::{Confidential, HostData, PlatformChoice, SnpConfig};
pub use crate::container::Container;
use crate::json;
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::validate::ConfigError;
use crate::wire::{WireDomain, WireDrive, WireMachine, WireSerial, WireVsock, WrittenMachine};

/// Largest configuration that is read, bytes: 64 drives with the longest paths, twice over.
pub const MAX_CONFIG_SIZE: usize = 1 << 20;

/// The whole configuration of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WireDomain")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DomainConfig {
    /// vCPUs and memory.
    #[serde(rename = "machine-config")]
    pub machine: MachineConfig,
    /// What is started.
    #[serde(rename = "boot-source")]
    pub boot: BootSource,
    /// Block devices, in the order of their slots. A configuration that is read has the root device first, as
    /// Firecracker's has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// The container, if there is one. Its drives come behind `drives`, which are then empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The vsock device, if there is one. With a container there is one always, which the host's programs cannot reach
    /// unless it is configured here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The serial console.
    pub serial: Serial,
    /// How the domain is protected.
    pub confidential: Confidential,
    /// Milliseconds between a press of the power button and a hard stop.
    pub stop_timeout_ms: u64,
    /// Where the monitor's log goes, if that is to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<LoggerConfig>,
    /// Where the monitor's metrics go, if anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsConfig>,
}

pub(crate) fn default_stop_timeout_ms() -> u64 {
    10_000
}

impl DomainConfig {
    /// Reads a configuration. Errors name the line, and the field where there is one.
    /// [`validate`](Self::validate) is a step of its own.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        if json.len() > MAX_CONFIG_SIZE {
            return Err(ConfigError::TooLarge { size: json.len(), max: MAX_CONFIG_SIZE });
        }
        json::read(json).map_err(ConfigError::Json)
    }

    /// How many virtio devices the domain has.
    pub fn device_count(&self) -> usize {
        let of_container = self.container.as_ref().map_or(0, Container::drive_count);
        let has_vsock = self.vsock.is_some() || self.container.is_some();
        self.drives.len().saturating_add(of_container).saturating_add(usize::from(has_vsock))
    }

    /// The kernel command line that the guest gets: `boot_args` or
    /// [`DEFAULT_COMMAND_LINE`], and `root=/dev/vdX ro|rw` for the root device.
    pub fn command_line(&self) -> String {
        let line = self.boot.boot_args.as_deref().unwrap_or(DEFAULT_COMMAND_LINE);
        let Some(root) = self.root_arguments() else { return line.to_owned() };
        // What follows a lone `--` is for init, not for the kernel.
        let (kernel, init) = match line.find(" -- ") {
            Some(at) => line.split_at(at),
            None => (line, ""),
        };
        let space = if kernel.is_empty() { "" } else { " " };
        format!("{kernel}{space}{root}{init}")
    }

    /// What the root device adds to the command line, if there is one.
    pub(crate) fn root_arguments(&self) -> Option<String> {
        let (index, root) = self.drives.iter().enumerate().find(|(_, drive)| drive.is_root_device)?;
        let mode = if root.is_read_only { "ro" } else { "rw" };
        Some(format!("root=/dev/{} {mode}", block_device_name(index)))
    }
}

/// Puts the root device before the others, which keep their order: it is the guest's first disk.
pub(crate) fn root_first(drives: &mut [Drive]) {
    drives.sort_by_key(|drive| !drive.is_root_device);
}

/// The name that Linux gives to virtio block device number `index`: vda … vdz, vdaa …
pub fn block_device_name(index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = index;
    loop {
        // Below 26, so it fits.
        letters.push(char::from(b'a'.saturating_add((rest % 26) as u8)));
        if rest < 26 {
            break;
        }
        rest = (rest / 26).saturating_sub(1);
    }
    letters.push('d');
    letters.push('v');
    letters.iter().rev().collect()
}

/// vCPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WireMachine<u64>", into = "WrittenMachine")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpu_count: u8,
    /// Guest memory in MiB, 32 to 65,536.
    pub mem_size_mib: u64,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128 }
    }
}

/// What is started: a kernel, or an image with everything in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BootSource {
    /// An ELF kernel (`vmlinux`) or a bzImage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_image_path: Option<PathBuf>,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line, at most 2,048 bytes; [`DEFAULT_COMMAND_LINE`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// How an ELF kernel is entered; a bzImage always takes the 64-bit protocol, and so does an image.
    #[serde(default)]
    pub boot_protocol: BootProtocol,
    /// Who loads the kernel: see [`BootSource::mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_mode: Option<BootMode>,
    /// An image (IGVM) with kernel, initrd and command line, in place of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_path: Option<PathBuf>,
}

impl BootSource {
    /// Who loads the kernel: what was asked for, else the first stage of an image file, else the monitor.
    pub fn mode(&self) -> BootMode {
        self.boot_mode.unwrap_or(if self.image_path.is_some() { BootMode::Image } else { BootMode::Direct })
    }
}

/// Who loads the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum BootMode {
    /// The monitor, into the guest's memory.
    Direct,
    /// The first stage inside the guest, once it has verified it. Without an image file, one is composed in memory of
    /// kernel, initrd and command line.
    Image,
}

/// How an ELF kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum BootProtocol {
    /// PVH if the kernel has a note that offers it, else the 64-bit protocol.
    #[default]
    Auto,
    /// Xen's x86/HVM direct boot ABI.
    Pvh,
    /// The 64-bit entry of the Linux/x86 boot protocol.
    Linux64,
}

/// The kernel command line of a domain that is given none.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=a panic=-1 pci=off";

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WireDrive")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Drive {
    /// Name of the drive, unique in the domain; the guest reads its first 20 bytes as the serial number.
    pub drive_id: String,
    /// A raw image file or a block device.
    pub path_on_host: PathBuf,
    /// Whether `root=/dev/vdX` (and `ro` or `rw`) is added to the command line.
    pub is_root_device: bool,
    /// Whether the guest may not write.
    pub is_read_only: bool,
    /// Whether a flush of the guest reaches the disk.
    pub cache_type: CacheType,
    /// How the file is read and written.
    pub io_engine: IoEngine,
    /// Size of a logical block in bytes: 512 or 4096.
    pub block_size: u32,
    /// Limits on bandwidth and operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

pub(crate) fn default_block_size() -> u32 {
    512
}

/// Whether a flush of the guest reaches the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum CacheType {
    /// The device offers no flush; the host writes back when it likes. What a guest has synced may be lost when the
    /// host fails. Firecracker's default, and so the API's; the command line asks for `Writeback`.
    #[default]
    Unsafe,
    /// The device offers flush, which ends in `fdatasync`.
    Writeback,
}

/// How a drive's file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// io_uring where the host has it and the file is not in its memory, else `preadv` and `pwritev`. What the
    /// command line asks for.
    Auto,
    /// `preadv` and `pwritev` on the event loop. Firecracker's default, and so the API's.
    #[default]
    Sync,
    /// io_uring; refused where the host has none.
    Async,
}

/// Limits of a drive: two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket: `size` tokens refill in `refill_time` milliseconds. With a 0 for either it limits nothing, as
/// Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TokenBucket {
    /// Tokens in the full bucket.
    pub size: u64,
    /// Tokens beyond `size` at the start; they are not refilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket refills.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it limits anything.
    pub fn limits(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WireVsock")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Vsock {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// The Unix socket on which the host reaches the guest; `<uds_path>_<port>` is what the guest reaches.
    pub uds_path: PathBuf,
}

/// The serial console. With neither field it is standard input and output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WireSerial")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Serial {
    /// Where the guest's output goes.
    pub mode: SerialMode,
    /// The file of mode `File`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit on the guest's output: tokens are bytes, and what is beyond it is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

/// Where the serial console goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum SerialMode {
    /// Standard input and output of the monitor.
    #[default]
    Stdio,
    /// `serial_out_path`, created or appended to; no input.
    File,
    /// Nowhere: output is dropped, there is no input.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minimal() -> DomainConfig {
        DomainConfig::from_json(br#"{"boot-source": {"kernel_image_path": "vmlinux"}}"#).unwrap()
    }

    fn drive(id: &str) -> Drive {
        serde_json::from_value(serde_json::json!({"drive_id": id, "path_on_host": id})).unwrap()
    }

    #[test]
    fn defaults() {
        let config = minimal();
        assert_eq!(config.machine, MachineConfig { vcpu_count: 1, mem_size_mib: 128 });
        assert_eq!(config.serial, Serial::default());
        assert_eq!(config.confidential.platform, PlatformChoice::Auto);
        assert_eq!(config.stop_timeout_ms, 10_000);
        assert_eq!(config.command_line(), DEFAULT_COMMAND_LINE);
        let drive = drive("a");
        assert_eq!(
            (drive.block_size, drive.cache_type, drive.io_engine),
            (512, CacheType::Unsafe, IoEngine::Sync),
            "Firecracker's"
        );
        config.validate().unwrap();
    }

    #[test]
    fn json_round_trip() {
        let mut config = minimal();
        let text = serde_json::to_vec(&config).unwrap();
        assert_eq!(DomainConfig::from_json(&text).unwrap(), config);

        let bucket = TokenBucket { size: 5, one_time_burst: Some(6), refill_time: 7 };
        config.machine = MachineConfig { vcpu_count: 4, mem_size_mib: 256 };
        config.boot.initrd_path = Some("initrd".into());
        config.boot.boot_args = Some("quiet".into());
        config.drives = vec![drive("a"), drive("b")];
        config.drives[1].rate_limiter = Some(RateLimiter { bandwidth: Some(bucket), ops: None });
        config.drives[1].is_read_only = true;
        config.drives[1].is_root_device = true;
        config.drives[1].block_size = 4096;
        config.drives[1].cache_type = CacheType::Writeback;
        config.drives[1].io_engine = IoEngine::Async;
        config.vsock = Some(Vsock { guest_cid: 9, uds_path: "v.sock".into() });
        config.serial = Serial {
            mode: SerialMode::File,
            serial_out_path: Some("log".into()),
            rate_limiter: Some(bucket),
        };
        config.confidential.platform = PlatformChoice::Plain;
        config.stop_timeout_ms = 1;
        config.logger = Some(LoggerConfig { log_path: Some("log".into()), ..Default::default() });
        config.metrics = Some(MetricsConfig { metrics_path: "metrics".into() });
        let text = serde_json::to_vec(&config).unwrap();
        config.drives.swap(0, 1);
        assert_eq!(DomainConfig::from_json(&text).unwrap(), config, "the root device comes first");
    }

    #[test]
    fn errors_name_field_and_line() {
        let message = |text: &str| DomainConfig::from_json(text.as_bytes()).unwrap_err().to_string();
        let unknown = message("{\n\"boot-source\": {\"kernel\": 1}}");
        assert!(unknown.contains("`kernel`") && unknown.contains("kernel_image_path"), "{unknown}");
        assert!(unknown.contains("line 2"), "{unknown}");
        assert!(message("{}").contains("boot-source"));
        let many = message(r#"{"machine-config": {"vcpu_count": 256, "mem_size_mib": 64}}"#);
        assert!(many.starts_with("machine-config.vcpu_count: 256 is not between 1 and 32"), "{many}");
        assert!(message("").contains("line 1"));
        assert!(message("[]{").contains("line 1"));
        let twice = message(
            r#"{"boot-source": {"kernel_image_path": "a"}, "boot-source": {"kernel_image_path": "b"}}"#,
        );
        assert!(twice.contains("duplicate field `boot-source`"), "{twice}");
        let large = message(&" ".repeat(MAX_CONFIG_SIZE + 1));
        assert_eq!(large, "the configuration is 1048577 bytes long; at most 1048576 are read");
        assert!(message(&format!("{{\"balloon\": {}", "[".repeat(100_000))).contains("recursion"));
    }

    #[test]
    fn root_device_on_the_command_line() {
        let mut config = minimal();
        config.drives = vec![drive("a"), drive("b")];
        config.drives[1].is_root_device = true;
        config.boot.boot_args = Some("quiet".into());
        assert_eq!(config.command_line(), "quiet root=/dev/vdb rw");
        config.drives[1].is_read_only = true;
        assert_eq!(config.command_line(), "quiet root=/dev/vdb ro");
        config.boot.boot_args = Some(String::new());
        assert_eq!(config.command_line(), "root=/dev/vdb ro");
        config.boot.boot_args = Some("quiet -- single".into());
        assert_eq!(config.command_line(), "quiet root=/dev/vdb ro -- single");
    }

    #[test]
    fn block_device_names_are_those_of_linux() {
        let names: Vec<String> = [0, 25, 26, 51, 52, 63, 701, 702].map(block_device_name).into();
        assert_eq!(names, ["vda", "vdz", "vdaa", "vdaz", "vdba", "vdbl", "vdzz", "vdaaa"]);
    }

    const EVERYTHING: &str = r#"{"machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
        "boot-source": {"kernel_image_path": "k", "initrd_path": "i", "boot_args": "a", "boot_protocol": "pvh"},
        "drives": [{"drive_id": "a", "path_on_host": "d", "is_root_device": true, "is_read_only": true,
            "cache_type": "Unsafe", "io_engine": "Sync", "block_size": 4096,
            "rate_limiter": {"bandwidth": {"size": 1, "one_time_burst": 2, "refill_time": 3}}}],
        "vsock": {"guest_cid": 3, "uds_path": "v"}, "serial": {"mode": "File", "serial_out_path": "s", "rate_limiter": {"size": 4, "refill_time": 5}},
        "confidential": {"platform": "auto", "snp": {"policy": 5}}, "stop_timeout_ms": 5}"#;

    #[derive(Clone, Debug)]
    enum Change {
        Byte(usize, u8),
        Insert(usize, String),
        Cut(usize, usize),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let at = || 0..EVERYTHING.len();
        let text = prop_oneof![
            any::<u64>().prop_map(|number| number.to_string()),
            any::<f64>().prop_map(|number| format!("{number:e}")),
            (0..200_usize).prop_map(|depth| "[".repeat(depth)),
            (0..5000_usize).prop_map(|length| "x".repeat(length)),
            "[\\[\\]{}\",:0-9nulltrefas\\\\-]{1,4}",
        ];
        let change = prop_oneof![
            (at(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
            (at(), text).prop_map(|(at, text)| Change::Insert(at, text)),
            (at(), 1..20_usize).prop_map(|(at, length)| Change::Cut(at, length)),
        ];
        proptest::collection::vec(change, 0..3)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a client writes: refused in words, or something that stays the same when it is written and read
        /// again, and that is within the limits once it was found good.
        #[test]
        fn a_configuration_is_refused_or_kept(changes in changes()) {
            let mut text = EVERYTHING.as_bytes().to_vec();
            for change in changes {
                match change {
                    Change::Byte(at, byte) => text.iter_mut().skip(at).take(1).for_each(|place| *place = byte),
                    Change::Insert(at, bytes) => {
                        let at = at.min(text.len());
                        text.splice(at..at, bytes.into_bytes());
                    }
                    Change::Cut(at, length) => {
                        let at = at.min(text.len());
                        text.drain(at..(at + length).min(text.len()));
                    }
                }
            }
            match DomainConfig::from_json(&text) {
                Err(error) => prop_assert!(!error.to_string().is_empty()),
                Ok(config) => {
                    let written = serde_json::to_vec(&config).unwrap();
                    prop_assert_eq!(&DomainConfig::from_json(&written).unwrap(), &config);
                    if config.validate().is_ok() {
                        prop_assert!(config.command_line().len() <= crate::validate::MAX_COMMAND_LINE);
                        prop_assert!((1..=32).contains(&config.machine.vcpu_count));
                        prop_assert!(config.vsock.is_none_or(|vsock| vsock.guest_cid >= 3));
                    }
                }
            }
        }
    }

    #[test]
    fn the_configuration_that_is_changed_is_good() {
        DomainConfig::from_json(EVERYTHING.as_bytes()).unwrap().validate().unwrap();
    }
}
