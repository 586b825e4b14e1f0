//! The typed states of a launch.

use std::sync::Arc;

use cofferdam_api::status;
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::platform::{LaunchError, MemorySlot, Platform};

/// A launch in one of its states.
pub struct Launch<S> {
    platform: Arc<dyn Platform>,
    vm: Arc<VmFd>,
    state: S,
}

/// The VM exists and has nothing.
pub struct Created(());

/// The VM has its memory.
pub struct Populated {
    memory: Arc<GuestMemoryMmap>,
}

/// The VM has its vCPUs.
pub struct WithVcpus {
    memory: Arc<GuestMemoryMmap>,
    vcpus: Vec<VcpuFd>,
}

/// What [`Launch::finish`] leaves: a VM that can run.
pub struct Launched {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its vCPUs, by index.
    pub vcpus: Vec<VcpuFd>,
    /// Its memory, mapped as long as the VM lives.
    pub memory: Arc<GuestMemoryMmap>,
    platform: Arc<dyn Platform>,
}

impl Launch<Created> {
    /// Creates a VM of the platform's type.
    pub fn new(kvm: &Kvm, platform: Arc<dyn Platform>) -> Result<Self, LaunchError> {
        let vm_type = platform.vm_type();
        let vm = kvm
            .create_vm_with_type(vm_type)
            .map_err(|error| LaunchError::new("KVM_CREATE_VM", format!(" of type {vm_type}"), error))?;
        platform.prepare_vm(&vm)?;
        Ok(Self { platform, vm: Arc::new(vm), state: Created(()) })
    }

    /// Gives the VM its RAM, a slot per region.
    ///
    /// This comes before the interrupt controller and the vCPUs: a slot added after them
    /// waits some milliseconds for an SRCU grace period in the kernel.
    pub fn add_memory(self, memory: Arc<GuestMemoryMmap>) -> Result<Launch<Populated>, LaunchError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            self.platform.add_memory(
                &self.vm,
                &MemorySlot {
                    slot,
                    guest_address: region.start_addr().raw_value(),
                    length: region.len(),
                    host_address: region.as_ptr() as u64,
                    read_only: false,
                },
            )?;
        }
        Ok(Launch { platform: self.platform, vm: self.vm, state: Populated { memory } })
    }
}

impl Launch<Populated> {
    /// Gives the VM a range of memory beside its RAM, for the same reason at this time. The mapping behind it must stay
    /// until [`Launched::remove_window`], or as long as the VM.
    pub fn add_window(&self, slot: &MemorySlot) -> Result<(), LaunchError> {
        self.platform.add_memory(&self.vm, slot)
    }

    /// Creates `count` vCPUs, with their local APICs in the kernel and the I/O APIC outside it.
    /// `reserved_pins` is what KVM calls the I/O APIC's pins in a split irqchip (24 is what TDX wants).
    pub fn create_vcpus(self, count: u8, reserved_pins: u8) -> Result<Launch<WithVcpus>, LaunchError> {
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args = [u64::from(reserved_pins), 0, 0, 0];
        self.vm
            .enable_cap(&split)
            .map_err(|error| LaunchError::new("KVM_ENABLE_CAP", " of a split irqchip", error))?;
        let vcpus = (0..count)
            .map(|index| {
                self.vm
                    .create_vcpu(u64::from(index))
                    .map_err(|error| LaunchError::new("KVM_CREATE_VCPU", format!(" {index}"), error))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Launch {
            platform: self.platform,
            vm: self.vm,
            state: WithVcpus { memory: self.state.memory, vcpus },
        })
    }
}

impl Launch<WithVcpus> {
    /// The vCPUs, whose registers are set now.
    pub fn vcpus(&self) -> &[VcpuFd] {
        &self.state.vcpus
    }

    /// Seals the launch.
    pub fn finish(self) -> Result<Launched, LaunchError> {
        self.platform.finish(&self.vm, &self.state.vcpus)?;
        Ok(Launched {
            vm: self.vm,
            vcpus: self.state.vcpus,
            memory: self.state.memory,
            platform: self.platform,
        })
    }
}

impl<S> Launch<S> {
    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }
}

impl Launched {
    /// Takes away what [`Launch::add_window`] gave.
    pub fn remove_window(&self, slot: &MemorySlot) -> Result<(), LaunchError> {
        self.platform.remove_memory(&self.vm, slot)
    }

    /// The platform that the domain was launched on.
    pub fn platform(&self) -> status::Platform {
        self.platform.kind()
    }

    /// Whether the domain is protected. It follows from the finished launch alone.
    pub fn protected(&self) -> bool {
        self.platform.protects()
    }
}
