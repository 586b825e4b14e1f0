//! dm-verity: what its kernel needs to know of a layer or data volume, all of which the manifest says.
//!
//! The superblock between data and tree is not read: nothing on the drive is believed.

use cofferdam_container_manifest::{BLOCK, OnVerityFailure, RootHash, Salt};
use cofferdam_container_protocol::step::{Object, Reason, Report, Step};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::dm::{Device, SECTOR, Target};
use crate::drives::Drive;
use crate::failure::{Failure, Reasoned};
use crate::ports;

/// Hashes of a block of the tree.
const HASHES: u64 = 128;
/// Longest message of the kernel's about devices, in bytes.
const MESSAGE: usize = 4096;

/// A file system with a tree behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree<'a> {
    /// The tree's root.
    pub root_hash: &'a RootHash,
    /// What every hash begins with.
    pub salt: &'a Salt,
    /// Size of the file system, in bytes: a multiple of a block.
    pub size: u64,
}

impl Tree<'_> {
    /// Size of the whole drive: file system, superblock, tree, in sectors.
    pub fn sectors(&self) -> u64 {
        let data = self.size / BLOCK;
        let (mut blocks, mut level) = (data.saturating_add(1), data);
        while level > 1 {
            level = level.div_ceil(HASHES);
            blocks = blocks.saturating_add(level);
        }
        blocks.saturating_mul(BLOCK / SECTOR)
    }

    fn table(&self, node: &str) -> String {
        let blocks = self.size / BLOCK;
        let salt = if self.salt.0.is_empty() { "-".to_owned() } else { self.salt.to_string() };
        let tree = blocks.saturating_add(1);
        format!("1 {node} {node} {BLOCK} {BLOCK} {blocks} {tree} sha256 {} {salt}", self.root_hash)
    }

    /// Has the kernel verify each block of the drive that is read.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_up(&self, object: Object, drive: &Drive) -> Result<Verified, Failure> {
        let target = Target {
            kind: "verity",
            sectors: self.size / SECTOR,
            table: self.table(&drive.node()),
            read_only: true,
            secret: false,
        };
        let device = Device::create(&drive.serial, &target).because(Reason::VerityRefused);
        Ok(Verified { object, device: device.map_err(|failure| failure.of(object))? })
    }
}

/// A device whose blocks are verified.
#[derive(Debug)]
pub struct Verified {
    /// What it is.
    pub object: Object,
    /// The device.
    pub device: Device,
}

impl Verified {
    /// Whether a block was read that is not what the root hash says.
    fn failed(&self) -> bool {
        // Nobody can see what is wrong with a device that says nothing of itself: it is not to be trusted.
        self.device.status().map_or(true, |status| status != "V")
    }
}

/// The first device of which a wrong block was read, as a failure.
pub fn failure(devices: &[Verified]) -> Option<Failure> {
    let failed = devices.iter().find(|device| device.failed())?;
    Some(Failure::new(Reason::VerityFailure).of(failed.object))
}

/// Tells the host of each device of which a wrong block was read, once. If the manifest says so, the domain ends.
#[derive(Debug)]
pub struct Watch {
    devices: Vec<Verified>,
    told: Vec<Object>,
    on_failure: OnVerityFailure,
}

impl Watch {
    /// Watches `devices`.
    pub fn new(devices: Vec<Verified>, on_failure: OnVerityFailure) -> Self {
        Self { devices, told: Vec::new(), on_failure }
    }

    /// Looks at all devices. `step` is what init is at.
    pub fn look(&mut self, step: Step) {
        for device in &self.devices {
            if device.failed() && !self.told.contains(&device.object) {
                self.told.push(device.object);
                let fatal = self.on_failure == OnVerityFailure::Kill;
                ports::report(Report {
                    step,
                    reason: Some(Reason::VerityFailure),
                    object: Some(device.object),
                    fatal,
                });
            }
        }
    }
}

/// A socket on which the kernel says what becomes of devices: to look again after each message, whatever it is.
///
/// # Errors
/// If the kernel has none.
pub fn events() -> Result<rustix::fd::OwnedFd, Failure> {
    let kind = (AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC);
    let socket =
        socket_with(kind.0, kind.1, kind.2, Some(netlink::KOBJECT_UEVENT)).because(Reason::KernelRefused)?;
    // Group 1 has what comes from the kernel itself.
    bind(&socket, &SocketAddrNetlink::new(0, 1)).because(Reason::KernelRefused)?;
    Ok(socket)
}

/// Waits for a message.
pub fn wait(events: &rustix::fd::OwnedFd) {
    let mut message = [0; MESSAGE];
    // An error means that messages were lost, and so that there was one.
    let _ = recv(events, &mut message, RecvFlags::empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_files() {
        // As `file_size` of the crate cofferdam-container, around each size where a level begins.
        for (data, blocks) in [
            (1, 2),
            (2, 4),
            (128, 130),
            (129, 133),
            (128 * 128, 128 * 128 + 130),
            (128 * 128 + 1, 128 * 128 + 1 + 1 + 129 + 2 + 1),
        ] {
            let tree = Tree { root_hash: &RootHash([0; 32]), salt: &Salt(vec![]), size: data * BLOCK };
            assert_eq!(tree.sectors(), blocks * 8, "{data}");
        }
    }

    #[test]
    fn the_table_says_where_data_and_tree_are() {
        let (root_hash, salt) = (RootHash([0xAB; 32]), Salt(vec![1, 2]));
        let tree = Tree { root_hash: &root_hash, salt: &salt, size: 3 * BLOCK };
        let digits = "ab".repeat(32);
        assert_eq!(tree.table("/dev/vdb"), format!("1 /dev/vdb /dev/vdb 4096 4096 3 4 sha256 {digits} 0102"));
        let none = Salt(vec![]);
        assert!(Tree { salt: &none, ..tree }.table("/dev/vdb").ends_with(" -"));
    }
}
