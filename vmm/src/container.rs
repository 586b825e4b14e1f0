//! What the domain of a container is given of the host's: its manifest and the values of this start, on a drive that
//! is made here; layers, data volumes and scratch device as drives with names that the guest knows them by. The monitor
//! hashes the manifest and reads nothing in it: the guest does, and refuses what does not fit.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cofferdam_api::config;
use cofferdam_api::status::{ContainerFailure, ContainerStatus};
use cofferdam_confidential::image::inspect::hex;
use cofferdam_container_protocol::drive::{self, DriveError, MAX_MANIFEST};
use cofferdam_container_protocol::step::Report;
use cofferdam_devices::virtio::block::{BlockOptions, BlockSource, Cache};
use cofferdam_firmware::sha256;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use thiserror::Error;

use crate::boot::FileError;
use crate::boot::file::ImageFile;
use crate::control::Notes;
use crate::descriptor::Inherited;
use crate::start::{StartError, block_source, image};

const MANIFEST: &str = "container.manifest";
const SCRATCH: &str = "container.scratch";

/// Why a container's drives cannot be made.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// The manifest cannot be read.
    #[error("{MANIFEST}: {}: {error}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: FileError,
    },
    /// The manifest is too large.
    #[error("{MANIFEST}: {}: {length} bytes long; at most {MAX_MANIFEST} are possible", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length, bytes.
        length: u64,
    },
    /// Manifest and values cannot be put on a drive.
    #[error("container: {0}")]
    Drive(#[from] DriveError),
    /// The host has no memory for a drive.
    #[error("{field}: {call}: {error}")]
    Host {
        /// The field of the configuration.
        field: &'static str,
        /// What was tried.
        call: &'static str,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
}

/// What a container's domain is made of.
pub struct Container {
    /// SHA-256 of the manifest.
    pub digest: [u8; sha256::SIZE],
    /// Its drives, each with the field of the configuration that it comes from.
    pub drives: Vec<(String, BlockOptions)>,
}

impl Container {
    /// Reads the manifest, and makes what has to be made. Descriptors of `inherited` are not taken over yet.
    pub fn open(config: &config::Container, inherited: &mut Inherited) -> Result<Self, StartError> {
        let manifest = read_manifest(&config.manifest, inherited)?;
        let digest = sha256::Method::detect().digest(&manifest);
        let content = drive::write(&manifest, &config.env).map_err(ContainerError::from)?;
        let content = BlockSource::File(sealed(&content)?, config.manifest.clone());
        let mut drives = vec![(MANIFEST.to_owned(), read_only(content, drive::MANIFEST))];
        for (index, path) in config.layers.iter().enumerate() {
            let field = format!("container.layers[{index}]");
            let source = block_source(&field, path, inherited)?;
            drives.push((field, read_only(source, &drive::layer(index))));
        }
        for (index, path) in config.volumes.iter().enumerate() {
            let field = format!("container.volumes[{index}]");
            let source = block_source(&field, path, inherited)?;
            drives.push((field, read_only(source, &drive::volume(index))));
        }
        if let Some(scratch) = &config.scratch {
            let (field, source) = match &scratch.path {
                Some(path) => {
                    ("container.scratch.path", block_source("container.scratch.path", path, inherited)?)
                }
                None => (SCRATCH, BlockSource::File(memory(scratch.size.unwrap_or(0))?, SCRATCH.into())),
            };
            let mut options = BlockOptions::new(source, drive::SCRATCH);
            // It is lost at the end of the domain: nothing has to reach the disk.
            options.cache = Cache::Unsafe;
            drives.push((field.to_owned(), options));
        }
        Ok(Self { digest, drives })
    }
}

/// What is known of the container whose manifest has that digest.
pub fn status(digest: &[u8], protected: bool, notes: &Notes) -> Box<ContainerStatus> {
    let failure = |report: Report| ContainerFailure {
        step: report.step.to_string(),
        reason: report.reason.map(|reason| reason.to_string()),
        object: report.object.map(|object| object.to_string()),
        message: report.to_string(),
    };
    Box::new(ContainerStatus {
        manifest_digest: hex(digest),
        asserted_by_host: !protected,
        step: notes.step.map(|step| step.to_string()),
        failure: notes.failure.map(failure),
    })
}

fn read_manifest(path: &Path, inherited: &mut Inherited) -> Result<Vec<u8>, StartError> {
    let failed = |error| ContainerError::Manifest { path: path.to_owned(), error };
    let file = ImageFile::open(image(MANIFEST, path, inherited)?).map_err(failed)?;
    if file.length() > MAX_MANIFEST as u64 {
        return Err(ContainerError::TooLarge { path: path.to_owned(), length: file.length() }.into());
    }
    Ok(file.head(MAX_MANIFEST).map_err(failed)?)
}

fn read_only(source: BlockSource, id: &str) -> BlockOptions {
    BlockOptions { read_only: true, ..BlockOptions::new(source, id) }
}

/// A file in memory with that content, which nobody can change any more.
fn sealed(content: &[u8]) -> Result<File, ContainerError> {
    let failed = |call| move |error: io::Error| ContainerError::Host { field: MANIFEST, call, error };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("manifest", flags).map_err(|error| failed("memfd_create")(error.into()))?;
    let mut file = File::from(file);
    file.write_all(content).map_err(failed("write"))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals).map_err(|error| failed("F_ADD_SEALS")(error.into()))?;
    Ok(file)
}

/// A file in memory of that size, which takes memory as it is written.
fn memory(size: u64) -> Result<File, ContainerError> {
    let failed = |call| {
        move |error: rustix::io::Errno| ContainerError::Host { field: SCRATCH, call, error: error.into() }
    };
    let file = memfd_create("scratch", MemfdFlags::CLOEXEC).map_err(failed("memfd_create"))?;
    ftruncate(&file, size).map_err(failed("ftruncate"))?;
    Ok(file.into())
}
