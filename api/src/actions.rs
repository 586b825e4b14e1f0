//! Everything that a client can ask of a monitor, as one enum, and what the monitor answers.
//!
//! [`router`](crate::router) makes a [`VmmAction`] of a request. In the monitor two types decide what is legal
//! when: its controller before the start of the domain, and the one after. The answer is an [`ActionResult`];
//! the server makes a response of it: 204 of [`VmmData::Empty`], 200 of other data, 400 of an error.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use crate::config::{BootSource, DomainConfig, Drive, MachineConfig, Serial, Vsock};
use crate::draft::Draft;
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::requests::{DrivePatch, MachinePatch};
use crate::status::{ContainerStats, Executed, InstanceInfo, VmStatus};
use crate::validate::ConfigError;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum VmmAction {
    /// `GET /`.
    GetInstance,
    /// `GET /version`.
    GetVersion,
    /// `GET /vm/config`.
    GetConfig,
    /// `GET /machine-config`.
    GetMachine,
    /// `GET /vm`.
    GetStatus,
    /// `GET /host`.
    GetHost,
    /// `PUT /machine-config`.
    PutMachine(MachineConfig),
    /// `PATCH /machine-config`.
    PatchMachine(MachinePatch),
    /// `PUT /boot-source`.
    PutBoot(BootSource),
    /// `PUT /drives/{drive_id}`: adds the drive, or replaces the one with its id.
    PutDrive(Drive),
    /// `PATCH /drives/{drive_id}`.
    PatchDrive(DrivePatch),
    /// `PUT /vsock`.
    PutVsock(Vsock),
    /// `PUT /serial`.
    PutSerial(Serial),
    /// `PUT /logger`.
    PutLogger(LoggerConfig),
    /// `PUT /metrics`.
    PutMetrics(MetricsConfig),
    /// `GET /metrics`.
    GetMetrics,
    /// Action `FlushMetrics`.
    FlushMetrics,
    /// `PUT /vm`: replaces the whole configuration.
    PutConfig(Box<DomainConfig>),
    /// `PUT /vm?start=true`: replaces the whole configuration and starts. A configuration that does not start
    /// replaces nothing.
    StartWith(Box<DomainConfig>),
    /// Action `InstanceStart`.
    Start,
    /// Action `SendCtrlAltDel`.
    PressPowerButton,
    /// State `Paused`.
    Pause,
    /// State `Resumed`.
    Resume,
    /// `DELETE /vm`: asks for an orderly stop, and a hard one after this time, or else after that of the
    /// configuration. Asking again changes nothing, unless the time then ends earlier.
    Stop(Option<Duration>),
    /// `GET /vm/wait`: answered when the domain has stopped.
    Wait,
    /// `/container/…`: a connection for the container's init, as a program of the host makes one.
    ConnectGuest(GuestEnd),
}

/// The guest's end of a connection: a socket that is connected and does not block.
#[derive(Clone, Debug)]
pub struct GuestEnd(pub Arc<OwnedFd>);

impl PartialEq for GuestEnd {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// What the monitor answers when it has done what was asked.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum VmmData {
    /// Done, and nothing to say.
    Empty,
    /// Of `GET /`.
    Instance(InstanceInfo),
    /// Of `GET /version`.
    Version(Version),
    /// Of `GET /vm/config`.
    Config(Box<Draft>),
    /// Of `GET /machine-config`.
    Machine(MachineConfig),
    /// Of `GET /vm` and `GET /vm/wait`.
    Status(Box<VmStatus>),
    /// Of `GET /host`.
    Host(Value),
    /// Of `GET /metrics`: Prometheus text.
    Metrics(String),
    /// Of `POST /container/exec` and `GET /container/exec/{id}`.
    Executed(Executed),
    /// Of `GET /container/stats`.
    Stats(ContainerStats),
}

/// The release of Firecracker whose interface this is.
pub const FIRECRACKER_VERSION: &str = "1.16.0";

/// Which versions speak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Version {
    /// The release of Firecracker whose interface the compatible part is.
    pub firecracker_version: String,
    /// The monitor's own version.
    pub cofferdam_version: String,
}

impl Version {
    /// Those of this build.
    pub fn this() -> Self {
        Self {
            firecracker_version: FIRECRACKER_VERSION.to_owned(),
            cofferdam_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// Why an action was not done. The state is what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ActionError {
    /// It needs a running domain.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// It is for a domain that has not started.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// The domain has stopped meanwhile.
    #[error("The domain has stopped.")]
    Stopped,
    /// Clients that did not wait have left too many requests behind.
    #[error("Too many requests wait for the monitor; try again.")]
    Busy,
    /// The configuration would be wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no kernel to start.
    #[error("boot-source: is missing; `PUT /boot-source` first")]
    NoBootSource,
    /// The domain did not start.
    #[error("{0}")]
    NotStarted(String),
    /// The running domain did not do it.
    #[error("{0}")]
    Failed(String),
    /// This monitor never does it.
    #[error("{0}")]
    Unsupported(&'static str),
}

/// The answer to an action.
pub type ActionResult = Result<VmmData, ActionError>;
