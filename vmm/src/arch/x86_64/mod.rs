//! x86-64.

mod cpuid;
mod vcpu;
mod vm;

pub use cpuid::{CpuTemplate, CpuidError};
pub use vcpu::{EntryState, VcpuSetupError, set_up};
pub use vm::{VmSetupError, set_up_vm};
