//! The SNP tier: domains with SEV-SNP, on hardware or in the rig with an emulated secure processor
//! (`cargo xtask snp-tests`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod boot;
mod devices;
mod domain;
mod evidence;
mod host;
mod hostile;
mod memory;
mod peer;
mod tampering;
