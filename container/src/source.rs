//! What images are made of: OCI image layouts, archives of saved images ([`docker`]), and root file systems, in a folder or
//! a tar archive.
//!
//! Of an image layout everything is read by its digest, and compared with it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::archive::ArchiveError;
use crate::digest::Digest;
use crate::docker;
use crate::files::{Files, MAX_JSON};
use crate::region::Region;

/// Indexes may name indexes, so many deep.
const MAX_INDEXES: usize = 4;
/// Most layers of a source.
pub const MAX_SOURCE_LAYERS: usize = 512;
/// The annotation with a tag.
const TAG: &str = "org.opencontainers.image.ref.name";
/// The annotation with a whole name, by containerd and Docker.
const NAME: &str = "io.containerd.image.name";

/// Where an image comes from, as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `oci:DIR[:TAG]`.
    Layout {
        /// The folder of the layout.
        folder: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:NAME]`.
    Saved {
        /// The archive.
        file: PathBuf,
        /// Which of its images.
        name: Option<String>,
    },
    /// A folder or a tar archive with a root file system, or an archive of a saved image.
    Path(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(saved) = text.strip_prefix("docker-archive:") {
            let (file, name) =
                saved.split_once(':').map_or((saved, None), |(file, name)| (file, Some(name.to_owned())));
            if file.is_empty() || name.as_ref().is_some_and(String::is_empty) {
                return Err("it is docker-archive:FILE or docker-archive:FILE:NAME".to_owned());
            }
            return Ok(Self::Saved { file: file.into(), name });
        }
        let Some(layout) = text.strip_prefix("oci:") else {
            return match text {
                "" => {
                    Err("it is oci:DIR[:TAG], docker-archive:FILE[:NAME], a folder or a tar archive"
                        .to_owned())
                }
                path => Ok(Self::Path(path.into())),
            };
        };
        let (folder, tag) = match layout.rsplit_once(':') {
            // A colon before a slash is one of the path.
            Some((folder, tag)) if !tag.contains('/') => (folder, Some(tag.to_owned())),
            _ => (layout, None),
        };
        if folder.is_empty() || tag.as_ref().is_some_and(String::is_empty) {
            return Err("it is oci:DIR or oci:DIR:TAG".to_owned());
        }
        Ok(Self::Layout { folder: folder.into(), tag })
    }
}

/// Why a source is refused.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A JSON file is longer than any image needs.
    #[error("{} has more than {MAX_JSON} bytes", .0.display())]
    Long(PathBuf),
    /// An archive of images is refused.
    #[error("{}: {source}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: ArchiveError,
    },
    /// It is no archive of images.
    #[error("{} has no image in it: neither manifest.json nor index.json, or other files too", .0.display())]
    NoImage(PathBuf),
    /// What an image is made of is not there.
    #[error("{} has no file {name:?}", path.display())]
    NotInArchive {
        /// The archive.
        path: PathBuf,
        /// What is missing.
        name: String,
    },
    /// Not as long as its descriptor says.
    #[error("blob {digest} has {found} bytes, not {expected}")]
    Size {
        /// Of what.
        digest: Digest,
        /// What it has.
        found: u64,
        /// What it should have.
        expected: u64,
    },
    /// Not what its digest says.
    #[error("{what} does not match its digest: it is {found}, not {expected}")]
    Digest {
        /// Of what.
        what: String,
        /// What it is.
        found: Digest,
        /// What it should be.
        expected: Digest,
    },
    /// Not of the format.
    #[error("{what}: {source}")]
    Json {
        /// Of what.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// No such image.
    #[error("there is no image {wanted} for amd64 and linux; there are: {found}")]
    None {
        /// What was looked for.
        wanted: String,
        /// The tags that there are.
        found: String,
    },
    /// Several images, and no tag that chooses one.
    #[error("there are several images; choose one with oci:DIR:TAG or docker-archive:FILE:NAME: {0}")]
    Several(String),
    /// For another machine.
    #[error("the image is for {0}, not for amd64 and linux")]
    Platform(String),
    /// Indexes name each other.
    #[error("indexes name indexes more than {MAX_INDEXES} deep")]
    Nested,
    /// Layers and their digests do not go together.
    #[error("the image has {layers} layers and {diff_ids} digests of unpacked layers")]
    Counts {
        /// Layers.
        layers: usize,
        /// Digests.
        diff_ids: usize,
    },
    /// Too many layers.
    #[error("the image has {0} layers; at most {MAX_SOURCE_LAYERS} are possible")]
    Layers(usize),
}

/// A layer of a source.
#[derive(Debug)]
pub struct Packed {
    /// What messages call it.
    pub name: String,
    /// Where it is.
    pub contents: Contents,
}

/// Where the names and files of a layer are.
#[derive(Debug)]
pub enum Contents {
    /// In a tar archive, packed or not, with its digest and that of what is packed in it, as far as they are known.
    Archive(Region, Digests),
    /// In a tar archive that may be a pipe.
    Stream(File),
    /// In a folder.
    Folder(OwnedFd),
}

/// What a layer's archive must be.
#[derive(Clone, Copy, Debug)]
pub struct Digests {
    /// Digest of the file.
    pub packed: Option<Digest>,
    /// Digest of what is packed in it.
    pub unpacked: Digest,
}

/// What an image says of its process (`config` of an OCI image configuration).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Defaults {
    /// Environment.
    pub env: Option<Vec<String>>,
    /// First arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Further arguments.
    pub cmd: Option<Vec<String>>,
    /// Working directory.
    pub working_dir: String,
    /// User and group, by names or numbers.
    pub user: String,
    /// Signal of an orderly stop.
    pub stop_signal: Option<String>,
}

/// A source that was opened.
#[derive(Debug)]
pub struct Opened {
    /// Layers, the lowest first.
    pub layers: Vec<Packed>,
    /// What it says of its process.
    pub defaults: Defaults,
    /// Whether names that begin with `.wh.` are whiteouts.
    pub whiteouts: bool,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: Option<u64>,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.architecture == "amd64" && self.os == "linux"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {}", self.architecture, self.os)
    }
}

#[derive(Deserialize)]
struct ImageManifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// What an image says of itself.
#[derive(Deserialize)]
pub(crate) struct ImageConfig {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<Defaults>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

impl Source {
    /// Finds the layers. An archive of images that is packed is unpacked in `scratch`, to at most `max_unpacked` bytes.
    ///
    /// # Errors
    /// If the source is refused.
    pub fn open(&self, scratch: &Path, max_unpacked: u64) -> Result<Opened, SourceError> {
        match self {
            Self::Layout { folder, tag } => open_layout(&Files::Folder(folder.clone()), tag.as_deref()),
            Self::Saved { file, name } => {
                let opened =
                    File::open(file).map_err(|source| SourceError::Read { path: file.clone(), source })?;
                let files = docker::files(file, opened, scratch, max_unpacked)?;
                open_saved(&files.ok_or_else(|| SourceError::NoImage(file.clone()))?, name.as_deref())
            }
            Self::Path(path) => open_path(path, scratch, max_unpacked),
        }
    }
}

fn open_path(path: &Path, scratch: &Path, max_unpacked: u64) -> Result<Opened, SourceError> {
    let read = |source| SourceError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    let contents = if metadata.is_dir() {
        Contents::Folder(file.into())
    } else {
        // A pipe can be read only once.
        if metadata.is_file() {
            let file = file.try_clone().map_err(read)?;
            if let Some(files) = docker::files(path, file, scratch, max_unpacked)? {
                return open_saved(&files, None);
            }
        }
        Contents::Stream(file)
    };
    let layer = Packed { name: path.display().to_string(), contents };
    Ok(Opened { layers: vec![layer], defaults: Defaults::default(), whiteouts: false })
}

/// An archive may have both forms; that of OCI says more.
fn open_saved(files: &Files, name: Option<&str>) -> Result<Opened, SourceError> {
    if files.has("index.json") { open_layout(files, name) } else { docker::open(files, name) }
}

/// The digest of the image's manifest, by which the layout is addressed.
pub(crate) fn layout_digest(folder: &Path, tag: Option<&str>) -> Result<Digest, SourceError> {
    Ok(find(&Files::Folder(folder.to_owned()), tag)?.digest)
}

/// The manifest of the image that is meant.
fn find(files: &Files, tag: Option<&str>) -> Result<Descriptor, SourceError> {
    choose(files, parse("index.json", &files.read("index.json")?)?, tag, 0)
}

fn open_layout(files: &Files, tag: Option<&str>) -> Result<Opened, SourceError> {
    let manifest: ImageManifest = read_blob(files, &find(files, tag)?)?;
    let config = read_blob(files, &manifest.config)?;
    if manifest.layers.len() > MAX_SOURCE_LAYERS {
        return Err(SourceError::Layers(manifest.layers.len()));
    }
    for layer in &manifest.layers {
        layer.check_size(files.open(&blob(&layer.digest))?.size())?;
    }
    let layers = manifest.layers.iter().map(|layer| (blob(&layer.digest), Some(layer.digest)));
    opened(files, config, layers.collect())
}

/// The image of a configuration, and layers with their digests, if they are known.
pub(crate) fn opened(
    files: &Files,
    config: ImageConfig,
    layers: Vec<(String, Option<Digest>)>,
) -> Result<Opened, SourceError> {
    if !config.platform.is_ours() {
        return Err(SourceError::Platform(config.platform.to_string()));
    }
    let (count, diff_ids) = (layers.len(), config.rootfs.diff_ids.len());
    if count != diff_ids {
        return Err(SourceError::Counts { layers: count, diff_ids });
    }
    if count > MAX_SOURCE_LAYERS {
        return Err(SourceError::Layers(count));
    }
    let packed = layers.into_iter().zip(config.rootfs.diff_ids).map(|((name, packed), unpacked)| {
        let contents = Contents::Archive(files.open(&name)?, Digests { packed, unpacked });
        let name = packed.map_or(format!("layer {name}"), |digest| format!("layer {digest}"));
        Ok(Packed { name, contents })
    });
    let layers = packed.collect::<Result<_, SourceError>>()?;
    Ok(Opened { layers, defaults: config.config.unwrap_or_default(), whiteouts: true })
}

/// The same of an index that one names.
fn choose(files: &Files, index: Index, tag: Option<&str>, depth: usize) -> Result<Descriptor, SourceError> {
    if depth > MAX_INDEXES {
        return Err(SourceError::Nested);
    }
    let names: Vec<&str> = index.manifests.iter().filter_map(Descriptor::name).collect();
    let names = names.join(", ");
    let fits = |one: &&Descriptor| {
        tag.is_none_or(|tag| one.is_named(tag)) && one.platform.as_ref().is_none_or(Platform::is_ours)
    };
    let mut fitting = index.manifests.iter().filter(fits);
    let Some(one) = fitting.next() else {
        return Err(SourceError::None { wanted: tag.unwrap_or("at all").to_owned(), found: names });
    };
    if fitting.next().is_some_and(|other| other.digest != one.digest) {
        return Err(SourceError::Several(names));
    }
    let is_index =
        one.media_type.ends_with("image.index.v1+json") || one.media_type.ends_with("manifest.list.v2+json");
    if is_index {
        return choose(files, read_blob(files, one)?, None, depth + 1);
    }
    Ok(one.clone())
}

impl Descriptor {
    /// What people call it.
    fn name(&self) -> Option<&str> {
        self.annotations.get(NAME).or_else(|| self.annotations.get(TAG)).map(String::as_str)
    }

    fn is_named(&self, name: &str) -> bool {
        self.annotations.get(TAG).is_some_and(|own| own == name)
            || self.annotations.get(NAME).is_some_and(|own| same_name(own, name))
    }

    fn check_size(&self, found: u64) -> Result<(), SourceError> {
        match self.size {
            Some(expected) if expected != found => {
                Err(SourceError::Size { digest: self.digest, found, expected })
            }
            _ => Ok(()),
        }
    }
}

/// Whether two names of images, written out or not, are the same: `debian`, `debian:latest`, `docker.io/library/debian:latest`.
pub(crate) fn same_name(one: &str, other: &str) -> bool {
    let plain = |name: &str| {
        let name = name.strip_prefix("docker.io/").unwrap_or(name);
        let name = name.strip_prefix("library/").unwrap_or(name);
        let tagged = name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']));
        if tagged { name.to_owned() } else { format!("{name}:latest") }
    };
    plain(one) == plain(other)
}

fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn read_blob<T: DeserializeOwned>(files: &Files, descriptor: &Descriptor) -> Result<T, SourceError> {
    let expected = descriptor.digest;
    let bytes = files.read(&blob(&expected))?;
    descriptor.check_size(bytes.len() as u64)?;
    let what = format!("blob {expected}");
    let found = Digest::of(&bytes);
    if found != expected {
        return Err(SourceError::Digest { what, found, expected });
    }
    parse(&what, &bytes)
}

pub(crate) fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, SourceError> {
    serde_json::from_slice(bytes).map_err(|source| SourceError::Json { what: what.to_owned(), source })
}
