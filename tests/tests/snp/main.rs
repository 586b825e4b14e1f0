//! The SNP tier: domains with SEV-SNP, on hardware or in the rig with an emulated secure processor
//! (`cargo xtask snp-tests`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod boot;
mod certificates;
mod container;
mod devices;
mod domain;
mod evidence;
mod host;
mod hostile;
mod jail;
mod memory;
mod peer;
mod refusals;
mod tampering;
