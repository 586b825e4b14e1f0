//! From an image to the first instruction of the first stage.
//!
//! An image is a file, or is composed in memory of a kernel, an initrd and a command
//! line. Either way it is one walk over the same items ([`cofferdam_confidential::image`]),
//! and [`live`] is what takes them into a domain.
//!
//! Kernel, initrd and command line are not copied: the load window is a mapping of
//! their files ([`window`]). The monitor itself never looks into such a mapping, as
//! whoever may write to a file may also cut it off, and a look behind its end is
//! fatal; what the monitor needs of a file it reads with system calls. A guest that
//! looks behind the end gets an error from KVM, and ends alone.

mod error;
mod file_hash;
mod live;
mod mapped;
mod registers;
#[cfg(test)]
mod tests;
mod window;

use cofferdam_api::status::Identity;
use cofferdam_confidential::LaunchError;
use cofferdam_confidential::digest::snp::SnpMeasurement;
use cofferdam_confidential::digest::tdx::TdxMeasurement;
use cofferdam_confidential::igvm::reader::{self, Igvm};
use cofferdam_confidential::image::compose::{Blob, Composition, Options, Source, compose};
use cofferdam_confidential::image::importer::{ImagePlatform, Importer};
use cofferdam_confidential::image::inspect::hex;
use cofferdam_confidential::image::manifest::ManifestFinder;
use cofferdam_confidential::image::walk::{Selection, WalkError, walk};
use cofferdam_confidential::launch::{Launch, Populated};
use cofferdam_firmware::boot::HEAD;
use cofferdam_firmware::manifest::Manifest;
use cofferdam_firmware::parameters::Parameters;
use cofferdam_firmware::sha256;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub use self::error::{ImageError, ImportError};
pub use self::file_hash::FileHash;
pub use self::registers::NativeVcpus;
pub use self::window::LoadWindow;

use self::live::{Import, LiveImporter, Machine};
use self::mapped::MappedFile;
use crate::arch::CpuTemplate;
use crate::boot::file::ImageFile;
use crate::boot::{BootFiles, ImageSource};
use crate::start::StartError;

/// The bytes of a file that say how long its headers are.
const FIXED_HEADERS: usize = 32;
/// Most bytes of headers: those of an image that fills the load window have 10 MiB.
const MAX_HEADERS: u64 = 16 << 20;
/// What of an image is looked at beside its headers is in the pages behind them, if the image is ours.
const PRIVATE_DATA: usize = 64 << 12;

/// An image, opened and found good.
pub struct Image {
    source: Files,
    manifest: Option<Manifest>,
}

/// Where an image comes from.
enum Files {
    /// A kernel, an initrd and a command line.
    Loose { kernel: Hashed, kernel_head: Vec<u8>, initrd: Option<Hashed>, command_line: String },
    /// An image file, of which `head` is a copy of the beginning.
    Image { file: Arc<ImageFile>, head: Vec<u8>, mapping: MappedFile },
}

/// A mapped file and its hash.
struct Hashed {
    mapping: MappedFile,
    sha256: [u8; sha256::SIZE],
}

impl Hashed {
    fn new(file: &ImageFile) -> Result<Self, ImageError> {
        let failed = |reason| ImageError::File { path: file.path().to_owned(), reason };
        Ok(Self { sha256: file.sha256().map_err(failed)?, mapping: MappedFile::new(file)? })
    }

    fn blob(&self) -> Blob<'_> {
        Blob { bytes: self.mapping.bytes(), sha256: self.sha256 }
    }
}

impl Image {
    /// The image of these files, as `cofferdam image build` makes it when it is told nothing else.
    pub fn of_files(files: BootFiles) -> Result<Self, ImageError> {
        let (kernel, initrd, command_line) = files.into_parts();
        let failed = |reason| ImageError::File { path: kernel.path().to_owned(), reason };
        let source = Files::Loose {
            kernel_head: kernel.head(HEAD).map_err(failed)?,
            kernel: Hashed::new(&kernel)?,
            initrd: initrd.as_ref().map(Hashed::new).transpose()?,
            command_line,
        };
        let mut image = Self { source, manifest: None };
        image.manifest = image.composition()?.map(|composition| *composition.manifest());
        Ok(image)
    }

    /// The image in a file.
    pub fn open(source: ImageSource<'_>) -> Result<Self, ImageError> {
        let path = &source.path().to_owned();
        let failed = |reason| ImageError::File { path: path.to_owned(), reason };
        let refused = |error: String| ImageError::Refused { path: path.to_owned(), error };
        let file = ImageFile::open(source).map_err(failed)?;
        let beginning = file.head(FIXED_HEADERS).map_err(failed)?;
        let headers = reader::length_of_headers(&beginning).map_err(|error| refused(error.to_string()))?;
        if headers > MAX_HEADERS {
            return Err(refused(format!("has {headers} bytes of headers, at most {MAX_HEADERS} are read")));
        }
        let head = file.head((headers as usize).saturating_add(PRIVATE_DATA)).map_err(failed)?;
        let mapping = MappedFile::new(&file)?;
        let source = Files::Image { file: Arc::new(file), head, mapping };
        Ok(Self { source, manifest: None })
    }

    /// The platforms that it is for.
    pub fn platforms(&self) -> Result<Vec<ImagePlatform>, ImageError> {
        match &self.source {
            Files::Loose { .. } => Ok(Options::default().platforms),
            Files::Image { head, mapping, .. } => {
                let image = Igvm::with_head(head, mapping.bytes()).map_err(|error| self.refused(&error))?;
                Ok(image.platforms().iter().map(|info| info.platform).collect())
            }
        }
    }

    /// Checks what the first stage will be told of a domain of `platform`, as it will. Returns it: host data that the image
    /// does not want are for attestation reports only, where there are some.
    pub fn check(
        &mut self,
        platform: ImagePlatform,
        mut parameters: Parameters,
    ) -> Result<Parameters, ImageError> {
        if let Files::Image { file, .. } = &self.source {
            let mut finder = ManifestFinder::new();
            self.walk(platform, &mut finder).map_err(|error| self.refusal(error))?;
            let failed = |error| ImageError::Manifest { path: file.path().to_owned(), error };
            self.manifest = finder.manifest().map_err(failed)?;
        }
        if let Some(manifest) = &self.manifest {
            if !manifest.host_data && platform == ImagePlatform::Snp {
                parameters.host_data = [0; 32];
            }
            parameters.check(manifest).map_err(ImageError::Parameters)?;
        }
        Ok(parameters)
    }

    /// Checks that an image file can be opened, and keeps nothing of it.
    pub fn check_file(source: ImageSource<'_>) -> Result<(), ImageError> {
        let path = source.path().to_owned();
        ImageFile::open(source).map(drop).map_err(|reason| ImageError::File { path, reason })
    }

    /// Puts the image into the fresh memory of `launch`: what of it lies outside RAM is in the window then, and the vCPUs,
    /// to which CPUID says `cpuid`, begin as is returned, unless the platform says how.
    pub fn import(
        self,
        launch: &mut Launch<Populated>,
        cpuid: &mut CpuTemplate,
        parameters: &Parameters,
    ) -> Result<(LoadWindow, NativeVcpus), StartError> {
        let ours = self.manifest.is_some().then_some(parameters);
        let mapped = self.mapped();
        let file = match &self.source {
            Files::Image { file, .. } => Some(&**file),
            Files::Loose { .. } => None,
        };
        let platform = launch.image_platform();
        let machine = Machine { memory: parameters.memory, vcpus: parameters.vcpus };
        let mut live = LiveImporter::new(launch, machine, cpuid, &mapped, file, ours);
        let walked = self.walk(platform, &mut live);
        let Import { slots, copies, vcpus } = live.finish();
        walked.map_err(|error| match error {
            Walked::Items(WalkError::Item { at, source: ImportError::Launch(source) })
                if !source.is_of_image() =>
            {
                StartError::Launch(LaunchError::Item { at: at.to_string(), source: source.into() })
            }
            Walked::Items(WalkError::Platform { source: ImportError::Launch(source), .. })
                if !source.is_of_image() =>
            {
                StartError::Launch(source)
            }
            error => StartError::Image(self.refusal(error)),
        })?;
        for slot in &slots {
            launch.add_window(slot)?;
        }
        let slots =
            slots.iter().map(|slot| slot.guest_address..slot.guest_address.saturating_add(slot.length));
        Ok((LoadWindow::new(self, copies, slots.collect()), vcpus))
    }

    /// Where its files are mapped.
    fn mapped(&self) -> Vec<Range<usize>> {
        let mappings = match &self.source {
            Files::Loose { kernel, initrd, .. } => {
                vec![Some(&kernel.mapping), initrd.as_ref().map(|initrd| &initrd.mapping)]
            }
            Files::Image { mapping, .. } => vec![Some(mapping)],
        };
        mappings.into_iter().flatten().map(MappedFile::range).collect()
    }

    /// The mappings of its files, which are closed.
    fn into_mappings(self) -> Vec<MappedFile> {
        match self.source {
            Files::Loose { kernel, initrd, .. } => {
                [Some(kernel), initrd].into_iter().flatten().map(|file| file.mapping).collect()
            }
            Files::Image { mapping, .. } => vec![mapping],
        }
    }

    /// The hash of the image's file, which outlives the image.
    fn file_hash(&self) -> FileHash {
        match &self.source {
            Files::Image { file, .. } => FileHash::of(file.clone()),
            Files::Loose { .. } => FileHash::none(),
        }
    }

    /// What can be said of the image without launching it and without reading all of its file, for a domain with this
    /// number of vCPUs.
    pub fn identity(&self, vcpus: u8) -> Identity {
        let mut digests = BTreeMap::new();
        let mut note = |platform: ImagePlatform, digest: Option<[u8; 48]>| {
            digest.map(|digest| digests.insert(platform.name().to_owned(), hex(&digest)));
        };
        let mut snp = SnpMeasurement::new();
        let walked = self.walk(ImagePlatform::Snp, &mut snp);
        note(ImagePlatform::Snp, walked.ok().and_then(|()| snp.digest(vcpus.into()).ok()));
        let mut tdx = TdxMeasurement::new();
        note(ImagePlatform::Tdx, self.walk(ImagePlatform::Tdx, &mut tdx).ok().map(|()| tdx.mrtd()));
        let hash = |manifest: &Manifest| hex(&sha256::Method::detect().digest(&manifest.encode()));
        Identity {
            manifest_hash: self.manifest.as_ref().map(hash),
            predicted_digests: digests,
            ..Identity::default()
        }
    }

    /// The composition of loose files.
    fn composition(&self) -> Result<Option<Composition<'_>>, ImageError> {
        let Files::Loose { kernel, kernel_head, initrd, command_line } = &self.source else {
            return Ok(None);
        };
        let source = Source {
            kernel: kernel.blob(),
            kernel_head,
            initrd: initrd.as_ref().map(Hashed::blob),
            command_line,
        };
        compose(&source, &Options::default()).map(Some).map_err(ImageError::Compose)
    }

    /// Hands the items for one platform to `importer`.
    fn walk<I, E>(&self, platform: ImagePlatform, importer: &mut I) -> Result<(), Walked<E>>
    where
        I: for<'a> Importer<'a, Error = E>,
    {
        let selection = Selection::One(platform);
        match &self.source {
            Files::Loose { .. } => match self.composition().map_err(Walked::Image)? {
                Some(composition) => composition.walk(selection, importer).map_err(Walked::Items),
                None => Ok(()),
            },
            Files::Image { head, mapping, .. } => {
                let image = Igvm::with_head(head, mapping.bytes())
                    .map_err(|error| Walked::Image(self.refused(&error)))?;
                walk(&image, selection, importer).map_err(Walked::Items)
            }
        }
    }

    fn refusal<E: std::fmt::Display>(&self, error: Walked<E>) -> ImageError {
        match error {
            Walked::Image(error) => error,
            Walked::Items(error) => self.refused(&error),
        }
    }

    fn refused(&self, error: &dyn std::fmt::Display) -> ImageError {
        match &self.source {
            Files::Loose { .. } => ImageError::Composed(error.to_string()),
            Files::Image { file, .. } => {
                ImageError::Refused { path: file.path().to_owned(), error: error.to_string() }
            }
        }
    }
}

/// Why a walk ended early.
enum Walked<E> {
    /// There is no image.
    Image(ImageError),
    /// The importer, or one of its items.
    Items(WalkError<E>),
}
