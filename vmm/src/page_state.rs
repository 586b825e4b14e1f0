//! Pages that change sides, in a domain that keeps some of its memory from the host: at the guest's request, or because
//! it touches a page on the side where it is not.

use std::ops::Range;
use std::sync::Arc;

use cofferdam_confidential::private_memory::{ConversionError, PrivateMemory, Side};
use cofferdam_confidential::snp::HC_MAP_GPA_RANGE;
use cofferdam_devices::virtio::SharedPages;
use cofferdam_firmware::layout::PAGE_SIZE;
use kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::exit;
use crate::gate::Gate;

/// `KVM_MAP_GPA_RANGE_ENCRYPTED` in the third argument of the hypercall; lower bits are a hint at page sizes.
const ENCRYPTED: u64 = 1 << 4;
/// What the guest is told if it asks for something that cannot be; KVM takes no more than this and `EAGAIN`.
const REFUSED: u64 = libc::EINVAL as u64;

/// What devices may touch of such a domain.
pub struct SharedSide(pub Arc<PrivateMemory>);

impl SharedPages for SharedSide {
    fn is_shared(&self, address: u64, length: u64) -> bool {
        self.0.is_shared(address, length)
    }
}

/// Moves pages of a domain.
pub struct PageState {
    vm: Arc<VmFd>,
    memory: Arc<PrivateMemory>,
}

impl PageState {
    /// Moves pages of `memory`, which is that of `vm`.
    pub fn new(vm: Arc<VmFd>, memory: Arc<PrivateMemory>) -> Self {
        Self { vm, memory }
    }

    /// Serves a hypercall by which the guest moves pages, unless `gate` ends meanwhile.
    ///
    /// # Errors
    /// It is another one, or the host cannot do it.
    pub fn hypercall(
        &self,
        vcpu: &mut VcpuFd,
        number: u64,
        arguments: [u64; 6],
        gate: &Gate,
    ) -> Result<(), String> {
        if number != HC_MAP_GPA_RANGE {
            return Err(format!("unexpected hypercall {number}"));
        }
        let [gpa, pages, attributes, ..] = arguments;
        let side = if attributes & ENCRYPTED != 0 { Side::Private } else { Side::Shared };
        // Too many pages are more than there are.
        let length = pages.saturating_mul(PAGE_SIZE);
        let moved = self.memory.convert(&self.vm, gpa, length, side, |chunk| {
            // The guest is about to use all of it, and would leave for each page of it.
            if side == Side::Private {
                self.memory.populate(vcpu, chunk);
            }
            !gate.has_ended()
        });
        let result = match moved {
            Ok(()) => 0,
            Err(ConversionError::Range { .. }) => REFUSED,
            Err(error @ ConversionError::Host { .. }) => return Err(error.to_string()),
        };
        exit::set_hypercall_result(vcpu, result);
        Ok(())
    }

    /// Serves an access of the guest to memory on the side where it is not. `flags` are those of the exit.
    ///
    /// # Errors
    /// There is no RAM, or the host cannot do it.
    pub fn fault(&self, flags: u64, gpa: u64, size: u64) -> Result<Range<u64>, String> {
        let is_private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
        let side = if is_private { Side::Private } else { Side::Shared };
        self.memory.fault(&self.vm, gpa, size, side).map_err(|error| error.to_string())
    }
}
