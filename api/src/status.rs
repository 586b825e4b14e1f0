//! What the monitor says of a domain: its state, why it stopped, and when each
//! phase of its launch was reached. The monitor writes one [`Event`] per line
//! to the descriptor named by `--status-file`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The platform a domain runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Platform {
    /// An ordinary virtual machine: not protected.
    Plain,
    /// AMD SEV-SNP.
    Snp,
}

/// Why a domain stopped, or why it never ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest's own checks stopped it.
    RefusedByGuest,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU shut down: a fault while delivering a double fault.
    TripleFault,
    /// KVM could not run a vCPU.
    VcpuError,
    /// The platform refused the launch.
    LaunchRefused,
    /// The monitor failed.
    MonitorError,
    /// Bad configuration or host; nothing was started.
    Config,
    /// Stopped from outside: SIGTERM or the API.
    Stopped,
}

impl ExitReason {
    /// The exit status of the monitor and of `cofferdam run`. `guest_code` is
    /// what the guest gave, and counts only when it powered itself off.
    pub fn process_exit_code(self, guest_code: Option<u8>) -> u8 {
        match self {
            Self::PowerOff => guest_code.unwrap_or(0),
            Self::RefusedByGuest => 120,
            Self::Reboot | Self::Panic => 121,
            Self::TripleFault | Self::VcpuError => 122,
            Self::LaunchRefused => 123,
            Self::MonitorError => 124,
            Self::Config => 125,
            Self::Stopped => 143,
        }
    }
}

/// Phases of a launch: name to microseconds since exec.
pub type Phases = BTreeMap<String, u64>;

/// What a domain is, in terms that can be compared with what its owner expects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Identity {
    /// SHA-256 of its image file, in hexadecimal; null if it comes from none. The file is read when this is asked for.
    pub image_hash: Option<String>,
    /// SHA-256 of the launch manifest of its image, in hexadecimal; null without an image of ours. The manifest names
    /// kernel, initrd and command line by their own hashes, from whatever files they come.
    #[serde(default)]
    pub manifest_hash: Option<String>,
    /// What the launch digest of this image is on other platforms with as many vCPUs: name of the platform to
    /// hexadecimal digits.
    #[serde(default)]
    pub predicted_digests: BTreeMap<String, String>,
    /// The launch digest of this domain, in hexadecimal; null where nothing was measured.
    pub digest: Option<String>,
    /// The guest policy that the platform enforces, in hexadecimal (`0x30000`); null where it has none.
    #[serde(default)]
    pub policy: Option<String>,
}

/// What is known of the container in a domain. Digest and protection are the monitor's own knowledge; step and failure
/// are what the guest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ContainerStatus {
    /// SHA-256 of its manifest, in hexadecimal: the domain's host data.
    pub manifest_digest: String,
    /// Whether nothing but this host's word binds that manifest to the domain, as its platform protects nothing.
    pub asserted_by_host: bool,
    /// How far the domain's init has come: `pseudo_file_systems`, `modules`, `manifest`, `layers`, `scratch`, `root`,
    /// `process`, `running`, `stopping`; null before all of these.
    pub step: Option<String>,
    /// What failed in it; null if nothing did.
    pub failure: Option<ContainerFailure>,
}

/// A failure that the init of a container's domain has reported: what the domain ended of, else the first one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ContainerFailure {
    /// In which step.
    pub step: String,
    /// Why, in one word: `verity_failure`.
    pub reason: Option<String>,
    /// Of what: `layer 2`, the first one being 0.
    pub object: Option<String>,
    /// All of it for a person: `layers: layer 2 verity failure`.
    pub message: String,
}

/// Answer of `POST /container/exec` and `GET /container/exec/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Executed {
    /// What the process is called.
    pub id: String,
    /// Its exit code, or 128 and the number of the signal that ended it; null: it runs still.
    pub exit_code: Option<u8>,
}

/// Answer of `GET /container/stats`: what the guest says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ContainerStats {
    /// Processor time of all processes, microseconds.
    pub cpu_us: u64,
    /// Memory in use, bytes.
    pub memory_bytes: u64,
    /// All memory of the guest, bytes.
    pub memory_total_bytes: u64,
    /// Processes and threads of the container.
    pub processes: u32,
    /// Requests that the manifest does not grant: what was asked for (`Exec`, `Signal` …), and how often.
    pub refused: BTreeMap<String, u64>,
}

/// How a domain ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The platform it ran on; absent when it never got one.
    pub platform: Option<Platform>,
    /// Whether the platform protected it.
    pub protected: bool,
    /// What it is.
    #[serde(flatten)]
    pub identity: Identity,
    /// The container in it; null without one.
    #[serde(default)]
    pub container: Option<Box<ContainerStatus>>,
    /// Why it stopped.
    pub exit_reason: ExitReason,
    /// The guest's exit code, if it gave one.
    pub exit_code: Option<u8>,
    /// One sentence for a person.
    pub message: String,
    /// Name of each phase to microseconds since exec.
    pub phases: Phases,
}

impl Outcome {
    /// See [`ExitReason::process_exit_code`].
    pub fn process_exit_code(&self) -> u8 {
        self.exit_reason.process_exit_code(self.exit_code)
    }
}

/// What a domain is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum VmState {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are held.
    Paused,
    /// It has ended, or was never started and now cannot be.
    Stopped,
}

/// What `GET /` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InstanceInfo {
    /// The monitor's name.
    pub app_name: String,
    /// Name of the domain.
    pub id: String,
    /// What it is doing.
    pub state: VmState,
    /// The monitor's version.
    pub vmm_version: String,
}

/// What `GET /vm` and `GET /vm/wait` say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmStatus {
    /// Name of the domain.
    pub id: String,
    /// What it is doing.
    pub state: VmState,
    /// The platform it runs on; null when it has none yet.
    pub platform: Option<Platform>,
    /// Whether the platform protects it.
    pub protected: bool,
    /// What it is.
    #[serde(flatten)]
    pub identity: Identity,
    /// The container in it; null without one.
    #[serde(default)]
    pub container: Option<Box<ContainerStatus>>,
    /// Why it stopped; null before that.
    pub exit_reason: Option<ExitReason>,
    /// The guest's exit code, if it gave one.
    pub exit_code: Option<u8>,
    /// One sentence for a person on the end.
    pub message: Option<String>,
    /// Name of each phase of the launch to microseconds since the start.
    pub phases: Phases,
}

impl VmStatus {
    /// That of domain `id`, which has stopped.
    pub fn stopped(id: &str, outcome: Outcome) -> Self {
        Self {
            id: id.to_owned(),
            state: VmState::Stopped,
            platform: outcome.platform,
            protected: outcome.protected,
            identity: outcome.identity,
            container: outcome.container,
            exit_reason: Some(outcome.exit_reason),
            exit_code: outcome.exit_code,
            message: Some(outcome.message),
            phases: outcome.phases,
        }
    }
}

/// One line of the status file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The vCPUs run.
    Running {
        /// The platform it runs on.
        platform: Platform,
        /// Whether the platform protects it.
        protected: bool,
    },
    /// Init of a container's domain has come further than before.
    Step {
        /// The step, as in [`ContainerStatus`].
        step: String,
    },
    /// The domain ended, or was refused; the last line.
    Stopped(Outcome),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exit_reason: ExitReason, exit_code: Option<u8>) -> Outcome {
        Outcome {
            platform: Some(Platform::Plain),
            protected: false,
            identity: Identity::default(),
            container: None,
            exit_reason,
            exit_code,
            message: "m".into(),
            phases: Phases::from([("user_space".into(), 7)]),
        }
    }

    fn container() -> ContainerStatus {
        ContainerStatus {
            manifest_digest: "00".into(),
            asserted_by_host: true,
            step: Some("running".into()),
            failure: Some(ContainerFailure {
                step: "running".into(),
                reason: Some("verity_failure".into()),
                object: Some("layer 2".into()),
                message: "running: layer 2 verity failure".into(),
            }),
        }
    }

    #[test]
    fn exit_codes_are_those_of_the_table() {
        use ExitReason::*;
        let table = [
            (PowerOff, None, 0),
            (PowerOff, Some(7), 7),
            (PowerOff, Some(143), 143),
            (RefusedByGuest, None, 120),
            (Reboot, Some(7), 121),
            (Panic, None, 121),
            (TripleFault, None, 122),
            (VcpuError, None, 122),
            (LaunchRefused, None, 123),
            (MonitorError, Some(7), 124),
            (Config, None, 125),
            (Stopped, Some(7), 143),
        ];
        for (reason, guest, code) in table {
            assert_eq!(outcome(reason, guest).process_exit_code(), code, "{reason:?} {guest:?}");
        }
    }

    #[test]
    fn outcome_has_exactly_the_documented_fields() {
        let text = serde_json::to_string(&outcome(ExitReason::PowerOff, None)).unwrap();
        assert_eq!(
            text,
            r#"{"platform":"plain","protected":false,"image_hash":null,"manifest_hash":null,"predicted_digests":{},"digest":null,"policy":null,"container":null,"exit_reason":"power_off","exit_code":null,"message":"m","phases":{"user_space":7}}"#
        );
    }

    #[test]
    fn events_round_trip() {
        let events = [
            Event::Running { platform: Platform::Plain, protected: false },
            Event::Step { step: "layers".into() },
            Event::Stopped(Outcome {
                container: Some(container().into()),
                ..outcome(ExitReason::Stopped, Some(3))
            }),
        ];
        for event in events {
            let text = serde_json::to_string(&event).unwrap();
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
        }
        assert!(serde_json::from_str::<Event>(r#"{"event":"stopped"}"#).is_err());
    }
}
