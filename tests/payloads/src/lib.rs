//! What the payloads have in common. A payload is a guest that consists of one
//! small program: it runs from the monitor's entry point to its exit code, without
//! an operating system, interrupts or a heap.
//!
//! ```text
//! #![no_std]
//! #![no_main]
//!
//! cofferdam_payloads::payload!(main);
//!
//! fn main() -> u8 {
//!     cofferdam_payloads::println!("hello");
//!     0 // the exit code
//! }
//! ```
//!
//! Build all of them with
//! `cargo build -p cofferdam-payloads --target x86_64-unknown-none --release`.
//! Each is an ELF file that can be entered by PVH and by the 64-bit boot protocol
//! of Linux ([`entry`]), and needs 32 MiB of memory. A panic prints its message and exits with 99.
//!
//! The development machines interpret guest code at some 1.7 million instructions
//! a second and know only the common ones: keep payloads short and simple.
#![no_std]

pub mod cpu;
pub mod disk;
pub mod entry;
pub mod hostile;
pub mod mmio;
pub mod paging;
pub mod power;
pub mod ram;
pub mod serial;
pub mod smp;
pub mod snp;
pub mod socket;
pub mod virtio;
