//! What a start of a container needs: the manifest that is bound, the files that it names, and the image of the domain.

use std::env;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cofferdam_api::config::Container;
use cofferdam_api::container::Scratch;
use cofferdam_api::validate::MAX_UDS_PATH;
use cofferdam_container::process::ProcessError;
use cofferdam_container_manifest::Manifest;
use cofferdam_container_protocol::{STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use rustix::fs::{MemfdFlags, memfd_create};
use thiserror::Error;

use crate::args::RunArgs;
use crate::container::args::ContainerArgs;
use crate::container::derive::{Bound, Changes, DeriveError, derive};
use crate::container::store::{self, StoreError, Stored, data_folder};
use crate::streams::Ports;

/// What the monitor adds to the time of an orderly stop: the guest keeps its own.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// The name of a domain's image where it is installed.
const IMAGE: &str = "domain.igvm";

/// Why a container is not started.
#[derive(Debug, Error)]
pub enum StartError {
    /// An option about a container that nobody named.
    #[error("{0}: there is no container; --container DIR|SOURCE names one")]
    NoContainer(&'static str),
    /// It cannot be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such manifest.
    #[error(transparent)]
    Derive(#[from] DeriveError),
    /// The image does not say what to run, or as whom.
    #[error("--container: {0}")]
    Image(#[from] ProcessError),
    /// There is nothing to start it in.
    #[error(
        "--image: there is no domain image: {}; `cofferdam image build --init --kernel FILE -o {IMAGE}` makes one, \
         and `make install` installs one",
        list(.0)
    )]
    NoDomain(Vec<PathBuf>),
    /// The manifest has no place in memory.
    #[error("cannot keep the manifest in memory: {0}")]
    Memory(#[from] io::Error),
    /// The streams have no place.
    #[error("--run-dir: the path {} is longer than the {MAX_UDS_PATH} bytes that a socket may have", .0.display())]
    LongRunDir(PathBuf),
    /// A path has no form in JSON.
    #[error("{0:?} is not UTF-8")]
    NotUtf8(PathBuf),
}

fn list(paths: &[PathBuf]) -> String {
    let missing: Vec<String> = paths.iter().map(|path| format!("{} is not there", path.display())).collect();
    missing.join(", ")
}

/// What the configuration of a domain says of its container.
pub struct InDomain {
    /// Manifest, layers and the rest.
    pub container: Container,
    /// The domain's image.
    pub image: PathBuf,
    /// The vsock socket, beside which the streams have theirs. Its path is absolute: others look for it too.
    pub vsock: PathBuf,
    /// How long a stop may take.
    pub stop_timeout: Duration,
}

/// A container that can be started.
pub struct Start {
    /// Its manifest, and the values of this start.
    pub bound: Bound,
    /// The manifest's bytes, for the monitor to inherit.
    manifest: OwnedFd,
    layers: Vec<PathBuf>,
    volumes: Vec<PathBuf>,
}

impl Start {
    /// Gets ready what `args` name, or nothing if they name no container.
    ///
    /// # Errors
    /// If it is not there, or refused.
    pub fn new(args: &ContainerArgs) -> Result<Option<Self>, StartError> {
        let Some(name) = &args.source else {
            return args.first_given().map_or(Ok(None), |option| Err(StartError::NoContainer(option)));
        };
        let stored = store::find(name, args.store.as_deref())?;
        let bound = bind(&stored, args.manifest.as_deref(), &args.changes())?;
        let (layers, volumes) = stored.files(&bound.manifest)?;
        if let Some(path) = layers.iter().chain(&volumes).find(|path| path.to_str().is_none()) {
            return Err(StartError::NotUtf8(path.clone()));
        }
        // It goes to a child.
        let memory = memfd_create("manifest.json", MemfdFlags::empty()).map_err(io::Error::from)?;
        let mut file = File::from(memory);
        file.write_all(&bound.bytes)?;
        file.rewind()?;
        Ok(Some(Self { bound, manifest: file.into(), layers, volumes }))
    }

    /// What the configuration of domain `id` says of it.
    ///
    /// # Errors
    /// If there is no image to start it in, or no place for its sockets.
    pub fn in_domain(&self, args: &RunArgs, id: &str) -> Result<InDomain, StartError> {
        Ok(InDomain {
            container: self.config(),
            image: args.image.clone().map_or_else(default_image, Ok)?,
            vsock: socket(args, id)?,
            stop_timeout: self.stop_timeout(),
        })
    }

    fn config(&self) -> Container {
        let scratch = self.bound.manifest.scratch.as_ref();
        Container {
            manifest: format!("fd:{}", self.manifest.as_raw_fd()).into(),
            layers: self.layers.clone(),
            volumes: self.volumes.clone(),
            scratch: scratch.map(|scratch| Scratch { path: None, size: Some(scratch.size) }),
            env: self.bound.start.iter().cloned().collect(),
        }
    }

    /// What the monitor inherits.
    pub fn inherited(&self) -> BorrowedFd<'_> {
        self.manifest.as_fd()
    }

    /// How long a stop may take, in which the guest keeps to the manifest.
    fn stop_timeout(&self) -> Duration {
        let own = self.bound.manifest.host.stop.as_ref().map_or(0, |stop| stop.timeout_ms);
        Duration::from_millis(own).saturating_add(STOP_MARGIN)
    }

    /// Where the guest connects for the streams that the manifest grants.
    pub fn ports(&self) -> Ports {
        ports(&self.bound.manifest)
    }
}

fn ports(manifest: &Manifest) -> Ports {
    let host = &manifest.host;
    if manifest.process.terminal {
        let stdin = (host.stdin || host.stdout).then_some(STDIN_PORT);
        return Ports { stdin, stdout: None, stderr: None };
    }
    Ports {
        stdin: host.stdin.then_some(STDIN_PORT),
        stdout: host.stdout.then_some(STDOUT_PORT),
        stderr: host.stderr.then_some(STDERR_PORT),
    }
}

/// The manifest that is bound: the one in a file as it is, or one that is made of what is stored.
fn bind(stored: &Stored, exact: Option<&Path>, changes: &Changes) -> Result<Bound, StartError> {
    let image = stored.image.as_ref();
    if let Some(path) = exact {
        return Ok(derive(store::read_manifest(path)?, image, changes, true)?);
    }
    let base = match (&stored.manifest, image) {
        (Some(manifest), _) => manifest.clone(),
        (None, Some(image)) => image.manifest(&changes.command, changes.user.as_deref())?,
        (None, None) => return Err(ProcessError::NoProgram.into()),
    };
    Ok(derive(base, image, changes, false)?)
}

/// The vsock socket of domain `id`: in its entry of the run directory, if none is named.
fn socket(args: &RunArgs, id: &str) -> Result<PathBuf, StartError> {
    let own = || args.place.path().join(id).join("vsock");
    let path = args.vsock.clone().unwrap_or_else(own);
    let path = std::path::absolute(&path).unwrap_or(path);
    if args.vsock.is_none() && path.as_os_str().len() > MAX_UDS_PATH {
        return Err(StartError::LongRunDir(path));
    }
    Ok(path)
}

/// The image of a container's domain, if none is named: the one that was installed with this program, else the user's.
fn default_image() -> Result<PathBuf, StartError> {
    let installed = env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.parent()?.join("share/cofferdam").join(IMAGE)));
    let own = data_folder().map(|folder| folder.join(IMAGE));
    let places: Vec<PathBuf> = installed.into_iter().chain(own).collect();
    match places.iter().find(|path| path.exists()) {
        Some(path) => Ok(path.clone()),
        None => Err(StartError::NoDomain(places)),
    }
}
