//! What can be wrong with an image, and with an image for a domain.

use std::io;
use std::path::PathBuf;

use cofferdam_confidential::LaunchError;
use cofferdam_confidential::image::compose::ComposeError;
use cofferdam_confidential::snp::cpuid::TooManyEntries;
use cofferdam_firmware::layout::MIB;
use cofferdam_firmware::manifest::ManifestError;
use cofferdam_firmware::parameters::ParametersError;
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::boot::FileError;

/// An image that cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A kernel or initrd file.
    #[error("boot-source: {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: FileError,
    },
    /// A file cannot be mapped.
    #[error("boot-source: {}: cannot be mapped: {error}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the host answered.
        error: io::Error,
    },
    /// No image can be made of the kernel, the initrd and the command line.
    #[error("boot-source: no image can be made: {0}")]
    Compose(ComposeError),
    /// The image that was made of them cannot be imported.
    #[error("boot-source: the image in memory: {0}")]
    Composed(String),
    /// The image file cannot be used.
    #[error("boot-source.image_path: image {}: {error}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        error: String,
    },
    /// The launch manifest of the image file is one that its first stage refuses.
    #[error("boot-source.image_path: image {}: {error}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: ManifestError,
    },
    /// The image cannot be put into this domain.
    #[error("boot-source: image: {0}")]
    Import(#[from] ImportError),
    /// The image is not for a domain of this kind.
    #[error("{field}: {0}", field = field(.0))]
    Parameters(ParametersError),
}

/// The field of the configuration that the image does not take.
fn field(error: &ParametersError) -> &'static str {
    match error {
        ParametersError::Memory { .. } => "machine-config.mem_size_mib",
        ParametersError::Vcpus { .. } => "machine-config.vcpu_count",
        ParametersError::VirtioMmioSlots { .. } => "drives",
        ParametersError::HostData
        | ParametersError::Magic
        | ParametersError::Version { .. }
        | ParametersError::Flags { .. } => "boot-source",
    }
}

/// An item of an image that a domain does not take.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The platform refused it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Content that would have to be mapped and copied.
    #[error("a copy of what is to be mapped")]
    CopyOfMapping,
    /// More CPUID entries than there is room for.
    #[error(transparent)]
    CpuidPage(TooManyEntries),
    /// Pages that are neither in RAM nor where this monitor puts memory for an image.
    #[error("{length} bytes at {gpa:#x}: there is no memory in a domain of {} MiB", memory / MIB)]
    NoMemory {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        length: u64,
        /// Memory of the domain, bytes.
        memory: u64,
    },
    /// Content that is to be mapped but does not begin at a page of its file.
    #[error("{length} bytes at {gpa:#x}: too many to be copied, and not aligned to 4096 bytes in the file")]
    Unaligned {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        length: u64,
    },
    /// Guest memory could not be written.
    #[error("{gpa:#x}: {error}")]
    Write {
        /// Guest-physical address.
        gpa: u64,
        /// What guest memory said.
        error: GuestMemoryError,
    },
    /// The image file cannot be read.
    #[error(transparent)]
    File(FileError),
    /// The host gave no memory for a copy.
    #[error("{length} bytes at {gpa:#x}: {error}")]
    Copy {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        length: u64,
        /// What the host said.
        error: String,
    },
    /// A value that this monitor does not offer.
    #[error("the parameter {0} is not offered by this monitor")]
    Parameter(&'static str),
    /// A value that does not fit into its area.
    #[error("the parameter {name} at offset {offset:#x} does not fit into its area at {gpa:#x}")]
    ParameterPlace {
        /// Which one.
        name: &'static str,
        /// Guest-physical address of the area.
        gpa: u64,
        /// Offset in the area, bytes.
        offset: u32,
    },
    /// Registers for a vCPU that takes none or is not there, or a second time.
    #[error("registers for vCPU {0}, which takes none, is not there or has some")]
    Vcpu(u16),
}
