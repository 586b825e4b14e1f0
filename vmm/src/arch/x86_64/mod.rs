//! x86-64.

mod cpuid;
mod vcpu;

pub use cpuid::CpuTemplate;
pub use vcpu::{VcpuSetupError, set_up};
