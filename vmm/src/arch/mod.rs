//! What differs from one processor architecture to the next: CPUID and
//! registers of the vCPUs, and the host features they need.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
