//! What is asked of the platform, its files read.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cofferdam_api::config::{Confidential, HostData, SnpConfig};
use cofferdam_api::source::Source;
use cofferdam_confidential::choose::Wanted;
use cofferdam_confidential::digest::id_block::{IdAuthentication, IdBlock};
use cofferdam_confidential::snp::SnpOptions;
use cofferdam_confidential::snp::certificates::{Certificates, CertificatesError};

use super::{StartError, bad_descriptor, image, source};
use crate::boot::file::ImageFile;
use crate::descriptor::Inherited;

/// The field, as messages name it.
pub(super) const CERTIFICATES: &str = "confidential.snp.certs";

/// What is asked of the platform, its files read. The digest of a container's manifest is the host's data.
pub(super) fn wanted(
    config: &Confidential,
    manifest_digest: Option<[u8; 32]>,
    inherited: &mut Inherited,
) -> Result<Wanted, StartError> {
    let SnpConfig { policy, id_block, id_auth, certs } = &config.snp;
    let id = match (id_block, id_auth) {
        (Some(block), Some(authentication)) => Some(Box::new((
            IdBlock::from_bytes(&exact("confidential.snp.id_block", block, inherited)?),
            IdAuthentication::from_bytes(&exact("confidential.snp.id_auth", authentication, inherited)?),
        ))),
        _ => None,
    };
    let host_data = host_data(config, manifest_digest)?.unwrap_or_default();
    Ok(Wanted {
        platform: config.platform,
        protected: config.require_protected,
        snp: SnpOptions { policy: *policy, host_data, id, certificates: certs.is_some() },
    })
}

pub(super) fn host_data(
    config: &Confidential,
    manifest_digest: Option<[u8; 32]>,
) -> Result<Option<[u8; 32]>, StartError> {
    match (config.host_data, manifest_digest) {
        (Some(HostData(given)), Some(digest)) if given != digest => {
            Err(StartError::HostData(HostData(digest)))
        }
        (given, digest) => Ok(digest.or(given.map(|data| data.0))),
    }
}

/// The certificates for reports of the guest, if there are some.
pub(super) fn open_certificates(
    config: &Confidential,
    inherited: &mut Inherited,
) -> Result<Option<Certificates>, StartError> {
    let Some(path) = &config.snp.certs else { return Ok(None) };
    let failed = |source| StartError::Certificates { path: path.clone(), source };
    let file = match source(CERTIFICATES, path)? {
        // What is no file is seen by its lacking offsets, and must not hold up the start.
        Source::Path(path) => OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path),
        Source::Descriptor(fd) => Ok(inherited.readable(fd).map_err(bad_descriptor(CERTIFICATES))?),
    };
    let certificates = file.map_err(CertificatesError::from).and_then(Certificates::new);
    certificates.map(Some).map_err(failed)
}

/// The content of a file that has exactly `N` bytes.
fn exact<const N: usize>(
    field: &'static str,
    path: &Path,
    inherited: &mut Inherited,
) -> Result<[u8; N], StartError> {
    let failed = |error| StartError::Structure { field, path: path.to_owned(), error };
    let file =
        ImageFile::open(image(field, path, inherited)?).map_err(|error| failed(io::Error::other(error)))?;
    if file.length() != N as u64 {
        return Err(failed(io::Error::other(format!("it has not {N} bytes"))));
    }
    let mut bytes = [0; N];
    file.read_at(&mut bytes, 0).map_err(|error| failed(io::Error::other(error)))?;
    Ok(bytes)
}
