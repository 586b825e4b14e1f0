//! Bodies of requests that are not part of a configuration.

use std::path::PathBuf;

use serde::Deserialize;

use crate::config::{Drive, MachineConfig, RateLimiter, TokenBucket};
use crate::validate::{ConfigError, check_id, check_range};
use crate::wire::{WireMachine, vcpu_count};

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InstanceAction {
    /// What to do.
    pub action_type: ActionType,
}

/// What `PUT /actions` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum ActionType {
    /// Starts the domain.
    InstanceStart,
    /// Presses the domain's power button.
    SendCtrlAltDel,
    /// Writes the metrics now.
    FlushMetrics,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StateChange {
    /// The state that is wanted.
    pub state: WantedState,
}

/// The states that `PATCH /vm` can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum WantedState {
    /// The vCPUs are held.
    Paused,
    /// The vCPUs run.
    Resumed,
}

/// Body of `PATCH /machine-config`: what is left out stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "WireMachine<Option<u64>>")]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(!try_from, deny_unknown_fields))]
pub struct MachinePatch {
    /// Number of vCPUs.
    pub vcpu_count: Option<u64>,
    /// Guest memory in MiB.
    pub mem_size_mib: Option<u64>,
}

impl MachinePatch {
    /// `machine` with what the patch says.
    pub fn apply(self, machine: &MachineConfig) -> Result<MachineConfig, ConfigError> {
        Ok(MachineConfig {
            vcpu_count: self.vcpu_count.map_or(Ok(machine.vcpu_count), vcpu_count)?,
            mem_size_mib: self.mem_size_mib.unwrap_or(machine.mem_size_mib),
        })
    }
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DrivePatch {
    /// Which drive.
    pub drive_id: String,
    /// Another file; or the same one, whose size has changed.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Other limits. A bucket that is left out stays; one that limits nothing takes the limit away.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl DrivePatch {
    /// `drive` with what the patch says: of the limits too, what is left out stays.
    pub fn apply(&self, drive: &Drive) -> Drive {
        let old = drive.rate_limiter.unwrap_or_default();
        let limits = self.rate_limiter.unwrap_or_default();
        let limits = RateLimiter {
            bandwidth: limits.bandwidth.or(old.bandwidth).filter(TokenBucket::limits),
            ops: limits.ops.or(old.ops).filter(TokenBucket::limits),
        };
        Drive {
            path_on_host: self.path_on_host.clone().unwrap_or_else(|| drive.path_on_host.clone()),
            rate_limiter: Some(limits).filter(|limits| *limits != RateLimiter::default()),
            ..drive.clone()
        }
    }
}

/// Body of `POST /container/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Exec {
    /// What later requests call the process: up to 64 letters, digits, `_` and `-`. The monitor finds one if it is left out.
    #[serde(default)]
    pub id: Option<String>,
    /// The command: exactly one of the manifest's `host.exec`.
    pub args: Vec<String>,
    /// Whether its standard streams are one terminal, on `stdin_port`.
    #[serde(default)]
    pub terminal: bool,
    /// Width of the terminal, characters.
    #[serde(default)]
    pub columns: u16,
    /// Height of the terminal, characters.
    #[serde(default)]
    pub rows: u16,
    /// Port of the host, as a program listens on it at `<uds_path>_<port>`, that is the process's standard input; 0: none.
    #[serde(default)]
    pub stdin_port: u32,
    /// The same for standard output.
    #[serde(default)]
    pub stdout_port: u32,
    /// The same for standard error.
    #[serde(default)]
    pub stderr_port: u32,
}

/// Body of `POST /container/kill`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Kill {
    /// The process of an exec; left out, the container's own.
    #[serde(default)]
    pub id: Option<String>,
    /// Name of the signal, as the manifest's `host.signals` has it: `TERM`.
    pub signal: String,
}

/// Body of `POST /container/resize`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Resize {
    /// The process of an exec; left out, the container's own.
    #[serde(default)]
    pub id: Option<String>,
    /// Width of its terminal, characters.
    pub columns: u16,
    /// Height of its terminal, characters.
    pub rows: u16,
}

/// Most arguments of a command.
const ARGUMENTS: (u64, u64) = (1, 4096);
/// Longest name of a signal, characters.
const SIGNAL: (u64, u64) = (1, 16);

impl Exec {
    /// Checks what needs no guest.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.id.as_deref().map_or(Ok(()), |id| check_id("id", id))?;
        check_range("args", self.args.len() as u64, ARGUMENTS)
    }
}

impl Kill {
    /// Checks what needs no guest.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.id.as_deref().map_or(Ok(()), |id| check_id("id", id))?;
        check_range("signal", self.signal.len() as u64, SIGNAL)
    }
}

impl Resize {
    /// Checks what needs no guest.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.id.as_deref().map_or(Ok(()), |id| check_id("id", id))
    }
}
