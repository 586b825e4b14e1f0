//! Why a domain did not start.

use std::io;
use std::path::PathBuf;

use cofferdam_api::config::HostData;
use cofferdam_api::source::BadNumber;
use cofferdam_api::status::ExitReason;
use cofferdam_api::validate::ConfigError;
use cofferdam_confidential::host::HostError;
use cofferdam_confidential::snp::certificates::CertificatesError;
use cofferdam_confidential::{ChooseError, LaunchError};
use cofferdam_devices::rate_limiter::RateLimitError;
use cofferdam_devices::virtio::block::{BlockError, BlockFileError};
use cofferdam_devices::virtio::vsock::{BindError, VsockError};
use thiserror::Error;

use super::protection::CERTIFICATES;
use crate::api::ApiError;
use crate::arch::{VcpuSetupError, VmSetupError};
use crate::board::BoardError;
use crate::boot::BootError;
use crate::container::ContainerError;
use crate::descriptor::DescriptorError;
use crate::image::ImageError;
use crate::memory::MemoryError;
use crate::observer::ObserveError;
use crate::seccomp::SeccompError;

/// Why a domain did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Signals cannot be watched.
    #[error("signals: {0}")]
    Signals(#[source] io::Error),
    /// The configuration file cannot be read.
    #[error("--config-file {file}: {error}")]
    ConfigFile {
        /// The file, as it was given.
        file: String,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// The configuration file holds no configuration.
    #[error("--config-file {file}: {error}")]
    BadConfigFile {
        /// The file, as it was given.
        file: String,
        /// What is wrong, and where.
        #[source]
        error: ConfigError,
    },
    /// There is neither a configuration nor a socket to get one from.
    #[error("there is nothing to start: give --config-file or --api-sock, or pass a socket by LISTEN_FDS")]
    NothingToStart,
    /// The API cannot be had.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Log or metrics cannot go where they are to.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// There are no seccomp policies, or one is not in force.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The configuration is wrong in itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host cannot run domains.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The platform that is asked for cannot be had.
    #[error(transparent)]
    Choose(#[from] ChooseError),
    /// The kernel, the initrd, the command line or the size of the memory is bad.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A structure for the platform cannot be read.
    #[error("{field}: {}: {error}", path.display())]
    Structure {
        /// The field of the configuration.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        error: io::Error,
    },
    /// There are no certificates for reports of the guest.
    #[error("{CERTIFICATES}: {}: {source}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: CertificatesError,
    },
    /// The image is bad, or not for this domain.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An inherited descriptor cannot be used for what it was given.
    #[error("{field}: {source}")]
    Descriptor {
        /// The field of the configuration.
        field: String,
        /// What is wrong.
        #[source]
        source: DescriptorError,
    },
    /// What follows `fd:` is no number.
    #[error("{field}: {source}")]
    DescriptorNumber {
        /// The field of the configuration.
        field: String,
        /// What is wrong.
        #[source]
        source: BadNumber,
    },
    /// A drive cannot be used.
    #[error("drives[{index}].path_on_host: {source}")]
    Drive {
        /// Its place in the configuration.
        index: usize,
        /// What is wrong.
        #[source]
        source: BlockFileError,
    },
    /// A drive cannot be had as it is configured.
    #[error("drives[{index}]: {source}")]
    Block {
        /// Its place in the configuration.
        index: usize,
        /// What is wrong.
        #[source]
        source: BlockError,
    },
    /// A drive cannot have the limits that it is to get.
    #[error("drives[{index}].rate_limiter: {error}")]
    Limits {
        /// Its place in the configuration.
        index: usize,
        /// What is wrong.
        #[source]
        error: RateLimitError,
    },
    /// The container's manifest, or what is made for the container, cannot be had.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A drive of the container cannot be used.
    #[error("{field}: {source}")]
    ContainerDrive {
        /// The field of the configuration.
        field: String,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host's data are given, and are not those of the container.
    #[error("confidential.host_data: is not the SHA-256 of container.manifest, {0}")]
    HostData(HostData),
    /// The vsock device's socket cannot be made.
    #[error("vsock.uds_path: {0}")]
    VsockSocket(#[from] BindError),
    /// The vsock device cannot be had.
    #[error("vsock: {0}")]
    Vsock(#[from] VsockError),
    /// The console's file cannot be opened.
    #[error("{what}: {source}")]
    Console {
        /// The configuration field and the file.
        what: String,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// The host gave no memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The platform refused.
    #[error("launch refused: {0}")]
    Launch(#[from] LaunchError),
    /// A setting of the VM was refused.
    #[error(transparent)]
    Vm(#[from] VmSetupError),
    /// A vCPU's registers were refused.
    #[error(transparent)]
    Vcpu(#[from] VcpuSetupError),
    /// A device could not be put on the board.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// It was not wanted any more.
    #[error("stopped by {0} before it ran")]
    Stopped(&'static str),
    /// Something of the monitor's own failed.
    #[error("{0}: {1}")]
    Internal(&'static str, String),
}

impl StartError {
    /// What the domain's exit reason is then.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::ConfigFile { .. }
            | Self::BadConfigFile { .. }
            | Self::NothingToStart
            | Self::Api(_)
            | Self::Observe(_)
            | Self::Config(_)
            | Self::Host(_)
            | Self::Choose(_)
            | Self::Structure { .. }
            | Self::Certificates { .. }
            | Self::Boot(_)
            | Self::Image(_)
            | Self::Descriptor { .. }
            | Self::DescriptorNumber { .. }
            | Self::Drive { .. }
            | Self::Block { .. }
            | Self::Limits { .. }
            | Self::Container(_)
            | Self::ContainerDrive { .. }
            | Self::HostData(_)
            | Self::VsockSocket(_)
            | Self::Vsock(_)
            | Self::Console { .. }
            | Self::Memory(_) => ExitReason::Config,
            Self::Seccomp(
                SeccompError::Read { .. }
                | SeccompError::Compile { .. }
                | SeccompError::Missing { .. }
                | SeccompError::Unknown { .. },
            ) => ExitReason::Config,
            Self::Launch(_) => ExitReason::LaunchRefused,
            Self::Stopped(_) => ExitReason::Stopped,
            Self::Signals(_)
            | Self::Seccomp(_)
            | Self::Vm(_)
            | Self::Vcpu(_)
            | Self::Board(_)
            | Self::Internal(..) => ExitReason::MonitorError,
        }
    }
}
