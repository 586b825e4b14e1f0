//! The load window of a running domain: memory slots through which the first stage sees the files.

use std::sync::Arc;

use cofferdam_api::status::Identity;
use cofferdam_confidential::{LaunchError, MemorySlot, memory_slot};
use kvm_ioctls::VmFd;
use tracing::warn;
use vm_memory::MmapRegion;

use super::{FileHash, Image};

/// Slots of a VM and what is behind them. To be dropped only when the VM does not run any more, like its RAM.
pub struct LoadWindow {
    vm: Arc<VmFd>,
    slots: Vec<MemorySlot>,
    backing: Backing,
}

/// What is behind the slots.
pub(super) struct Backing {
    /// Mappings of files.
    pub(super) image: Image,
    /// Copies of what is in no mapped file.
    pub(super) _copies: Vec<MmapRegion>,
}

impl LoadWindow {
    pub(super) fn new(vm: Arc<VmFd>, slots: Vec<MemorySlot>, backing: Backing) -> Self {
        Self { vm, slots, backing }
    }

    /// Whether it is there for our first stage alone, and nobody's when the kernel runs. Firmware of others may want what
    /// its image brought as long as it lives, and it runs in these slots.
    pub fn is_for_first_stage(&self) -> bool {
        self.backing.image.manifest.is_some()
    }

    /// See [`Image::identity`].
    pub fn identity(&self, vcpus: usize) -> Identity {
        self.backing.image.identity(u8::try_from(vcpus).unwrap_or(u8::MAX))
    }

    /// The hash of the image's file, which is there when the window is closed.
    pub fn file_hash(&self) -> FileHash {
        self.backing.image.file_hash()
    }

    /// Takes the slots from the VM, which may be running, and lets the files go. If KVM refuses, the mappings stay as
    /// long as this process: the guest could read whatever came to lie at their addresses.
    pub fn close(self) {
        let Self { vm, slots, backing } = self;
        let removed: Result<(), LaunchError> =
            slots.iter().try_for_each(|slot| memory_slot::remove(&vm, slot));
        if let Err(error) = removed {
            warn!("the load window stays: {error}");
            std::mem::forget(backing);
        }
    }
}
