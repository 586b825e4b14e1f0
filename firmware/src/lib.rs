//! What the monitor and the code in its guests must agree on: the map of
//! guest-physical addresses and ports, and the ACPI tables that describe it.
//!
//! No `std` and no allocation: the measured first stage will link this crate.
#![cfg_attr(not(test), no_std)]

pub mod acpi;
pub mod layout;
