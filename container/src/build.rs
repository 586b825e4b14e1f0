//! From a source to layers in a store and a manifest.
//!
//! ```text
//! DIR/manifest.json, image.json
//! DIR/layers            the store's folder, or a symbolic link to it
//! STORE/layers/<root hash>/layer.erofs, layer.erofs.dmverity
//! ```
//!
//! Layers are named by their root hashes, so images share those that are equal. An entry appears with all of its
//! content or not at all.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cofferdam_container_manifest::{self as manifest, Layer, MAX_LAYERS, ManifestError, Salt};

use crate::archive::{ArchiveError, read_layer};
use crate::budget::Budget;
use crate::digest::{Digest, Hashing};
use crate::erofs::{self, ErofsError};
use crate::folder::{FolderError, read_folder};
use crate::image::{self, Image, replace_file};
use crate::layer::{Reading, Warnings};
use crate::process::ProcessError;
use crate::source::{Contents, Digests, Opened, Packed, Source, SourceError};
use crate::spool::Spool;
use crate::tree::Folder;
use crate::unpack::unpack;
use crate::verity::{self, SALT, VerityWriter, Written};

/// Why nothing was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The source is refused.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layer of it is refused.
    #[error("{name}: {source}")]
    Layer {
        /// Which.
        name: String,
        /// Why.
        source: ArchiveError,
    },
    /// A folder is refused.
    #[error("{name}: {source}")]
    Folder {
        /// Which.
        name: String,
        /// Why.
        source: FolderError,
    },
    /// What is written would be read.
    #[error("{} lies in the folder that is to be read", .0.display())]
    Inside(PathBuf),
    /// There is no such file system.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The image does not say what to run.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The image says something that no manifest can.
    #[error("the image's manifest: {0}")]
    Manifest(#[from] ManifestError),
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An entry of the store is not what it was.
    #[error("{} is damaged: remove it, and build again", .0.display())]
    Damaged(PathBuf),
    /// The output names another store.
    #[error("{} is there already, and is not the store's", .0.display())]
    OtherStore(PathBuf),
}

/// Where to build, and how much.
#[derive(Debug)]
pub struct Options<'a> {
    /// The folder of the image.
    pub output: &'a Path,
    /// The folder whose `layers` has the layers, if not the image's own.
    pub store: Option<&'a Path>,
    /// Most bytes of an image when unpacked.
    pub max_unpacked: u64,
}

/// A layer that was built.
#[derive(Debug)]
pub struct Built {
    /// Its root hash and size.
    pub written: Written,
    /// Of how many layers of the source it is made.
    pub sources: usize,
    /// Whether the store had it.
    pub reused: bool,
}

/// An image that was made ready.
#[derive(Debug)]
pub struct Ready {
    /// What is kept of it, in `image.json`.
    pub image: Image,
    /// Layers, the lowest first.
    pub layers: Vec<Built>,
    /// What was left out.
    pub warnings: Warnings,
}

/// What was built.
#[derive(Debug)]
pub struct Summary {
    /// Layers, the lowest first.
    pub layers: Vec<Built>,
    /// Digest of the manifest.
    pub digest: Digest,
    /// What was left out.
    pub warnings: Warnings,
}

/// Builds layers and a manifest. `command` is what to run instead of what the image says, if it is not empty.
///
/// # Errors
/// If anything is refused or cannot be written; then there is no manifest.
pub fn build(source: &Source, options: &Options<'_>, command: &[String]) -> Result<Summary, BuildError> {
    let ready = make_layers(source, options)?;
    let bytes = manifest::encode(&ready.image.manifest(command, None)?)?;
    let Ready { layers, warnings, .. } = ready.written(options)?;
    let path = options.output.join("manifest.json");
    replace_file(&path, &bytes).map_err(|source| BuildError::Write { path, source })?;
    Ok(Summary { layers, digest: Digest::of(&bytes), warnings })
}

/// Builds layers, and writes down what manifests can be made of.
///
/// # Errors
/// If anything is refused or cannot be written; then there is no `image.json`.
pub fn make_ready(source: &Source, options: &Options<'_>) -> Result<Ready, BuildError> {
    make_layers(source, options)?.written(options)
}

impl Ready {
    /// Writes its file.
    fn written(self, options: &Options<'_>) -> Result<Self, BuildError> {
        let fail = |source| BuildError::Write { path: options.output.join(image::FILE), source };
        self.image.write(options.output).map_err(fail)?;
        Ok(self)
    }
}

fn make_layers(source: &Source, options: &Options<'_>) -> Result<Ready, BuildError> {
    let store = options.store.unwrap_or(options.output).join("layers");
    check_outside(source, &[options.output, &store])?;
    make_folder(options.output)?;
    make_folder(&store)?;
    let opened = source.open(&store, options.max_unpacked)?;
    if options.store.is_some() {
        link_store(&options.output.join("layers"), &store)?;
    }
    let mut spool =
        Spool::create(&store).map_err(|source| BuildError::Write { path: store.clone(), source })?;
    let mut warnings = Warnings::default();
    let (trees, root) = read_trees(&opened, options.max_unpacked, &mut spool, &mut warnings)?;
    let mut layers = Vec::new();
    for (tree, sources) in &trees {
        let (written, reused) = store_layer(tree, &spool, &store)?;
        layers.push(Built { written, sources: *sources, reused });
    }
    let described = layers.iter().map(|layer| Layer {
        root_hash: layer.written.root_hash,
        salt: Salt(SALT.to_vec()),
        size: layer.written.size,
    });
    let image = Image::new(described.collect(), &opened.defaults, &root, &spool);
    Ok(Ready { image, layers, warnings })
}

/// The layers that will be, each with the number of the source's layers in it, and the file system that they make.
fn read_trees(
    opened: &Opened,
    max_unpacked: u64,
    spool: &mut Spool,
    warnings: &mut Warnings,
) -> Result<(Vec<(Folder, usize)>, Folder), BuildError> {
    let budget = Budget::new(max_unpacked);
    let mut trees: Vec<(Folder, usize)> = Vec::new();
    let mut root = Folder::default();
    for packed in &opened.layers {
        let mut reading = Reading::new(&root, opened.whiteouts, &budget, warnings);
        read(packed, &mut reading, spool)?;
        let mut tree = reading.finish();
        if tree.opaque {
            trees.clear();
        }
        if trees.is_empty() {
            tree.forget_hidden();
        }
        root.put_on_top(&tree);
        let full = trees.len() == MAX_LAYERS;
        // More layers than a domain has devices for become one; the lowest, which images share, stay as they are.
        match trees.last_mut() {
            Some((top, sources)) if full => {
                top.put_on_top(&tree);
                *sources += 1;
            }
            _ => trees.push((tree, 1)),
        }
    }
    root.forget_hidden();
    Ok((trees, root))
}

/// Reads a layer.
fn read(packed: &Packed, reading: &mut Reading<'_>, spool: &mut Spool) -> Result<(), BuildError> {
    let name = || packed.name.clone();
    let refused = |source| BuildError::Layer { name: name(), source };
    match &packed.contents {
        Contents::Archive(region, digests) => {
            read_packed(region.clone(), Some(*digests), reading, spool).map_err(refused)
        }
        Contents::Stream(file) => read_packed(file, None, reading, spool).map_err(refused),
        Contents::Folder(folder) => {
            read_folder(folder, reading, spool).map_err(|source| BuildError::Folder { name: name(), source })
        }
    }
}

/// Reads a layer's archive, and compares it with its digests.
fn read_packed(
    packed: impl Read,
    digests: Option<Digests>,
    reading: &mut Reading<'_>,
    spool: &mut Spool,
) -> Result<(), ArchiveError> {
    let mut outer = Hashing::new(packed);
    let mut inner = Hashing::new(unpack(&mut outer)?);
    read_layer(&mut inner, reading, spool)?;
    let (unpacked, rest) = inner.finish()?;
    drop(rest);
    let (whole, _) = outer.finish()?;
    let Some(digests) = digests else { return Ok(()) };
    match digests.packed {
        Some(expected) if expected != whole => Err(ArchiveError::Digest { found: whole, expected }),
        _ if digests.unpacked != unpacked => {
            Err(ArchiveError::UnpackedDigest { found: unpacked, expected: digests.unpacked })
        }
        _ => Ok(()),
    }
}

/// Refuses to write below a folder that is read.
fn check_outside(source: &Source, written: &[&Path]) -> Result<(), BuildError> {
    let Source::Path(path) = source else { return Ok(()) };
    let Ok(source) = path.canonicalize() else { return Ok(()) };
    for path in written {
        let whole = std::path::absolute(path)
            .map_err(|source| BuildError::Write { path: path.to_path_buf(), source })?;
        // What is there of the path; the rest will be made.
        let existing = whole.ancestors().find_map(|part| part.canonicalize().ok());
        if source.is_dir() && existing.is_some_and(|existing| existing.starts_with(&source)) {
            return Err(BuildError::Inside(path.to_path_buf()));
        }
    }
    Ok(())
}

/// Makes the image of a layer, and puts it into the store if that does not have it.
fn store_layer(tree: &Folder, spool: &Spool, store: &Path) -> Result<(Written, bool), BuildError> {
    let image = erofs::Image::new(tree)?;
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildError::Write { path, source }
    };
    let new = Temporary::new(store).map_err(fail(store))?;
    let path = new.0.join("layer.erofs");
    let file = File::create_new(&path).map_err(fail(&path))?;
    let mut out = VerityWriter::new(&file, image.blocks());
    image.write(spool, &mut out)?;
    let written = out.finish().and_then(|written| file.sync_all().map(|()| written)).map_err(fail(&path))?;
    let metadata = new.0.join("layer.erofs.dmverity");
    fs::write(&metadata, written.metadata()).map_err(fail(&metadata))?;

    let entry = store.join(written.root_hash.to_string());
    match fs::rename(&new.0, &entry) {
        Ok(()) => Ok((written, false)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) =>
        {
            let size = fs::metadata(entry.join("layer.erofs")).map(|metadata| metadata.len()).ok();
            let text = fs::read_to_string(entry.join("layer.erofs.dmverity")).ok();
            if size != Some(verity::file_size(image.blocks())) || text != Some(written.metadata()) {
                return Err(BuildError::Damaged(entry));
            }
            Ok((written, true))
        }
        Err(source) => Err(BuildError::Write { path: entry, source }),
    }
}

/// A folder that is removed unless it was renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn new(store: &Path) -> io::Result<Self> {
        for attempt in 0..u32::MAX {
            let path = store.join(format!(".new-{}-{attempt}", std::process::id()));
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => return result.map(|()| Self(path)),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed, it is not there any more.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make_folder(path: &Path) -> Result<(), BuildError> {
    fs::create_dir_all(path).map_err(|source| BuildError::Write { path: path.to_owned(), source })
}

/// Makes `link` lead to the store's layers.
fn link_store(link: &Path, layers: &Path) -> Result<(), BuildError> {
    let fail = |source| BuildError::Write { path: link.to_owned(), source };
    let target = layers.canonicalize().map_err(fail)?;
    match symlink(&target, link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let same = link.canonicalize().is_ok_and(|existing| existing == target);
            if same { Ok(()) } else { Err(BuildError::OtherStore(link.to_owned())) }
        }
        result => result.map_err(fail),
    }
}
