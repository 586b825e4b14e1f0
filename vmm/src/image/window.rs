//! The load window of a running domain: memory slots through which the first stage sees the files.

use std::ops::Range;

use cofferdam_api::status::Identity;
use cofferdam_firmware::layout::PAGE_SIZE;
use cofferdam_firmware::manifest::Kernel;
use kvm_ioctls::VcpuFd;
use tracing::warn;
use vm_memory::MmapRegion;

use super::{FileHash, Image};
use crate::prefault::prefault;

/// What is behind the slots of the window. To be dropped only when the VM does not run any more, like its RAM.
pub struct LoadWindow {
    /// Mappings of files.
    image: Image,
    /// Copies of what is in no mapped file.
    copies: Vec<MmapRegion>,
    /// Guest-physical addresses of the slots.
    slots: Vec<Range<u64>>,
}

impl LoadWindow {
    pub(super) fn new(image: Image, copies: Vec<MmapRegion>, slots: Vec<Range<u64>>) -> Self {
        Self { image, copies, slots }
    }

    /// Maps for a vCPU that has not run what the first stage is going to read, all of it, and where it copies the kernel to.
    pub fn prefault(&self, vcpu: &VcpuFd) {
        let Some(manifest) = &self.image.manifest else { return };
        let Kernel { address, file, .. } = manifest.kernel;
        let start = address & !(PAGE_SIZE - 1);
        let end = address.saturating_add(file.size).next_multiple_of(PAGE_SIZE);
        for pages in self.slots.iter().chain([&(start..end)]) {
            prefault(vcpu, pages);
        }
    }

    /// Whether it is there for our first stage alone, and nobody's when the kernel runs. Firmware of others may want what
    /// its image brought as long as it lives, and it runs in these slots.
    pub fn is_for_first_stage(&self) -> bool {
        self.image.manifest.is_some()
    }

    /// See [`Image::identity`].
    pub fn identity(&self, vcpus: usize) -> Identity {
        self.image.identity(u8::try_from(vcpus).unwrap_or(u8::MAX))
    }

    /// The hash of the image's file, which is there when the window is closed.
    pub fn file_hash(&self) -> FileHash {
        self.image.file_hash()
    }

    /// Lets the files go, while the VM may be running: it reads zeros there from now on. The few pages of which there is a
    /// copy stay as long as this process.
    pub fn close(self) {
        std::mem::forget(self.copies);
        for mapping in self.image.into_mappings() {
            if let Err(error) = mapping.empty() {
                warn!("a file of the load window stays mapped: {error}");
            }
        }
    }
}
