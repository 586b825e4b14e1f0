//! Where the layers of a container are, and what its manifest is made of: a folder that `cofferdam container build`
//! has made, or a source that is built on its first use.
//!
//! ```text
//! STORE/layers/<root hash>/…     shared by all images
//! STORE/images/<identity>/       one source as it was: image.json, a link to the layers
//! ```
//!
//! The identity of a source changes with it, so what is found for an identity is never out of date. Two first uses at
//! a time lock the folder; the second finds what the first has built.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use cofferdam_container::build::{BuildError, Options, make_ready};
use cofferdam_container::image::{Image, ImageError};
use cofferdam_container::source::{Source, SourceError};
use cofferdam_container::verity;
use cofferdam_container_manifest::{BLOCK, DecodeError, MAX_BYTES, Manifest, Mount, RootHash, decode};
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;
use thiserror::Error;

use crate::say::{Tone, say};
use crate::waiting::Waiting;

/// Most bytes of an image when unpacked, as of `container build`.
pub const MAX_UNPACKED: u64 = 32 << 30;
const MANIFEST: &str = "manifest.json";
const LAYERS: &str = "layers";

/// Why a container cannot be had.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Neither a folder of ours nor a source.
    #[error("--container: {0}")]
    Name(String),
    /// The manifest is refused.
    #[error("{}: {source}", path.display())]
    Manifest {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: DecodeError,
    },
    /// What is kept of the image is refused.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The source is refused.
    #[error("--container: {0}")]
    Source(#[from] SourceError),
    /// The source cannot be built.
    #[error("--container: {0}")]
    Build(#[from] BuildError),
    /// There is no home to have a store in.
    #[error("--store: there is no default without $HOME; name a folder")]
    NoHome,
    /// The host refused something.
    #[error("cannot {what} {}: {error}", path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the host answered.
        error: io::Error,
    },
    /// A layer or volume is missing, or cut off.
    #[error("{}: {problem}; {of} names it", path.display())]
    Blob {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// The field that names it.
        of: String,
    },
}

/// A container that was found.
#[derive(Debug)]
pub struct Stored {
    /// The manifest that is there, if there is one.
    pub manifest: Option<Manifest>,
    /// What is kept of its image, if that is there.
    pub image: Option<Image>,
    /// The folder of its layers.
    pub layers: PathBuf,
}

/// Finds the container that `--container` names, and builds it if it is a source that is not in the store.
///
/// # Errors
/// If it is not there, or is refused.
pub fn find(name: &str, store: Option<&Path>) -> Result<Stored, StoreError> {
    let folder = Path::new(name);
    if folder.join(MANIFEST).is_file() && folder.join(LAYERS).is_dir() {
        return Ok(Stored {
            manifest: Some(read_manifest(&folder.join(MANIFEST))?),
            image: Image::read(folder)?,
            layers: folder.join(LAYERS),
        });
    }
    let source: Source = name.parse().map_err(StoreError::Name)?;
    let store = store.map(Path::to_owned).or_else(data_folder).ok_or(StoreError::NoHome)?;
    let folder = store.join("images").join(source.identity()?.hex());
    let image = match usable(&folder)? {
        Some(image) => image,
        None => build(&source, &folder, &store)?,
    };
    Ok(Stored { manifest: None, image: Some(image), layers: folder.join(LAYERS) })
}

/// Reads a manifest.
///
/// # Errors
/// If it cannot be read, or is none.
pub fn read_manifest(path: &Path) -> Result<Manifest, StoreError> {
    let failed = |error| StoreError::Host { what: "read", path: path.to_owned(), error };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    io::Read::read_to_end(&mut io::Read::take(file, MAX_BYTES as u64 + 1), &mut bytes).map_err(failed)?;
    decode(&bytes).map_err(|source| StoreError::Manifest { path: path.to_owned(), source })
}

/// The folder where what belongs to a user is kept: `$XDG_DATA_HOME/cofferdam`, by default below `~/.local/share`.
pub fn data_folder() -> Option<PathBuf> {
    data_folder_with(|name| env::var_os(name))
}

fn data_folder_with(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))?;
    Some(data.join("cofferdam"))
}

impl Stored {
    /// The files of the layers of `manifest`, the lowest first, and those of its data volumes.
    ///
    /// # Errors
    /// If one is missing, or has another size than the manifest says.
    pub fn files(&self, manifest: &Manifest) -> Result<(Vec<PathBuf>, Vec<PathBuf>), StoreError> {
        let layers = manifest
            .layers
            .iter()
            .enumerate()
            .map(|(index, layer)| self.file(&layer.root_hash, layer.size, || format!("layers[{index}]")));
        let volumes = manifest.mounts.iter().enumerate().filter_map(|(index, mount)| match mount {
            Mount::Data(volume) => {
                Some(self.file(&volume.root_hash, volume.size, || format!("mounts[{index}]")))
            }
            Mount::Scratch(_) | Mount::Tmpfs(_) => None,
        });
        Ok((layers.collect::<Result<_, _>>()?, volumes.collect::<Result<_, _>>()?))
    }

    fn file(&self, hash: &RootHash, size: u64, of: impl Fn() -> String) -> Result<PathBuf, StoreError> {
        let path = self.layers.join(hash.to_string()).join("layer.erofs");
        let path = std::path::absolute(&path).unwrap_or(path);
        let blob = |problem: String| StoreError::Blob { path: path.clone(), problem, of: of() };
        let found = fs::metadata(&path).map_err(|error| blob(error.to_string()))?.len();
        let expected = verity::file_size(size / BLOCK);
        if found == expected { Ok(path) } else { Err(blob(format!("it has {found} bytes, not {expected}"))) }
    }
}

/// The image in a folder of the store, if all of it is there.
fn usable(folder: &Path) -> Result<Option<Image>, StoreError> {
    let Some(image) = Image::read(folder)? else { return Ok(None) };
    let entry = |hash: &RootHash| folder.join(LAYERS).join(hash.to_string()).join("layer.erofs");
    // Somebody may have made room in the store.
    Ok(image.layers.iter().all(|layer| entry(&layer.root_hash).exists()).then_some(image))
}

fn build(source: &Source, folder: &Path, store: &Path) -> Result<Image, StoreError> {
    let failed = |what| {
        let path = folder.to_owned();
        move |error: io::Error| StoreError::Host { what, path, error }
    };
    fs::create_dir_all(folder).map_err(failed("make"))?;
    let lock = File::open(folder).map_err(failed("open"))?;
    let line = Waiting::new("building the container's layers");
    retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))
        .map_err(|error| failed("lock")(error.into()))?;
    if let Some(image) = usable(folder)? {
        return Ok(image);
    }
    let options = Options { output: folder, store: Some(store), max_unpacked: MAX_UNPACKED };
    let ready = make_ready(source, &options)?;
    drop(line);
    for warning in &ready.warnings.shown {
        say(Tone::Warning, warning, false);
    }
    Ok(ready.image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_container::build::build as build_container;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    /// A tar archive of a root file system with one file.
    fn archive(place: &Path, content: &str) -> String {
        let root = place.join("root");
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("hello"), content).unwrap();
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&root).arg("-cf").arg(place.join("root.tar")).arg(".");
        assert!(tar.status().unwrap().success());
        place.join("root.tar").to_str().unwrap().to_owned()
    }

    #[test]
    fn a_source_is_built_once_until_it_changes() {
        let place = tempfile::tempdir().unwrap();
        let store = place.path().join("store");
        let source = archive(place.path(), "1");
        let first = find(&source, Some(&store)).unwrap();
        let image = first.image.clone().unwrap();
        let manifest = image.manifest(&["/hello".to_owned()], None).unwrap();
        let (layers, volumes) = first.files(&manifest).unwrap();
        assert!(first.manifest.is_none() && volumes.is_empty());
        let inode = fs::metadata(&layers[0]).unwrap().ino();
        let written = fs::metadata(first.layers.with_file_name("image.json")).unwrap().ino();

        let second = find(&source, Some(&store)).unwrap();
        assert_eq!(fs::metadata(second.layers.with_file_name("image.json")).unwrap().ino(), written);
        archive(place.path(), "22");
        let changed = find(&source, Some(&store)).unwrap();
        assert_ne!(changed.image.unwrap().layers, image.layers);
        assert_eq!(fs::metadata(&layers[0]).unwrap().ino(), inode, "the old one stays as it is");
    }

    #[test]
    fn first_uses_at_a_time_build_once() {
        let place = tempfile::tempdir().unwrap();
        let store = place.path().join("store");
        let source = archive(place.path(), "1");
        let found: Vec<_> = std::thread::scope(|scope| {
            let uses: Vec<_> = (0..4).map(|_| scope.spawn(|| find(&source, Some(&store)).unwrap())).collect();
            uses.into_iter().map(|thread| thread.join().unwrap().image).collect()
        });
        assert!(found.iter().all(|image| *image == found[0] && image.is_some()));
        assert_eq!(fs::read_dir(store.join("layers")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(store.join("images")).unwrap().count(), 1);
    }

    #[test]
    fn layers_that_somebody_removed_are_built_again() {
        let place = tempfile::tempdir().unwrap();
        let store = place.path().join("store");
        let source = archive(place.path(), "1");
        let image = find(&source, Some(&store)).unwrap().image.unwrap();
        fs::remove_dir_all(store.join("layers")).unwrap();
        let stored = find(&source, Some(&store)).unwrap();
        assert_eq!(stored.image.as_ref(), Some(&image));
        stored.files(&image.manifest(&["/hello".to_owned()], None).unwrap()).unwrap();
    }

    #[test]
    fn a_folder_of_ours_is_taken_as_it_is() {
        let place = tempfile::tempdir().unwrap();
        let source: Source = archive(place.path(), "1").parse().unwrap();
        let output = place.path().join("out");
        let options = Options { output: &output, store: None, max_unpacked: MAX_UNPACKED };
        build_container(&source, &options, &["/hello".to_owned()]).unwrap();
        let name = output.to_str().unwrap();
        let stored = find(name, None).unwrap();
        let manifest = stored.manifest.clone().unwrap();
        let (layers, _) = stored.files(&manifest).unwrap();
        assert!(layers[0].is_absolute());

        let layer = File::options().write(true).open(&layers[0]).unwrap();
        layer.set_len(4096).unwrap();
        let error = stored.files(&manifest).unwrap_err().to_string();
        assert!(error.ends_with("it has 4096 bytes, not 8192; layers[0] names it"), "{error}");
        fs::remove_file(&layers[0]).unwrap();
        let error = stored.files(&manifest).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
        fs::remove_file(output.join("image.json")).unwrap();
        assert!(find(name, None).unwrap().image.is_none());
        fs::write(output.join("manifest.json"), "{}\n").unwrap();
        let error = find(name, None).unwrap_err().to_string();
        assert!(error.contains("manifest.json: the manifest does not follow the schema"), "{error}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let place = tempfile::tempdir().unwrap();
        let missing = place.path().join("none.tar");
        let error = find(missing.to_str().unwrap(), Some(place.path())).unwrap_err().to_string();
        assert!(error.starts_with("--container: cannot read"), "{error}");
        assert!(find("", None).unwrap_err().to_string().starts_with("--container: "));
        assert!(read_manifest(&missing).unwrap_err().to_string().starts_with("cannot read"));
    }

    #[test]
    fn the_data_folder_is_where_the_environment_says() {
        let with = |pairs: &'static [(&str, &str)]| {
            data_folder_with(|name| {
                let found = pairs.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.into())
            })
        };
        assert_eq!(with(&[("XDG_DATA_HOME", "/x"), ("HOME", "/h")]), Some("/x/cofferdam".into()));
        assert_eq!(with(&[("XDG_DATA_HOME", "x"), ("HOME", "/h")]), Some("/h/.local/share/cofferdam".into()));
        assert_eq!(with(&[("HOME", "")]), None);
    }
}
