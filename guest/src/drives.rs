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

#[cfg(test)]
mod tests {
    use cofferdam_container_manifest::{DataVolume, Layer, Protection, RootHash, Salt, Scratch};

    use super::*;

    fn drive(name: &str, serial: &str, sectors: u64) -> Drive {
        Drive { name: name.to_owned(), serial: serial.to_owned(), sectors }
    }

    /// Two layers, a data volume and a scratch device, as the manifest and as drives, in another order.
    fn good() -> (Manifest, Vec<Drive>) {
        let layer = |size| Layer { root_hash: RootHash([0; 32]), salt: Salt(vec![]), size };
        let bytes = br#"{"host":{"exec":[],"signals":[],"stderr":false,"stdin":false,"stdout":false,"stop":null},"hostname":"a","layers":[{"root_hash":"0000000000000000000000000000000000000000000000000000000000000000","salt":"","size":4096}],"mounts":[],"on_verity_failure":"kill","process":{"args":["/a"],"capabilities":[],"cwd":"/","env":[],"gid":0,"groups":[],"no_new_privs":true,"read_only_root":true,"rlimits":[],"start_env":[],"terminal":false,"uid":0},"scratch":null,"version":1}"#;
        let mut manifest = cofferdam_container_manifest::decode(bytes).unwrap();
        manifest.layers = vec![layer(4096), layer(8192)];
        let (root_hash, salt) = (RootHash([1; 32]), Salt(vec![]));
        manifest.mounts =
            vec![Mount::Data(DataVolume { path: "/a".to_owned(), root_hash, salt, size: 4096 })];
        manifest.scratch = Some(Scratch { protection: Protection::None, size: 1 << 20 });
        let drives = vec![
            drive("vda", "scratch", 2048),
            drive("vdb", "layer1", 32),
            drive("vdc", "manifest", 8),
            drive("vdd", "volume0", 16),
            drive("vde", "layer0", 16),
        ];
        (manifest, drives)
    }

    #[test]
    fn drives_are_known_by_their_serial_numbers() {
        let (manifest, drives) = good();
        let assigned = assign(&drives, &manifest).unwrap();
        let found: Vec<_> = assigned.trees.iter().map(|(object, drive, _)| (*object, &*drive.name)).collect();
        assert_eq!(found, [(Object::Layer(0), "vde"), (Object::Layer(1), "vdb"), (Object::Volume(0), "vdd")]);
        assert_eq!(assigned.scratch, Some(&drives[0]));
        assert_eq!(the(&drives, "manifest").unwrap().node(), "/dev/vdc");
    }

    #[test]
    fn what_is_missing_extra_or_of_another_size_is_refused() {
        type Change = fn(&mut Manifest, &mut Vec<Drive>);
        let cases: [(Change, Reason, Option<Object>); 9] = [
            (|_, d| drop(d.remove(1)), Reason::Missing, Some(Object::Layer(1))),
            (|_, d| drop(d.remove(3)), Reason::Missing, Some(Object::Volume(0))),
            (|_, d| drop(d.remove(0)), Reason::Missing, None),
            (|_, d| d.push(drive("vdf", "layer0", 16)), Reason::Unexpected, Some(Object::Layer(0))),
            (|_, d| d.push(drive("vdf", "", 16)), Reason::Unexpected, Some(Object::Drive(5))),
            (|m, _| m.scratch = None, Reason::Unexpected, Some(Object::Drive(0))),
            (|_, d| d[4].sectors -= 1, Reason::WrongSize, Some(Object::Layer(0))),
            (|_, d| d[3].sectors += 8, Reason::WrongSize, Some(Object::Volume(0))),
            (|_, d| d[0].sectors += 1, Reason::WrongSize, Some(Object::Drive(0))),
        ];
        for (at, (change, reason, object)) in cases.into_iter().enumerate() {
            let (mut manifest, mut drives) = good();
            change(&mut manifest, &mut drives);
            let failure = assign(&drives, &manifest).unwrap_err();
            assert_eq!((failure.reason, failure.object), (reason, object), "{at}");
        }
    }

    #[test]
    fn the_kernel_says_what_drives_there_are() {
        let directory = tempfile::tempdir().unwrap();
        for (name, serial, size) in
            [("vdaa", "layer9\n", "16\n"), ("vdb", "manifest", "8"), ("dm-0", "x", "8")]
        {
            fs::create_dir(directory.path().join(name)).unwrap();
            fs::write(directory.path().join(name).join("serial"), serial).unwrap();
            fs::write(directory.path().join(name).join("size"), size).unwrap();
        }
        let drives = find(directory.path()).unwrap();
        assert_eq!(drives, [drive("vdb", "manifest", 8), drive("vdaa", "layer9", 16)]);
    }

    #[test]
    fn a_drive_that_is_too_large_is_not_read() {
        let failure = drive("nothing", "manifest", 9).read(4096).unwrap_err();
        assert_eq!(failure.reason, Reason::TooLarge);
        assert_eq!(drive("nothing", "manifest", 8).read(4096).unwrap_err().reason, Reason::Unreadable);
    }
}
