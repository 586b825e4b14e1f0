//! Certificates that a guest gets with its attestation report, for whoever is to trust it (GHCB specification 2.03, 4.1.8.1
//! "SNP Extended Guest Request").
//!
//! They come as one file, a *certificate table*:
//!
//! ```text
//! table := entry* zeroes         24 bytes each; the zeroes end it
//! entry := GUID of a kind of certificate, offset u32, length u32
//! ```
//!
//! Offsets count from the start of the table, and the certificates follow it. Which GUIDs there are, and what they
//! name, is between whoever writes the file and the guest.
//!
//! The firmware's keys may change while a domain runs, and the file with them. So it is read for each request, and locked
//! from before it is read until the firmware has made the report (Linux `Documentation/virt/kvm/x86/amd-memory-encryption.rst`,
//! "KVM_SEV_SNP_ENABLE_REQ_CERTS"): whoever changes it locks it for himself alone, by `fcntl`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::sys::{self, SharedLock};

/// Most bytes of a file. Linux' guests take 16 KiB.
pub const MAX_SIZE: usize = 64 << 10;
/// Size of an entry, bytes.
const ENTRY: usize = 24;

/// Certificates that cannot be given to a guest.
#[derive(Debug, Error)]
pub enum CertificatesError {
    /// The file cannot be read or locked.
    #[error("{0}")]
    File(#[from] io::Error),
    /// Whoever changes it has locked it.
    #[error("it is locked: somebody changes it")]
    Locked,
    /// It is too large.
    #[error("it has more than {MAX_SIZE} bytes")]
    TooLarge,
    /// It ends before its table does.
    #[error("its table of certificates has no end: 24 bytes of zeroes")]
    Endless,
    /// There is nothing in it.
    #[error("its table has no certificate")]
    Empty,
    /// An entry names what is not there.
    #[error(
        "entry {index} of its table is of {length:#x} bytes at {offset:#x}, and the certificates are between {table:#x} and {size:#x}"
    )]
    Range {
        /// Its place in the table.
        index: usize,
        /// Offset in the file.
        offset: u32,
        /// Bytes.
        length: u32,
        /// Where the table ends.
        table: usize,
        /// Bytes of the file.
        size: usize,
    },
}

/// A file with a certificate table.
#[derive(Debug)]
pub struct Certificates {
    file: File,
    buffer: Vec<u8>,
}

impl Certificates {
    /// That in `file`, which is looked at, and looked at again for each request.
    pub fn new(file: File) -> Result<Self, CertificatesError> {
        // One byte more shows that it is too large.
        let mut certificates = Self { file, buffer: vec![0; MAX_SIZE.saturating_add(1)] };
        match certificates.lock() {
            Ok(Some(_)) => {}
            Ok(None) => return Err(CertificatesError::Locked),
            Err(error) => return Err(error),
        }
        Ok(certificates)
    }

    /// The table as it is now, and as it stays while what is returned lives. `None`: somebody changes it.
    pub fn lock(&mut self) -> Result<Option<LockedCertificates<'_>>, CertificatesError> {
        let Some(lock) = sys::lock_shared(&self.file)? else { return Ok(None) };
        let mut size = 0_usize;
        while let Some(rest) = self.buffer.get_mut(size..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, size as u64) {
                Ok(0) => break,
                Ok(count) => size = size.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let table = self.buffer.get(..size).unwrap_or_default();
        check(table)?;
        Ok(Some(LockedCertificates { table, _lock: lock }))
    }
}

/// A certificate table that does not change.
pub struct LockedCertificates<'a> {
    /// Its bytes.
    pub table: &'a [u8],
    _lock: SharedLock<'a>,
}

/// Checks that each entry of a table names a part of what follows it.
pub fn check(file: &[u8]) -> Result<(), CertificatesError> {
    let size = file.len();
    if size > MAX_SIZE {
        return Err(CertificatesError::TooLarge);
    }
    let entries = || file.chunks_exact(ENTRY);
    let count = entries().position(|entry| entry.iter().all(|byte| *byte == 0));
    let count = count.ok_or(CertificatesError::Endless)?;
    if count == 0 {
        return Err(CertificatesError::Empty);
    }
    let table = count.saturating_add(1).saturating_mul(ENTRY);
    for (index, entry) in entries().take(count).enumerate() {
        let number = |at: usize| {
            let bytes = entry.get(at..).and_then(|rest| rest.first_chunk());
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let (offset, length) = (number(16), number(20));
        let end = u64::from(offset).saturating_add(length.into());
        if length == 0 || (offset as usize) < table || end > size as u64 {
            return Err(CertificatesError::Range { index, offset, length, table, size });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use proptest::prelude::*;

    use super::*;

    /// A table with these offsets and lengths, and this many bytes of certificates.
    fn table(entries: &[(u32, u32)], content: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (offset, length) in entries {
            bytes.extend([0xab; 16]);
            bytes.extend(offset.to_le_bytes());
            bytes.extend(length.to_le_bytes());
        }
        bytes.extend([0; ENTRY]);
        bytes.resize(bytes.len() + content, 0xcc);
        bytes
    }

    fn refused(bytes: &[u8]) -> String {
        check(bytes).unwrap_err().to_string()
    }

    #[test]
    fn entries_name_parts_of_what_follows_the_table() {
        check(&table(&[(48, 100)], 100)).unwrap();
        check(&table(&[(72, 50), (122, 50)], 100)).unwrap();
        check(&table(&[(48, 100)], MAX_SIZE - 48)).unwrap();
        let range =
            "entry 0 of its table is of 0x64 bytes at 0x2f, and the certificates are between 0x30 and 0x94";
        assert_eq!(refused(&table(&[(47, 100)], 100)), range);
        for (offset, length) in [(48, 101), (49, 100), (48, 0), (0, 48), (u32::MAX, u32::MAX), (u32::MAX, 1)]
        {
            let error = check(&table(&[(offset, length)], 100)).unwrap_err();
            assert!(matches!(error, CertificatesError::Range { index: 0, .. }), "{offset} {length}: {error}");
        }
        let error = check(&table(&[(72, 10), (72, 101)], 100)).unwrap_err();
        assert!(matches!(error, CertificatesError::Range { index: 1, .. }), "{error}");
    }

    #[test]
    fn a_table_has_an_end_and_a_certificate() {
        let endless = "its table of certificates has no end: 24 bytes of zeroes";
        assert_eq!(refused(&[]), endless);
        assert_eq!(refused(&[0; 23]), endless);
        assert_eq!(refused(&table(&[(48, 100)], 100)[..47]), endless);
        assert_eq!(refused(b"-----BEGIN CERTIFICATE-----"), endless);
        assert_eq!(refused(&[0; 24]), "its table has no certificate");
        assert_eq!(refused(&table(&[(48, 100)], MAX_SIZE)), "it has more than 65536 bytes");
    }

    #[test]
    fn a_file_is_read_again_for_each_request() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Certificates::new(file.reopen().unwrap()).unwrap_err(), CertificatesError::Endless));
        let first = table(&[(48, 100)], 100);
        file.write_all(&first).unwrap();
        let mut certificates = Certificates::new(file.reopen().unwrap()).unwrap();
        assert_eq!(certificates.lock().unwrap().unwrap().table, first);
        let second = table(&[(48, 7)], 7);
        file.as_file().set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(&second).unwrap();
        assert_eq!(certificates.lock().unwrap().unwrap().table, second);
        file.as_file().set_len(30).unwrap();
        assert!(matches!(certificates.lock(), Err(CertificatesError::Endless)));
        file.as_file().set_len(MAX_SIZE as u64 + 1).unwrap();
        assert!(matches!(certificates.lock(), Err(CertificatesError::TooLarge)));
    }

    #[test]
    fn whoever_changes_the_file_is_not_disturbed_and_does_not_disturb() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&table(&[(48, 100)], 100)).unwrap();
        let mut certificates = Certificates::new(file.reopen().unwrap()).unwrap();
        let editor = file.reopen().unwrap();
        let locked = certificates.lock().unwrap().unwrap();
        assert!(!sys::lock_alone(&editor), "while it is read");
        drop(locked);
        assert!(sys::lock_alone(&editor), "when the report is made");
        assert!(certificates.lock().unwrap().is_none());
        assert!(matches!(Certificates::new(file.reopen().unwrap()), Err(CertificatesError::Locked)));
        drop(editor);
        assert!(certificates.lock().unwrap().is_some());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_lies_inside(
            entries in prop::collection::vec((0..200_u32, 0..200_u32), 0..4),
            content in 0..200_usize,
        ) {
            let bytes = table(&entries, content);
            let start = (entries.len() + 1) * ENTRY;
            let inside = |&(offset, length): &(u32, u32)| {
                length != 0 && offset as usize >= start && (offset + length) as usize <= bytes.len()
            };
            prop_assert_eq!(check(&bytes).is_ok(), !entries.is_empty() && entries.iter().all(inside));
        }
    }
}
