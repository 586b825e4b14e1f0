//! The Cofferdam monitor, as a library.

pub mod boot;
