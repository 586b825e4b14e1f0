//! The configuration of one domain, as JSON. What can be checked without
//! touching the host is checked by [`DomainConfig::validate`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The whole configuration of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainConfig {
    /// vCPUs and memory.
    #[serde(rename = "machine-config", default)]
    pub machine: MachineConfig,
    /// What is started.
    #[serde(rename = "boot-source")]
    pub boot: BootSource,
    /// Block devices, in the order of their slots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// The vsock device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The serial console.
    #[serde(default)]
    pub serial: Serial,
    /// How the domain is protected.
    #[serde(default)]
    pub confidential: Confidential,
    /// Milliseconds between a press of the power button and a hard stop.
    #[serde(default = "default_stop_timeout_ms")]
    pub stop_timeout_ms: u64,
}

fn default_stop_timeout_ms() -> u64 {
    10_000
}

/// vCPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// What is started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF kernel (`vmlinux`) or a bzImage.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line, at most 2,048 bytes; [`DEFAULT_COMMAND_LINE`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// The kernel command line of a domain that is given none.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=a panic=-1";

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name of the drive, unique in the domain; the guest reads its first 20 bytes as the serial number.
    pub drive_id: String,
    /// A raw image file or a block device.
    pub path_on_host: PathBuf,
    /// Whether `root=/dev/vdX` (and `ro` or `rw`) is added to the command line.
    #[serde(default)]
    pub is_root_device: bool,
    /// Whether the guest may not write.
    #[serde(default)]
    pub is_read_only: bool,
    /// Whether a flush of the guest reaches the disk.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the file is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Size of a logical block in bytes: 512 or 4096.
    #[serde(default = "default_block_size")]
    pub block_size: u32,
    /// Limits on bandwidth and operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

fn default_block_size() -> u32 {
    512
}

/// Whether a flush of the guest reaches the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The device offers no flush; the host writes back when it likes.
    Unsafe,
    /// The device offers flush, which ends in `fdatasync`. (Firecracker's default is `Unsafe`:
    /// a file system in a domain should not lose what it synced.)
    #[default]
    Writeback,
}

/// How a drive's file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// io_uring where the host has it, else `preadv` and `pwritev`.
    #[default]
    Auto,
    /// `preadv` and `pwritev` on the event loop.
    Sync,
    /// io_uring; refused where the host has none.
    Async,
}

/// Limits of a drive: two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket: `size` tokens refill in `refill_time` milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens in the full bucket.
    pub size: u64,
    /// Tokens beyond `size` at the start; they are not refilled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket refills.
    pub refill_time: u64,
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// The Unix socket on which the host reaches the guest; `<uds_path>_<port>` is what the guest reaches.
    pub uds_path: PathBuf,
}

/// The serial console. With neither field it is standard input and output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Where the guest's output goes.
    #[serde(default)]
    pub mode: SerialMode,
    /// The file of mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
}

/// Where the serial console goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// Standard input and output of the monitor.
    #[default]
    Stdio,
    /// `serial_out_path`, created or appended to; no input.
    File,
    /// Nowhere: output is dropped, there is no input.
    None,
}

/// How the domain is protected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confidential {
    /// The platform asked for.
    #[serde(default)]
    pub platform: PlatformChoice,
}

/// The platform asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlatformChoice {
    /// The best that the host has and this monitor drives (today: plain).
    #[default]
    Auto,
    /// An ordinary virtual machine; the host can read and change everything in it.
    Plain,
}
