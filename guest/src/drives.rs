//! The domain's drives, which are known by their serial numbers and not by their order.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use cofferdam_container_manifest::{Manifest, Mount};
use cofferdam_container_protocol::drive;
use cofferdam_container_protocol::step::{Object, Reason};

use crate::dm::SECTOR;
use crate::failure::{Failure, Reasoned, index};
use crate::verity::Tree;

/// Where the kernel says what drives there are.
pub const SYS_BLOCK: &str = "/sys/block";

/// A drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its name in `/dev`.
    pub name: String,
    /// Its serial number, which the host gave it.
    pub serial: String,
    /// Its size, in sectors.
    pub sectors: u64,
}

impl Drive {
    /// Its node.
    pub fn node(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// All that is on it, unless that is more than `most` bytes.
    ///
    /// # Errors
    /// If it is larger, or cannot be read.
    pub fn read(&self, most: usize) -> Result<Vec<u8>, Failure> {
        let size = self.sectors.saturating_mul(SECTOR);
        if size > most as u64 {
            return Err(Failure::new(Reason::TooLarge));
        }
        let mut bytes = Vec::new();
        let drive = File::open(self.node()).because(Reason::Unreadable)?;
        drive.take(size).read_to_end(&mut bytes).because(Reason::Unreadable)?;
        Ok(bytes)
    }
}

/// All virtio drives, in the order of their numbers.
///
/// # Errors
/// If the kernel does not say.
pub fn find(sys_block: &Path) -> Result<Vec<Drive>, Failure> {
    let mut drives = Vec::new();
    for entry in fs::read_dir(sys_block).because(Reason::KernelRefused)? {
        let entry = entry.because(Reason::KernelRefused)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("vd") {
            continue;
        }
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        let size = fs::read_to_string(entry.path().join("size")).because(Reason::KernelRefused)?;
        let sectors = size.trim().parse().map_err(|_| Failure::new(Reason::KernelRefused))?;
        drives.push(Drive { name, serial: serial.trim_end_matches(['\n', '\0']).to_owned(), sectors });
    }
    // vdz comes before vdaa.
    drives.sort_by_key(|drive| (drive.name.len(), drive.name.clone()));
    Ok(drives)
}

/// The one drive with this serial number.
///
/// # Errors
/// If there is none, or more than one.
pub fn the<'a>(drives: &'a [Drive], serial: &str) -> Result<&'a Drive, Failure> {
    let mut found = drives.iter().filter(|drive| drive.serial == serial);
    match (found.next(), found.next()) {
        (None, _) => Err(Failure::new(Reason::Missing)),
        (Some(drive), None) => Ok(drive),
        (Some(_), Some(_)) => Err(Failure::new(Reason::Unexpected)),
    }
}

/// What the manifest says of drives, and the drives that are that.
#[derive(Debug)]
pub struct Assigned<'a> {
    /// Those of layers and data volumes.
    pub trees: Vec<(Object, &'a Drive, Tree<'a>)>,
    /// The scratch device.
    pub scratch: Option<&'a Drive>,
}

/// Finds the drive of everything in the manifest.
///
/// # Errors
/// If one is missing, has another size, or is not in the manifest.
pub fn assign<'a>(drives: &'a [Drive], manifest: &'a Manifest) -> Result<Assigned<'a>, Failure> {
    let layers = manifest.layers.iter().enumerate().map(|(at, layer)| {
        let tree = Tree { root_hash: &layer.root_hash, salt: &layer.salt, size: layer.size };
        (Object::Layer(index(at)), drive::layer(at), tree)
    });
    let volumes = manifest.mounts.iter().filter_map(|mount| match mount {
        Mount::Data(volume) => Some(volume),
        Mount::Scratch(_) | Mount::Tmpfs(_) => None,
    });
    let volumes = volumes.enumerate().map(|(at, volume)| {
        let tree = Tree { root_hash: &volume.root_hash, salt: &volume.salt, size: volume.size };
        (Object::Volume(index(at)), drive::volume(at), tree)
    });
    let mut trees = Vec::new();
    for (object, serial, tree) in layers.chain(volumes) {
        let drive = the(drives, &serial).map_err(|failure| failure.of(object))?;
        if drive.sectors != tree.sectors() {
            return Err(Failure::new(Reason::WrongSize).of(object));
        }
        trees.push((object, drive, tree));
    }
    let scratch = match &manifest.scratch {
        Some(scratch) => {
            let drive = the(drives, drive::SCRATCH)?;
            let at = drives.iter().position(|other| other == drive).unwrap_or_default();
            if drive.sectors.checked_mul(SECTOR) != Some(scratch.size) {
                return Err(Failure::new(Reason::WrongSize).of(Object::Drive(index(at))));
            }
            Some(drive)
        }
        None => None,
    };
    for (at, drive) in drives.iter().enumerate() {
        let known = drive.serial == drive::MANIFEST
            || scratch == Some(drive)
            || trees.iter().any(|(_, known, _)| *known == drive);
        if !known {
            return Err(Failure::new(Reason::Unexpected).of(Object::Drive(index(at))));
        }
    }
    Ok(Assigned { trees, scratch })
}
