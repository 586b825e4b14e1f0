//! What the hardware will say of a launch, computed before it and without it.
//!
//! Each platform measures in its own way, and each module here does what that
//! platform's firmware does, on the pages in the order in which the monitor
//! hands them over:
//!
//! - [`snp`]: a chain of SHA-384 over one record per page, the virtual CPUs'
//!   save areas ([`vmsa`]) at the end;
//! - [`tdx`]: one running SHA-384 over page additions and contents (MRTD);
//! - [`cca`]: a chain of SHA-256, SHA-384 or SHA-512 over one descriptor per event (RIM).
//!
//! [`id_block`] has the structures in which an SNP guest's owner signs the
//! digest. They are made outside the monitor: nothing here signs.

pub mod cca;
pub mod id_block;
pub mod snp;
pub mod tdx;
pub mod vmsa;

use crate::image::importer::PAGE;

/// The contents of one page: what every platform measures at a time.
pub type Page = [u8; PAGE];

/// A SHA-384 digest: SNP's launch digest, TDX's MRTD.
pub type Sha384Digest = [u8; 48];
