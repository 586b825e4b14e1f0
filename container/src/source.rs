//! What images are made of: OCI image layouts, and root file systems in a tar archive.
//!
//! Of an image layout everything is read by its digest, and compared with it. Files of it are opened only if they are
//! no symbolic links.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::digest::Digest;

/// Longest JSON file of a source, in bytes.
const MAX_JSON: u64 = 4 << 20;
/// Indexes may name indexes, so many deep.
const MAX_INDEXES: usize = 4;
/// Most layers of a source.
pub const MAX_SOURCE_LAYERS: usize = 512;
/// The annotation with a tag.
const TAG: &str = "org.opencontainers.image.ref.name";

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
    /// A tar archive of a root file system, packed or not.
    Archive(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(layout) = text.strip_prefix("oci:") else {
            return match text {
                "" => Err("it is oci:DIR[:TAG], or a tar archive".to_owned()),
                path => Ok(Self::Archive(path.into())),
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
    #[error("there are several images; choose one with oci:DIR:TAG: {0}")]
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
    /// Its file.
    pub file: File,
    /// Digest of the file, and of what is packed in it.
    pub digests: Option<(Digest, Digest)>,
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

#[derive(Deserialize)]
struct ImageConfig {
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
    /// Finds the layers.
    ///
    /// # Errors
    /// If the source is refused.
    pub fn open(&self) -> Result<Opened, SourceError> {
        match self {
            Self::Layout { folder, tag } => open_layout(folder, tag.as_deref()),
            Self::Archive(path) => {
                let read = |source| SourceError::Read { path: path.clone(), source };
                let file = File::open(path).map_err(read)?;
                if file.metadata().map_err(read)?.is_dir() {
                    return Err(read(io::ErrorKind::IsADirectory.into()));
                }
                let layer = Packed { name: path.display().to_string(), file, digests: None };
                Ok(Opened { layers: vec![layer], defaults: Defaults::default(), whiteouts: false })
            }
        }
    }
}

/// The digest of the image's manifest, by which the layout is addressed.
pub(crate) fn layout_digest(folder: &Path, tag: Option<&str>) -> Result<Digest, SourceError> {
    let index: Index = parse("index.json", &read_json(&folder.join("index.json"))?)?;
    Ok(choose(folder, index, tag, 0)?.digest)
}

fn open_layout(folder: &Path, tag: Option<&str>) -> Result<Opened, SourceError> {
    let manifest: ImageManifest = read_blob(folder, &layout_digest(folder, tag)?)?;
    let config: ImageConfig = read_blob(folder, &manifest.config.digest)?;
    if !config.platform.is_ours() {
        return Err(SourceError::Platform(config.platform.to_string()));
    }
    let (layers, diff_ids) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if layers != diff_ids {
        return Err(SourceError::Counts { layers, diff_ids });
    }
    if layers > MAX_SOURCE_LAYERS {
        return Err(SourceError::Layers(layers));
    }
    let packed = manifest.layers.iter().zip(config.rootfs.diff_ids).map(|(layer, diff_id)| {
        let path = blob(folder, &layer.digest);
        let file = open_file(&path).map_err(|source| SourceError::Read { path, source })?;
        Ok(Packed { name: format!("layer {}", layer.digest), file, digests: Some((layer.digest, diff_id)) })
    });
    let layers = packed.collect::<Result<_, SourceError>>()?;
    Ok(Opened { layers, defaults: config.config.unwrap_or_default(), whiteouts: true })
}

/// The manifest of the image that is meant.
fn choose(folder: &Path, index: Index, tag: Option<&str>, depth: usize) -> Result<Descriptor, SourceError> {
    if depth > MAX_INDEXES {
        return Err(SourceError::Nested);
    }
    let tags: Vec<&str> =
        index.manifests.iter().filter_map(|one| one.annotations.get(TAG)).map(String::as_str).collect();
    let tags = tags.join(", ");
    let fits = |one: &&Descriptor| {
        let tagged = tag.is_none_or(|tag| one.annotations.get(TAG).is_some_and(|own| own == tag));
        tagged && one.platform.as_ref().is_none_or(Platform::is_ours)
    };
    let mut fitting = index.manifests.iter().filter(fits);
    let Some(one) = fitting.next() else {
        return Err(SourceError::None { wanted: tag.unwrap_or("at all").to_owned(), found: tags });
    };
    if fitting.next().is_some_and(|other| other.digest != one.digest) {
        return Err(SourceError::Several(tags));
    }
    let is_index =
        one.media_type.ends_with("image.index.v1+json") || one.media_type.ends_with("manifest.list.v2+json");
    if is_index {
        return choose(folder, read_blob(folder, &one.digest)?, None, depth + 1);
    }
    Ok(one.clone())
}

fn blob(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join("blobs/sha256").join(digest.hex())
}

fn read_blob<T: DeserializeOwned>(folder: &Path, expected: &Digest) -> Result<T, SourceError> {
    let bytes = read_json(&blob(folder, expected))?;
    let what = format!("blob {expected}");
    let found = Digest::of(&bytes);
    if found != *expected {
        return Err(SourceError::Digest { what, found, expected: *expected });
    }
    parse(&what, &bytes)
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, SourceError> {
    serde_json::from_slice(bytes).map_err(|source| SourceError::Json { what: what.to_owned(), source })
}

fn read_json(path: &Path) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    let result = open_file(path).and_then(|file| file.take(MAX_JSON + 1).read_to_end(&mut bytes));
    result.map_err(|source| SourceError::Read { path: path.to_owned(), source })?;
    if bytes.len() as u64 > MAX_JSON { Err(SourceError::Long(path.to_owned())) } else { Ok(bytes) }
}

/// Opens a file of a layout, without following a symbolic link or waiting for the other end of a pipe.
fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(CWD, path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}
