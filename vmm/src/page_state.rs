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
    use std::fs::File;
    use std::path::Path;

    use cofferdam_confidential::host;
    use cofferdam_confidential::private_memory::PrivateSlot;
    use cofferdam_firmware::layout::MIB;
    use kvm_bindings::KVM_EXIT_HYPERCALL;
    use vm_memory::FileOffset;

    use super::*;

    /// 8 MiB of private memory of a VM whose KVM has no such: what is not refused before it is asked fails.
    fn page_state() -> (PageState, VcpuFd) {
        let vm = host::require(Path::new("/dev/kvm")).unwrap().create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let file = || File::open("/dev/null").unwrap();
        let slot = PrivateSlot::new(0..8 * MIB, FileOffset::new(file(), 0), file());
        (PageState::new(Arc::new(vm), Arc::new(PrivateMemory::new(vec![slot]))), vcpu)
    }

    #[test]
    fn a_guest_that_asks_for_what_cannot_be_hears_so() {
        let (pages, mut vcpu) = page_state();
        let gate = Gate::default();
        let mut asked = |number, gpa, count, attributes| {
            vcpu.get_kvm_run().exit_reason = KVM_EXIT_HYPERCALL;
            exit::set_hypercall_result(&mut vcpu, 0xAA);
            let served = pages.hypercall(&mut vcpu, number, [gpa, count, attributes, 0, 0, 0], &gate);
            served.map(|()| exit::hypercall_result(&mut vcpu))
        };
        for attributes in [0, ENCRYPTED, ENCRYPTED | 1] {
            for (gpa, count) in [
                (0, 0),
                (1, 1),
                (8 * MIB, 1),
                (8 * MIB - PAGE_SIZE, 2),
                (0, 1 << 52 | 1),
                (PAGE_SIZE, u64::MAX / PAGE_SIZE),
                (!(PAGE_SIZE - 1), 1),
                (0, u64::MAX),
            ] {
                assert_eq!(
                    asked(HC_MAP_GPA_RANGE, gpa, count, attributes),
                    Ok(REFUSED),
                    "{gpa:#x} {count:#x}"
                );
            }
            let failed = asked(HC_MAP_GPA_RANGE, 0, 1, attributes).unwrap_err();
            assert!(failed.starts_with("KVM_SET_MEMORY_ATTRIBUTES of 0x1000 bytes at 0x0: "), "{failed}");
        }
        assert_eq!(asked(HC_MAP_GPA_RANGE + 1, 0, 1, ENCRYPTED), Err("unexpected hypercall 13".to_owned()));
    }

    #[test]
    fn an_access_to_what_is_no_ram_is_not_served() {
        let (pages, _) = page_state();
        for flags in [0, PRIVATE] {
            let refused = pages.fault(flags, 8 * MIB, 4096).unwrap_err();
            assert_eq!(refused, "0x1000 bytes at 0x800000 are not whole pages of this domain's RAM");
        }
        let moved = pages.fault(PRIVATE, 0x5000, 4096).unwrap_err();
        assert!(moved.starts_with("KVM_SET_MEMORY_ATTRIBUTES of 0x200000 bytes at 0x0: "), "{moved}");
        let moved = pages.fault(0, 0x5000, 4096).unwrap_err();
        assert!(moved.starts_with("KVM_SET_MEMORY_ATTRIBUTES of 0x1000 bytes at 0x5000: "), "{moved}");
    }

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
