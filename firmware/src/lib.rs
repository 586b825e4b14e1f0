//! What the monitor and the code in its guests must agree on: the map of
//! guest-physical addresses and ports, the ACPI tables that describe it, and
//! what an image and its monitor tell the first stage.
//!
//! No `std` and no allocation: the measured first stage links this crate.
#![cfg_attr(not(test), no_std)]

pub mod acceptance;
pub mod acpi;
pub mod arguments;
pub mod boot;
pub mod boot_params;
mod bytes;
pub mod e820;
pub mod efi;
mod fields;
pub mod first_stage;
pub mod layout;
pub mod manifest;
pub mod page_tables;
pub mod parameters;
pub mod reason;
pub mod reset_stub;
pub mod sha256;
pub mod snp;
