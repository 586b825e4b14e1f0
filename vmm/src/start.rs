//! Everything that can be refused before anything is started: the host, the
//! files and the sockets that the configuration names.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cofferdam_api::config::{
    self, BootMode, BootProtocol, BootSource, CacheType, Confidential, DomainConfig, Drive, HostData,
    IoEngine, SerialMode, SnpConfig,
};
use cofferdam_api::source::{BadNumber, Source};
use cofferdam_api::status::ExitReason;
use cofferdam_api::validate::ConfigError;
use cofferdam_confidential::choose::Wanted;
use cofferdam_confidential::digest::id_block::{IdAuthentication, IdBlock};
use cofferdam_confidential::host::{self, HostError};
use cofferdam_confidential::snp::SnpOptions;
use cofferdam_confidential::snp::certificates::{Certificates, CertificatesError};
use cofferdam_confidential::{ChooseError, LaunchError, Platform, choose};
use cofferdam_devices::rate_limiter::{RateLimitChange, RateLimitError, RateLimits, TokenBucket};
use cofferdam_devices::virtio::VirtioDevice;
use cofferdam_devices::virtio::block::{
    Block, BlockError, BlockFile, BlockFileError, BlockOptions, BlockSource, Cache, Engine,
};
use cofferdam_devices::virtio::vsock::{self, BindError, SocketFile, Vsock, VsockError};
use cofferdam_firmware::layout::MIB;
use cofferdam_firmware::parameters::Parameters;
use kvm_ioctls::Kvm;
use rustix::fs::{FileType, fstat};
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::termios::isatty;
use thiserror::Error;
use tracing::warn;

use crate::api::ApiError;
use crate::arch::{VcpuSetupError, VmSetupError};
use crate::board::BoardError;
use crate::boot::{BootError, BootFiles, BootPlan, ImageSource, Protocol};
use crate::container::{Container, ContainerError};
use crate::descriptor::{self, DescriptorError, Inherited};
use crate::image::{Image, ImageError};
use crate::memory::MemoryError;
use crate::metrics::DeviceMetrics;
use crate::observer::ObserveError;
use crate::seccomp::SeccompError;

/// Where KVM is.
const KVM_DEVICE: &str = "/dev/kvm";
/// Fields, as messages name them.
const IMAGE_PATH: &str = "boot-source.image_path";
const VSOCK_PATH: &str = "vsock.uds_path";
const SERIAL_PATH: &str = "serial.serial_out_path";
const CERTIFICATES: &str = "confidential.snp.certs";
/// Context identifier of a container's guest, if none is configured.
const CONTAINER_CID: u32 = 3;

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

/// Where the console's bytes come from and go to, if anywhere.
#[derive(Default)]
pub struct ConsoleFiles {
    /// What is typed.
    pub input: Option<OwnedFd>,
    /// What is printed.
    pub output: Option<OwnedFd>,
    /// How much of that there may be; tokens are bytes.
    pub limit: Option<TokenBucket>,
}

/// What is started, and by whom.
pub enum Boot {
    /// A kernel, by the monitor.
    Direct(BootPlan),
    /// What is in an image, by its first stage, which is told these parameters.
    Image(Image, Parameters),
}

/// What a configuration names, opened and found good.
pub struct Resources {
    /// The host's KVM.
    pub kvm: Kvm,
    /// What is started.
    pub boot: Boot,
    /// What protects it.
    pub platform: Box<dyn Platform>,
    /// What its guest is given with its reports.
    pub certificates: Option<Certificates>,
    /// The drives in their order, so that the first drive is the guest's first disk, then the container's, then vsock.
    pub virtio: Vec<Box<dyn VirtioDevice>>,
    /// Removes the vsock device's socket when it is dropped.
    pub vsock_file: Option<SocketFile>,
    /// Where the console goes.
    pub console: ConsoleFiles,
    /// What drives and vsock count in.
    pub metrics: DeviceMetrics,
    /// SHA-256 of the container's manifest.
    pub manifest_digest: Option<[u8; 32]>,
}

impl Resources {
    /// Checks the host and opens everything. Descriptors of `inherited` are not taken over yet.
    pub fn open(config: &DomainConfig, inherited: &mut Inherited) -> Result<Self, StartError> {
        let kvm = host::require(Path::new(KVM_DEVICE))?;
        let container = config.container.as_ref().map(|container| Container::open(container, inherited));
        let container = container.transpose()?;
        let digest = container.as_ref().map(|container| container.digest);
        let (boot, platform) = open_boot(&kvm, config, digest, inherited)?;
        let certificates = open_certificates(&config.confidential, inherited)?;
        let mut virtio: Vec<Box<dyn VirtioDevice>> = Vec::new();
        let mut metrics = DeviceMetrics::default();
        for (index, drive) in config.drives.iter().enumerate() {
            let file = BlockFile::open(block_options(index, drive, inherited)?)
                .map_err(|source| StartError::Drive { index, source })?;
            let block = Block::new(file).map_err(|source| StartError::Block { index, source })?;
            metrics.drives.push((drive.drive_id.clone(), block.metrics()));
            virtio.push(Box::new(block));
        }
        for (field, options) in container.into_iter().flat_map(|container| container.drives) {
            let id = options.id.clone();
            let refused = |source| StartError::ContainerDrive { field: field.clone(), source };
            let block = BlockFile::open(options).map_err(|error| refused(error.into()))?;
            let block = Block::new(block).map_err(|error| refused(error.into()))?;
            metrics.drives.push((id, block.metrics()));
            virtio.push(Box::new(block));
        }
        let mut vsock_file = None;
        let vsock = match &config.vsock {
            Some(config) => {
                let (listener, file) = listen(&config.uds_path, inherited)?;
                let prefix = file.is_some().then(|| config.uds_path.clone());
                vsock_file = file;
                Some(Vsock::new(config.guest_cid, Some(listener), prefix)?)
            }
            // For the monitor's own requests to the container's init.
            None if config.container.is_some() => Some(Vsock::new(CONTAINER_CID, None, None)?),
            None => None,
        };
        if let Some(device) = vsock {
            metrics.vsock = device.metrics();
            virtio.push(Box::new(device));
        }
        // Last: it may create a file, which nothing takes away again.
        let console = open_console(&config.serial, inherited)?;
        Ok(Self {
            kvm,
            boot,
            platform,
            certificates,
            virtio,
            vsock_file,
            console,
            metrics,
            manifest_digest: digest,
        })
    }
}

/// Checks that the files of `boot` are there and can be opened, and keeps nothing of them.
pub fn check_boot(boot: &BootSource) -> Result<(), StartError> {
    let mut inherited = Inherited::default();
    match &boot.image_path {
        Some(path) => Ok(Image::check_file(image(IMAGE_PATH, path, &mut inherited)?)?),
        None => Ok(BootFiles::check(kernel(boot, &mut inherited)?, initrd(boot, &mut inherited)?)?),
    }
}

fn open_boot(
    kvm: &Kvm,
    config: &DomainConfig,
    manifest_digest: Option<[u8; 32]>,
    inherited: &mut Inherited,
) -> Result<(Boot, Box<dyn Platform>), StartError> {
    let (mode, memory) = (config.boot.mode(), memory_size(config));
    let wanted = wanted(&config.confidential, manifest_digest)?;
    let mut image = if let Some(path) = &config.boot.image_path {
        Image::open(image(IMAGE_PATH, path, inherited)?)?
    } else {
        let protocol = match (mode, config.boot.boot_protocol) {
            (BootMode::Image, _) | (_, BootProtocol::Linux64) => Protocol::Linux64,
            (BootMode::Direct, BootProtocol::Auto) => Protocol::Auto,
            (BootMode::Direct, BootProtocol::Pvh) => Protocol::Pvh,
        };
        let (kernel, initrd) = (kernel(&config.boot, inherited)?, initrd(&config.boot, inherited)?);
        let plan = BootFiles::open(kernel, initrd, &config.command_line(), protocol)?.plan(memory)?;
        match mode {
            BootMode::Direct => return Ok((Boot::Direct(plan), choose(kvm, wanted, None)?)),
            BootMode::Image => Image::of_files(plan.into_files())?,
        }
    };
    let parameters = Parameters {
        memory,
        vcpus: config.machine.vcpu_count,
        virtio_mmio_slots: u8::try_from(config.device_count()).unwrap_or(u8::MAX),
        serial: true,
        // Known when CPUID is made.
        sha_instructions: false,
        host_data: wanted.snp.host_data,
    };
    let platform = choose(kvm, wanted, Some(&image.platforms()?))?;
    let parameters = image.check(platform.image_platform(), parameters)?;
    Ok((Boot::Image(image, parameters), platform))
}

/// What is asked of the platform, its files read. The digest of a container's manifest is the host's data.
fn wanted(config: &Confidential, manifest_digest: Option<[u8; 32]>) -> Result<Wanted, StartError> {
    let SnpConfig { policy, id_block, id_auth, certs } = &config.snp;
    let id = match (id_block, id_auth) {
        (Some(block), Some(authentication)) => Some(Box::new((
            IdBlock::from_bytes(&exact("confidential.snp.id_block", block)?),
            IdAuthentication::from_bytes(&exact("confidential.snp.id_auth", authentication)?),
        ))),
        _ => None,
    };
    let host_data = host_data(config, manifest_digest)?.unwrap_or_default();
    Ok(Wanted {
        platform: config.platform,
        protected: config.require_protected,
        snp: SnpOptions { policy: *policy, host_data, id, certificates: certs.is_some() },
    })
}

fn host_data(
    config: &Confidential,
    manifest_digest: Option<[u8; 32]>,
) -> Result<Option<[u8; 32]>, StartError> {
    match (config.host_data, manifest_digest) {
        (Some(HostData(given)), Some(digest)) if given != digest => {
            Err(StartError::HostData(HostData(digest)))
        }
        (given, digest) => Ok(digest.or(given.map(|data| data.0))),
    }
}

/// The certificates for reports of the guest, if there are some.
fn open_certificates(
    config: &Confidential,
    inherited: &mut Inherited,
) -> Result<Option<Certificates>, StartError> {
    let Some(path) = &config.snp.certs else { return Ok(None) };
    let failed = |source| StartError::Certificates { path: path.clone(), source };
    let file = match source(CERTIFICATES, path)? {
        // What is no file is seen by its lacking offsets, and must not hold up the start.
        Source::Path(path) => OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path),
        Source::Descriptor(fd) => Ok(inherited.readable(fd).map_err(bad_descriptor(CERTIFICATES))?),
    };
    let certificates = file.map_err(CertificatesError::from).and_then(Certificates::new);
    certificates.map(Some).map_err(failed)
}

/// The content of a file that has exactly `N` bytes.
fn exact<const N: usize>(field: &'static str, path: &Path) -> Result<[u8; N], StartError> {
    let failed = |error| StartError::Structure { field, path: path.to_owned(), error };
    let mut bytes = Vec::new();
    // One byte more shows that it is too large.
    descriptor::open(&source(field, path)?)
        .and_then(|file| file.take((N as u64).saturating_add(1)).read_to_end(&mut bytes))
        .map_err(failed)?;
    bytes.as_slice().try_into().map_err(|_| failed(io::Error::other(format!("it has not {N} bytes"))))
}

/// Checks that drive `index` can be used now, but for locks that others have on it, and keeps nothing of it.
pub fn check_drive(index: usize, drive: &Drive) -> Result<(), StartError> {
    let options = block_options(index, drive, &mut Inherited::default())?;
    BlockFile::check(options).map_err(|source| StartError::Drive { index, source })
}

/// Checks that the files of a container can be used now, but for locks that others have on them, and keeps nothing of
/// them.
pub fn check_container(container: &config::Container, protection: &Confidential) -> Result<(), StartError> {
    let container = Container::open(container, &mut Inherited::default())?;
    host_data(protection, Some(container.digest))?;
    container.drives.into_iter().try_for_each(|(field, options)| {
        BlockFile::check(options)
            .map_err(|source| StartError::ContainerDrive { field, source: source.into() })
    })
}

/// Checks the vsock device's descriptor, if it has one. A path is tried at the start only: that makes the socket.
pub fn check_vsock(vsock: &config::Vsock) -> Result<(), StartError> {
    match source(VSOCK_PATH, &vsock.uds_path)? {
        Source::Path(_) => Ok(()),
        Source::Descriptor(_) => listen(&vsock.uds_path, &mut Inherited::default()).map(drop),
    }
}

/// Checks the console's descriptor, if it has one. A path is tried at the start only: that makes the file.
pub fn check_serial(serial: &config::Serial) -> Result<(), StartError> {
    let Some(path) = &serial.serial_out_path else { return Ok(()) };
    match source(SERIAL_PATH, path)? {
        Source::Path(_) => Ok(()),
        Source::Descriptor(_) => open_serial(path, &mut Inherited::default()).map(drop),
    }
}

fn kernel<'a>(boot: &'a BootSource, inherited: &mut Inherited) -> Result<ImageSource<'a>, StartError> {
    // Validation has refused a configuration without.
    let path = boot.kernel_image_path.as_deref().unwrap_or(Path::new(""));
    image("boot-source.kernel_image_path", path, inherited)
}

fn initrd<'a>(
    boot: &'a BootSource,
    inherited: &mut Inherited,
) -> Result<Option<ImageSource<'a>>, StartError> {
    let open = |path: &'a PathBuf| image("boot-source.initrd_path", path, inherited);
    boot.initrd_path.as_ref().map(open).transpose()
}

/// The kernel, initrd, image or manifest that a field names.
pub(crate) fn image<'a>(
    field: &str,
    path: &'a Path,
    inherited: &mut Inherited,
) -> Result<ImageSource<'a>, StartError> {
    Ok(match source(field, path)? {
        Source::Path(_) => ImageSource::Path(path),
        Source::Descriptor(fd) => {
            ImageSource::File(inherited.readable(fd).map_err(bad_descriptor(field))?, path)
        }
    })
}

/// The vsock device's socket; and what removes its file, if it was made here.
fn listen(path: &Path, inherited: &mut Inherited) -> Result<(UnixListener, Option<SocketFile>), StartError> {
    match source(VSOCK_PATH, path)? {
        Source::Path(path) => {
            vsock::bind(&path).map(|(listener, file)| (listener, Some(file))).map_err(Into::into)
        }
        Source::Descriptor(fd) => {
            inherited.listener(fd).map(|listener| (listener, None)).map_err(bad_descriptor(VSOCK_PATH))
        }
    }
}

/// What a field names. Validation has refused what is wrong here.
fn source(field: &str, path: &Path) -> Result<Source, StartError> {
    Source::of(path).map_err(|source| StartError::DescriptorNumber { field: field.to_owned(), source })
}

fn bad_descriptor(field: &str) -> impl FnOnce(DescriptorError) -> StartError {
    let field = field.to_owned();
    move |source| StartError::Descriptor { field, source }
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

/// What a patch of a drive's limits asks of the limiter.
pub fn limit_change(limits: config::RateLimiter) -> RateLimitChange {
    RateLimitChange { bandwidth: limits.bandwidth.map(bucket), operations: limits.ops.map(bucket) }
}

fn bucket(bucket: config::TokenBucket) -> Option<TokenBucket> {
    bucket.limits().then(|| TokenBucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: Duration::from_millis(bucket.refill_time),
    })
}

/// The field with the file of drive `index`.
pub fn drive_field(index: usize) -> String {
    format!("drives[{index}].path_on_host")
}

/// The file, device or descriptor that a drive's `field` names.
pub fn block_source(field: &str, path: &Path, inherited: &mut Inherited) -> Result<BlockSource, StartError> {
    Ok(match source(field, path)? {
        Source::Path(path) => BlockSource::Path(path),
        Source::Descriptor(fd) => {
            let file = inherited.duplicate(fd).map_err(bad_descriptor(field))?;
            BlockSource::File(file.into(), path.to_owned())
        }
    })
}

fn block_options(index: usize, drive: &Drive, inherited: &mut Inherited) -> Result<BlockOptions, StartError> {
    let limits = drive.rate_limiter.unwrap_or_default();
    Ok(BlockOptions {
        source: block_source(&drive_field(index), &drive.path_on_host, inherited)?,
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
        limits: RateLimits {
            bandwidth: limits.bandwidth.and_then(bucket),
            operations: limits.ops.and_then(bucket),
        },
    })
}

fn open_console(serial: &config::Serial, inherited: &mut Inherited) -> Result<ConsoleFiles, StartError> {
    let files = match (serial.mode, &serial.serial_out_path) {
        (SerialMode::None, _) => ConsoleFiles::default(),
        (SerialMode::File, Some(path)) => open_serial(path, inherited)?,
        // Validation has refused a mode `File` without a path.
        (SerialMode::Stdio | SerialMode::File, _) => ConsoleFiles {
            input: Some(duplicate("standard input", io::stdin().as_fd())?),
            output: Some(duplicate("standard output", io::stdout().as_fd())?),
            limit: None,
        },
    };
    Ok(ConsoleFiles { limit: serial.rate_limiter.and_then(bucket), ..files })
}

fn open_serial(path: &Path, inherited: &mut Inherited) -> Result<ConsoleFiles, StartError> {
    let field = SERIAL_PATH;
    let fd = match source(field, path)? {
        Source::Descriptor(fd) => fd,
        Source::Path(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                // A pipe without a reader must not hold up the start, when stop signals are not served yet.
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path)
                .map_err(|source| StartError::Console {
                    what: format!("{field}: {}", path.display()),
                    source,
                })?;
            return Ok(ConsoleFiles { output: Some(file.into()), ..Default::default() });
        }
    };
    let (output, readable) = inherited.writable(fd).map_err(bad_descriptor(field))?;
    let is_socket =
        fstat(&output).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    if is_socket && socket_acceptconn(&output) != Ok(false) {
        return Err(bad_descriptor(field)(DescriptorError::NotConnected(fd)));
    }
    // What has two directions is the console's input too.
    let input = if readable && (is_socket || isatty(&output)) {
        Some(duplicate(field, output.as_fd())?)
    } else {
        None
    };
    Ok(ConsoleFiles { input, output: Some(output), limit: None })
}

fn duplicate(what: &str, fd: BorrowedFd<'_>) -> Result<OwnedFd, StartError> {
    fd.try_clone_to_owned().map_err(|source| StartError::Console { what: what.to_owned(), source })
}
