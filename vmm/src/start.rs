//! Everything that can be refused before anything is started: the host, the
//! files and the sockets that the configuration names.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cofferdam_api::config::{self, BootProtocol, CacheType, DomainConfig, IoEngine, SerialMode};
use cofferdam_api::status::ExitReason;
use cofferdam_api::validate::ConfigError;
use cofferdam_confidential::LaunchError;
use cofferdam_confidential::host::{self, HostError};
use cofferdam_devices::rate_limiter::{RateLimits, TokenBucket};
use cofferdam_devices::virtio::VirtioDevice;
use cofferdam_devices::virtio::block::{
    Block, BlockError, BlockFile, BlockFileError, BlockOptions, BlockSource, Cache, Engine,
};
use cofferdam_devices::virtio::vsock::{self, BindError, SocketFile, Vsock, VsockError};
use cofferdam_firmware::layout::MIB;
use kvm_ioctls::Kvm;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tracing::warn;

use crate::api::ApiError;
use crate::arch::{VcpuSetupError, VmSetupError};
use crate::board::BoardError;
use crate::boot::{BootError, BootFiles, BootPlan, Protocol};
use crate::memory::MemoryError;
use crate::metrics::DeviceMetrics;
use crate::observer::ObserveError;

/// Where KVM is.
const KVM_DEVICE: &str = "/dev/kvm";

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
    /// The API cannot be had.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Log or metrics cannot go where they are to.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// The configuration is wrong in itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host cannot run domains.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The kernel, the initrd, the command line or the size of the memory is bad.
    #[error(transparent)]
    Boot(#[from] BootError),
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
            | Self::Api(_)
            | Self::Observe(_)
            | Self::Config(_)
            | Self::Host(_)
            | Self::Boot(_)
            | Self::Drive { .. }
            | Self::Block { .. }
            | Self::VsockSocket(_)
            | Self::Vsock(_)
            | Self::Console { .. }
            | Self::Memory(_) => ExitReason::Config,
            Self::Launch(_) => ExitReason::LaunchRefused,
            Self::Stopped(_) => ExitReason::Stopped,
            Self::Signals(_) | Self::Vm(_) | Self::Vcpu(_) | Self::Board(_) | Self::Internal(..) => {
                ExitReason::MonitorError
            }
        }
    }
}

/// Where the console's bytes come from and go to, if anywhere.
#[derive(Default)]
pub struct ConsoleFiles {
    /// What is typed.
    pub input: Option<OwnedFd>,
    /// What is printed.
    pub output: Option<OwnedFd>,
}

/// What a configuration names, opened and found good.
pub struct Resources {
    /// The host's KVM.
    pub kvm: Kvm,
    /// Where kernel and initrd go.
    pub boot: BootPlan,
    /// The drives in their order, so that the first drive is the guest's first disk, then vsock.
    pub virtio: Vec<Box<dyn VirtioDevice>>,
    /// Removes the vsock device's socket when it is dropped.
    pub vsock_file: Option<SocketFile>,
    /// Where the console goes.
    pub console: ConsoleFiles,
    /// What drives and vsock count in.
    pub metrics: DeviceMetrics,
}

impl Resources {
    /// Checks the host and opens everything.
    pub fn open(config: &DomainConfig) -> Result<Self, StartError> {
        let kvm = host::require(Path::new(KVM_DEVICE))?;
        let boot = BootFiles::open(
            &config.boot.kernel_image_path,
            config.boot.initrd_path.as_deref(),
            &config.command_line(),
            match config.boot.boot_protocol {
                BootProtocol::Auto => Protocol::Auto,
                BootProtocol::Pvh => Protocol::Pvh,
                BootProtocol::Linux64 => Protocol::Linux64,
            },
        )?
        .plan(memory_size(config))?;
        let mut virtio: Vec<Box<dyn VirtioDevice>> = Vec::new();
        let mut metrics = DeviceMetrics::default();
        for (index, drive) in config.drives.iter().enumerate() {
            let file = BlockFile::open(block_options(drive))
                .map_err(|source| StartError::Drive { index, source })?;
            let block = Block::new(file).map_err(|source| StartError::Block { index, source })?;
            metrics.drives.push((drive.drive_id.clone(), block.metrics()));
            virtio.push(Box::new(block));
        }
        let mut vsock_file = None;
        if let Some(config) = &config.vsock {
            let (listener, file) = vsock::bind(&config.uds_path)?;
            vsock_file = Some(file);
            let device = Vsock::new(config.guest_cid, listener, config.uds_path.clone())?;
            metrics.vsock = device.metrics();
            virtio.push(Box::new(device));
        }
        // Last: it may create a file, which nothing takes away again.
        let console = open_console(&config.serial)?;
        Ok(Self { kvm, boot, virtio, vsock_file, console, metrics })
    }
}

/// Raises the limit on open descriptors as far as this process may: each vsock connection is one, and the
/// limit that a login shell sets is for programs that call select(2).
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!("the limit on open descriptors stays {:?}: {error}", limit.current);
    }
}

/// Guest memory of a valid configuration, bytes.
pub fn memory_size(config: &DomainConfig) -> u64 {
    config.machine.mem_size_mib.saturating_mul(MIB)
}

fn block_options(drive: &config::Drive) -> BlockOptions {
    let bucket = |bucket: config::TokenBucket| TokenBucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: std::time::Duration::from_millis(bucket.refill_time),
    };
    let limits = drive.rate_limiter.unwrap_or_default();
    BlockOptions {
        source: BlockSource::Path(drive.path_on_host.clone()),
        read_only: drive.is_read_only,
        cache: match drive.cache_type {
            CacheType::Unsafe => Cache::Unsafe,
            CacheType::Writeback => Cache::Writeback,
        },
        engine: match drive.io_engine {
            IoEngine::Auto => Engine::Auto,
            IoEngine::Sync => Engine::Sync,
            IoEngine::Async => Engine::Async,
        },
        block_size: drive.block_size,
        id: drive.drive_id.clone(),
        limits: RateLimits { bandwidth: limits.bandwidth.map(bucket), operations: limits.ops.map(bucket) },
    }
}

fn open_console(serial: &config::Serial) -> Result<ConsoleFiles, StartError> {
    let failed = |what: String| move |source| StartError::Console { what, source };
    match (serial.mode, &serial.serial_out_path) {
        (SerialMode::None, _) => Ok(ConsoleFiles::default()),
        (SerialMode::File, Some(path)) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                // A pipe without a reader must not hold up the start, when stop signals are not served yet.
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)
                .map_err(failed(format!("serial.serial_out_path: {}", path.display())))?;
            Ok(ConsoleFiles { input: None, output: Some(file.into()) })
        }
        // Validation has refused a mode `File` without a path.
        (SerialMode::Stdio | SerialMode::File, _) => {
            let duplicate = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
            Ok(ConsoleFiles {
                input: Some(duplicate(io::stdin().as_fd()).map_err(failed("standard input".to_owned()))?),
                output: Some(duplicate(io::stdout().as_fd()).map_err(failed("standard output".to_owned()))?),
            })
        }
    }
}
