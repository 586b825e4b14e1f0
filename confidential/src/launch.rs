//! The typed states of a launch.

use std::borrow::Cow;
use std::sync::Arc;

use cofferdam_api::status;
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::digest::vmsa::Vmsa;
use crate::image::importer::{ImagePlatform, PlatformInfo, SnpIdBlock, VcpuContext};
use crate::platform::{LaunchError, LaunchPages, MemorySlot, Platform, Ram, Sealed};
use crate::private_memory::PrivateMemory;

/// A launch in one of its states.
pub struct Launch<S> {
    platform: Box<dyn Platform>,
    vm: Arc<VmFd>,
    state: S,
}

/// The VM exists and has nothing.
pub struct Created(());

/// The VM has its memory.
pub struct Populated {
    memory: Memory,
}

/// The VM has its vCPUs.
pub struct WithVcpus {
    memory: Memory,
    vcpus: Vec<VcpuFd>,
}

struct Memory {
    shared: Arc<GuestMemoryMmap>,
    private: Option<Arc<PrivateMemory>>,
}

/// What [`Launch::finish`] leaves: a VM that can run.
pub struct Launched {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its vCPUs, by index.
    pub vcpus: Vec<VcpuFd>,
    /// Its memory, mapped as long as the VM lives.
    pub memory: Arc<GuestMemoryMmap>,
    /// Its private memory, where the platform has such.
    pub private: Option<Arc<PrivateMemory>>,
    /// Its device stays open: KVM sends a guest's requests to the secure processor by the descriptor of the launch.
    platform: Box<dyn Platform>,
    sealed: Sealed,
}

impl Launch<Created> {
    /// Creates a VM of the platform's type.
    pub fn new(kvm: &Kvm, mut platform: Box<dyn Platform>) -> Result<Self, LaunchError> {
        let vm_type = platform.vm_type();
        let vm = kvm
            .create_vm_with_type(vm_type)
            .map_err(|error| LaunchError::new("KVM_CREATE_VM", format!(" of type {vm_type}"), error))?;
        platform.prepare_vm(&vm)?;
        Ok(Self { platform, vm: Arc::new(vm), state: Created(()) })
    }

    /// Gives the VM its RAM, a slot per region, each of which is a mapping of a memfd where memory can be private.
    ///
    /// This comes before the interrupt controller and the vCPUs: a slot added after them
    /// waits some milliseconds for an SRCU grace period in the kernel.
    pub fn add_memory(mut self, memory: Arc<GuestMemoryMmap>) -> Result<Launch<Populated>, LaunchError> {
        let ram: Vec<_> = (0..).zip(memory.iter()).map(|(number, region)| ram(number, region)).collect();
        let private = self.platform.add_memory(&self.vm, &ram)?;
        let memory = Memory { shared: memory, private };
        Ok(Launch { platform: self.platform, vm: self.vm, state: Populated { memory } })
    }
}

fn ram(slot: u32, region: &GuestRegionMmap) -> Ram {
    Ram {
        slot: MemorySlot {
            slot,
            guest_address: region.start_addr().raw_value(),
            length: region.len(),
            host_address: region.as_ptr() as u64,
            read_only: false,
        },
        file: region.file_offset().cloned(),
    }
}

impl Launch<Populated> {
    /// Gives the VM a range of memory beside its RAM, for the same reason at this time. Something must stay mapped behind
    /// it as long as the VM.
    pub fn add_window(&self, slot: &MemorySlot) -> Result<(), LaunchError> {
        self.platform.add_window(&self.vm, slot)
    }

    /// Begins to load an image, of which `info` tells.
    pub fn begin(&mut self, info: &PlatformInfo) -> Result<(), LaunchError> {
        self.platform.begin(&self.vm, info)
    }

    /// Puts pages of the image into RAM. Returns what was changed in them, in words for whoever started the domain.
    pub fn load(&mut self, pages: &LaunchPages<'_>) -> Result<Option<String>, LaunchError> {
        self.platform.load(&self.vm, &self.state.memory.shared, pages)
    }

    /// Takes note of how a vCPU begins.
    pub fn set_context(&mut self, index: u16, context: &VcpuContext<'_>) -> Result<(), LaunchError> {
        self.platform.set_context(index, context)
    }

    /// Takes the image's ID block.
    pub fn set_id_block(&mut self, block: &SnpIdBlock) -> Result<(), LaunchError> {
        self.platform.set_id_block(block)
    }

    /// The domain's RAM, as far as the host shares it.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.state.memory.shared
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

    /// What the registers of vCPU `index` have to be set to, where the platform measures them.
    pub fn save_area(&self, index: u8) -> Option<Cow<'_, Vmsa>> {
        self.platform.save_area(index.into())
    }

    /// The domain's private memory, where the platform has such.
    pub fn private_memory(&self) -> Option<&Arc<PrivateMemory>> {
        self.state.memory.private.as_ref()
    }

    /// Seals the launch.
    pub fn finish(mut self) -> Result<Launched, LaunchError> {
        let sealed = self.platform.finish(&self.vm, &self.state.vcpus)?;
        let Memory { shared, private } = self.state.memory;
        Ok(Launched {
            vm: self.vm,
            vcpus: self.state.vcpus,
            memory: shared,
            private,
            platform: self.platform,
            sealed,
        })
    }
}

impl<S> Launch<S> {
    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Which part of an image is for the platform.
    pub fn image_platform(&self) -> ImagePlatform {
        self.platform.image_platform()
    }

    /// Whether guests are shown the host's memory encryption.
    pub fn shows_memory_encryption(&self) -> bool {
        self.platform.shows_memory_encryption()
    }
}

impl Launched {
    /// The platform that the domain was launched on.
    pub fn platform(&self) -> status::Platform {
        self.platform.kind()
    }

    /// What the platform sealed.
    pub fn sealed(&self) -> &Sealed {
        &self.sealed
    }
}
