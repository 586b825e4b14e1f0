//! Everything that can be refused before anything is started: the host, the
//! files and the sockets that the configuration names.

mod console;
mod drives;
mod error;
mod protection;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cofferdam_api::config::{self, BootMode, BootProtocol, BootSource, Confidential, DomainConfig};
use cofferdam_api::source::Source;
use cofferdam_confidential::snp::certificates::Certificates;
use cofferdam_confidential::{Platform, choose, host};
use cofferdam_devices::virtio::VirtioDevice;
use cofferdam_devices::virtio::block::{Block, BlockFile};
use cofferdam_devices::virtio::vsock::{self, SocketFile, Vsock};
use cofferdam_firmware::layout::MIB;
use cofferdam_firmware::parameters::Parameters;
use kvm_ioctls::Kvm;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use self::console::open_console;
use self::drives::block_options;
use self::protection::{host_data, open_certificates, wanted};
use crate::boot::{BootFiles, BootPlan, ImageSource, Protocol};
use crate::container::Container;
use crate::descriptor::{DescriptorError, Inherited};
use crate::image::Image;
use crate::metrics::DeviceMetrics;

pub use self::console::{ConsoleFiles, check_serial};
pub use self::drives::{block_source, check_drive, drive_field, limit_change};
pub use self::error::StartError;

/// Where KVM is.
const KVM_DEVICE: &str = "/dev/kvm";
/// Fields, as messages name them.
const IMAGE_PATH: &str = "boot-source.image_path";
const VSOCK_PATH: &str = "vsock.uds_path";
/// Context identifier of a container's guest, if none is configured.
const CONTAINER_CID: u32 = 3;

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
    let wanted = wanted(&config.confidential, manifest_digest, inherited)?;
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
