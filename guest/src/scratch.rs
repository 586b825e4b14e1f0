//! The scratch device: what the container writes, and what becomes of it on the host's disk.
//!
//! ```text
//! authenticated   ext4 ── dm-crypt: AES-256-XTS, HMAC-SHA-256 ── dm-integrity: a tag for each block ── drive
//! encrypted       ext4 ── dm-crypt: AES-256-XTS ── drive
//! none            ext4 ── drive
//! ```
//!
//! The key is random, made here at each start, and known to nobody but the kernel; what was written is lost with it. A
//! changed block of an authenticated device fails to be read. What the device does not protect against: that the host
//! brings back an old block together with its tag, each block by itself; and that it sees which blocks are written, and when.
//!
//! Blocks that were never written have no tag, and fail to be read too. Writing tags everywhere would take as long as the
//! device is large. Instead [`ext4`](crate::ext4) is made so that nothing is read that was not written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use cofferdam_container_manifest::{Protection, Scratch};
use cofferdam_container_protocol::step::Reason;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::dm::{self, Device, SECTOR, Target};
use crate::drives::Drive;
use crate::ext4;
use crate::failure::{Failure, Reasoned};

/// Bytes of the keys: two of AES-256 for XTS, then that of HMAC-SHA-256.
const CIPHER_KEY: usize = 64;
const MAC_KEY: usize = 32;
/// Bytes of a block's tag.
const TAG: u64 = 32;
/// Sectors of a block.
const BLOCK_SECTORS: u64 = ext4::BLOCK / SECTOR;
/// After so many sectors of data follow, on the drive, the tags of as many.
const INTERLEAVE: u64 = 32768;
const INTERLEAVE_TAGS: u64 = INTERLEAVE / BLOCK_SECTORS * TAG / SECTOR;
const RUN: u64 = INTERLEAVE + INTERLEAVE_TAGS;
/// Sectors for the superblock of dm-integrity and the journal that it has and does not use here.
const HEAD: u64 = 1032;
const JOURNAL: u64 = 512;

/// Sets the drive up as the manifest says, and makes a file system on it. Returns the device node.
///
/// # Errors
/// If the kernel refuses any of it, or the drive is too small.
pub fn set_up(drive: &Drive, scratch: &Scratch) -> Result<String, Failure> {
    let node = match scratch.protection {
        Protection::None => drive.node(),
        Protection::Encrypted => {
            let key = Key::new(CIPHER_KEY)?;
            encrypted(&drive.node(), drive.sectors, &key).because(Reason::EncryptionRefused)?
        }
        Protection::Authenticated => {
            let key = Key::new(CIPHER_KEY.saturating_add(MAC_KEY))?;
            let sectors = authenticated_sectors(drive.sectors).ok_or(Failure::new(Reason::FormatFailed))?;
            authenticated(&drive.node(), sectors, &key)?
        }
    };
    format(&node)?;
    Ok(node)
}

/// A key in hexadecimal digits, as a table has it.
struct Key(String);

impl Key {
    fn new(length: usize) -> Result<Self, Failure> {
        let mut bytes = vec![0; length];
        let count = getrandom(&mut bytes[..], GetRandomFlags::empty()).because(Reason::NoRandomSource)?;
        if count != length {
            return Err(Failure::new(Reason::NoRandomSource));
        }
        let mut digits = String::with_capacity(length.saturating_mul(2));
        for byte in &bytes {
            for nibble in [byte >> 4, byte & 15] {
                digits.extend(char::from_digit(nibble.into(), 16));
            }
        }
        dm::wipe(bytes);
        Ok(Self(digits))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        dm::wipe(std::mem::take(&mut self.0).into_bytes());
    }
}

fn encrypted(node: &str, sectors: u64, key: &Key) -> rustix::io::Result<String> {
    let sectors = whole_blocks(sectors);
    let table = format!("aes-xts-plain64 {} 0 {node} 0 1 sector_size:4096", key.0);
    let device =
        Device::create("scratch", &Target { kind: "crypt", sectors, table, read_only: false, secret: true })?;
    Ok(device.node())
}

fn authenticated(node: &str, sectors: u64, key: &Key) -> Result<String, Failure> {
    // Whatever the host has there: without a superblock the kernel writes one.
    let drive = OpenOptions::new().write(true).open(node).because(Reason::EncryptionRefused)?;
    drive.write_all_at(&[0; ext4::BLOCK as usize], 0).because(Reason::FormatFailed)?;
    drive.sync_all().because(Reason::FormatFailed)?;
    drop(drive);
    let table = format!(
        "{node} 0 {TAG} D 3 block_size:4096 interleave_sectors:{INTERLEAVE} journal_sectors:{JOURNAL}"
    );
    let tags = Target { kind: "integrity", sectors, table, read_only: false, secret: false };
    let tags = Device::create("scratch-tags", &tags).because(Reason::EncryptionRefused)?;
    let table = format!(
        "capi:authenc(hmac(sha256),xts(aes))-plain64 {} 0 {} 0 2 integrity:{TAG}:aead sector_size:4096",
        key.0,
        tags.node()
    );
    let device = Target { kind: "crypt", sectors, table, read_only: false, secret: true };
    Ok(Device::create("scratch", &device).because(Reason::EncryptionRefused)?.node())
}

fn whole_blocks(sectors: u64) -> u64 {
    sectors.saturating_sub(sectors % BLOCK_SECTORS)
}

/// Sectors that an authenticated device has on a drive of `sectors`.
fn authenticated_sectors(sectors: u64) -> Option<u64> {
    let room = sectors.checked_sub(HEAD)?;
    let last = (room % RUN).saturating_sub(INTERLEAVE_TAGS);
    Some(whole_blocks((room / RUN).checked_mul(INTERLEAVE)?.checked_add(last)?))
}

fn format(node: &str) -> Result<(), Failure> {
    let mut uuid = [0; 16];
    getrandom(&mut uuid, GetRandomFlags::empty()).because(Reason::NoRandomSource)?;
    let device: File = OpenOptions::new().write(true).open(node).because(Reason::FormatFailed)?;
    let size = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)).because(Reason::FormatFailed)?;
    for (offset, bytes) in ext4::format(size, uuid).ok_or(Failure::new(Reason::FormatFailed))? {
        device.write_all_at(&bytes, offset).because(Reason::FormatFailed)?;
    }
    device.sync_all().because(Reason::FormatFailed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authenticated_device_leaves_room_for_its_tags() {
        assert_eq!(authenticated_sectors(HEAD - 1), None);
        assert_eq!(authenticated_sectors(HEAD + INTERLEAVE_TAGS + 7), Some(0));
        assert_eq!(authenticated_sectors(HEAD + INTERLEAVE_TAGS + 8), Some(8));
        assert_eq!(authenticated_sectors(HEAD + INTERLEAVE + INTERLEAVE_TAGS), Some(INTERLEAVE));
        assert_eq!(
            authenticated_sectors(HEAD + INTERLEAVE + 2 * INTERLEAVE_TAGS + 16),
            Some(INTERLEAVE + 16)
        );
        assert!(authenticated_sectors(u64::MAX).is_some());
    }
}
