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

/// How often in a row a vCPU may access a page that was moved to where it wants it, and is not there.
///
/// Other vCPUs may have been first, and then it is there; only a host that does not keep pages where they belong, or has
/// none left, makes it this many.
const MOST_FAULTS: u32 = 1000;

/// The last access of a vCPU to a page on the side where it is not.
#[derive(Debug, Default)]
pub struct Faults {
    /// The flags of the exit, and the page.
    last: Option<(u64, u64)>,
    /// How often it came in a row.
    count: u32,
}

impl Faults {
    /// One more, at `gpa`. `flags` are those of the exit.
    ///
    /// # Errors
    /// To serve it does not help.
    pub fn count(&mut self, flags: u64, gpa: u64) -> Result<(), String> {
        let fault = Some((flags, gpa / PAGE_SIZE));
        self.count = if self.last == fault { self.count.saturating_add(1) } else { 1 };
        self.last = fault;
        if self.count > MOST_FAULTS {
            let side = side(flags);
            return Err(format!(
                "the host does not give the guest the {side} page at {gpa:#x}: it was made {side} {MOST_FAULTS} times in a row"
            ));
        }
        Ok(())
    }

    /// The vCPU has done something else.
    pub fn clear(&mut self) {
        self.last = None;
    }
}

fn side(flags: u64) -> Side {
    if flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0 { Side::Private } else { Side::Shared }
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
        self.memory.fault(&self.vm, gpa, size, side(flags)).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIVATE: u64 = KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;

    #[test]
    fn a_page_that_never_comes_ends_the_domain() {
        let mut faults = Faults::default();
        for offset in 0..u64::from(MOST_FAULTS) {
            faults.count(PRIVATE, 0x5000 + offset).unwrap();
        }
        let words = "the host does not give the guest the private page at 0x5000: it was made private 1000 times in a row";
        assert_eq!(faults.count(PRIVATE, 0x5000).unwrap_err(), words);
    }

    #[test]
    fn other_pages_other_sides_and_other_exits_come_in_between() {
        let mut faults = Faults::default();
        for _ in 0..2 * MOST_FAULTS {
            faults.count(PRIVATE, 0x5000).unwrap();
            faults.count(PRIVATE, 0x6000).unwrap();
            faults.count(0, 0x6000).unwrap();
        }
        for _ in 0..2 * MOST_FAULTS {
            faults.count(0, 0x6000).unwrap();
            faults.clear();
        }
    }
}
