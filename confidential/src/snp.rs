//! AMD SEV-SNP by the mainline kernel's KVM interface.
//!
//! The order of a launch (Linux `Documentation/virt/kvm/x86/amd-memory-encryption.rst`):
//!
//! | step | command | when |
//! |---|---|---|
//! | a guest context, an ASID; who has certificates | `KVM_SEV_INIT2`, `KVM_SEV_SNP_ENABLE_REQ_CERTS` | [`Platform::prepare_vm`] |
//! | RAM, twice | `KVM_CREATE_GUEST_MEMFD`, `KVM_SET_USER_MEMORY_REGION2` | [`Platform::add_memory`] |
//! | the policy | `KVM_SEV_SNP_LAUNCH_START` | [`Platform::begin`] |
//! | each run of pages | `KVM_SET_MEMORY_ATTRIBUTES`, `KVM_SEV_SNP_LAUNCH_UPDATE` | [`Platform::load`] |
//! | save areas of the vCPUs, ID block, host data | `KVM_SEV_SNP_LAUNCH_FINISH` | [`Platform::finish`] |
//!
//! What is handed over is measured here as the secure processor measures it. Only the image's own pages become private
//! at the launch; the guest claims all others.

pub mod certificates;
pub mod command;
pub mod cpuid;
pub mod registers;
pub mod termination;
mod update;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use cofferdam_api::status;
use cofferdam_firmware::layout::PAGE_SIZE;
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_MP_STATE_AP_RESET_HOLD, KVM_SEV_SNP_PAGE_TYPE_CPUID,
    KVM_SEV_SNP_PAGE_TYPE_NORMAL, KVM_SEV_SNP_PAGE_TYPE_SECRETS, KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
    KVM_X86_SNP_VM, kvm_enable_cap, kvm_mp_state, kvm_sev_init, kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start, kvm_sev_snp_launch_update,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use self::command::{EnableCertificateRequests, launch};
use crate::digest::id_block::{IdAuthentication, IdBlock};
use crate::digest::snp::{LaunchDigest, LaunchPage, VMSA_GPA};
use crate::digest::vmsa::Vmsa;
use crate::image::compose::DEFAULT_SNP_POLICY;
use crate::image::importer::{ImagePlatform, PAGE, PageKind, PlatformInfo, SnpIdBlock, VcpuContext};
use crate::memory_slot;
use crate::platform::{LaunchError, LaunchPages, MemorySlot, Platform, Ram, Sealed};
use crate::private_memory::{PrivateMemory, PrivateSlot, Side};
use crate::sys;

/// The hypercall by which a guest moves pages from one side to the other (Linux `include/uapi/linux/kvm_para.h`).
pub const HC_MAP_GPA_RANGE: u64 = 12;
/// GHCB protocol that a guest may speak: 2 is the first with what SNP needs.
const GHCB_VERSION: u16 = 2;
/// Guest policy (SNP firmware ABI, 4.3), bit 19: the host may debug the guest, and so read and change everything.
const POLICY_DEBUG: u64 = 1 << 19;
/// Pages that are handed over at once: KVM passes them on one by one.
const MOST_PAGES: u64 = 256;

/// What the owner of a domain wants of its launch.
#[derive(Clone, Debug, Default)]
pub struct SnpOptions {
    /// The guest policy, in place of the image's.
    pub policy: Option<u64>,
    /// Data that attestation reports show, and nobody interprets.
    pub host_data: [u8; 32],
    /// ID block and authentication, in place of the image's.
    pub id: Option<Box<(IdBlock, IdAuthentication)>>,
    /// Whether the monitor is asked for certificates when the guest fetches a report.
    pub certificates: bool,
}

/// A page, aligned like one.
#[derive(Clone, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
struct AlignedPage([u8; PAGE]);

/// The launch of an SNP guest.
pub struct Snp {
    /// `/dev/sev`.
    sev: File,
    options: SnpOptions,
    policy: u64,
    memory: Option<Arc<PrivateMemory>>,
    digest: LaunchDigest,
    /// By vCPU, as KVM builds them.
    contexts: BTreeMap<u16, Vmsa>,
    id: Option<Box<(IdBlock, IdAuthentication)>>,
}

impl Snp {
    /// A launch through the secure processor's device, normally `/dev/sev`.
    pub fn new(device: &Path, options: SnpOptions) -> io::Result<Self> {
        Ok(Self {
            sev: OpenOptions::new().read(true).write(true).open(device)?,
            options,
            policy: DEFAULT_SNP_POLICY,
            memory: None,
            digest: LaunchDigest::new(),
            contexts: BTreeMap::new(),
            id: None,
        })
    }

    /// Hands over pages with one command, or more where KVM stops in between.
    fn update(
        &mut self,
        vm: &VmFd,
        gpa: u64,
        kind: PageKind,
        pages: &mut [AlignedPage],
    ) -> Result<(), LaunchError> {
        let bytes = pages.as_mut_bytes();
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: gpa / PAGE_SIZE,
            uaddr: bytes.as_mut_ptr() as u64,
            len: bytes.len() as u64,
            type_: page_type(kind)? as u8,
            ..Default::default()
        };
        update::hand_over(&mut update, |update| {
            let gpa = update.gfn_start.saturating_mul(PAGE_SIZE);
            let at = format!(" of {} at {gpa:#x}", name(kind, update.len / PAGE_SIZE));
            launch(vm, &self.sev, update, &at)
        })?;
        self.measure(gpa, kind, pages);
        Ok(())
    }

    /// As [`Self::update`], of a CPUID page. Returns what the firmware wanted changed in it, in words.
    fn update_cpuid(
        &mut self,
        vm: &VmFd,
        gpa: u64,
        page: &mut AlignedPage,
    ) -> Result<Option<String>, LaunchError> {
        cpuid::hand_over(gpa, page, |page| {
            self.update(vm, gpa, PageKind::SnpCpuid, std::slice::from_mut(page))
        })
    }

    fn measure(&mut self, gpa: u64, kind: PageKind, pages: &[AlignedPage]) {
        let addresses = (gpa..).step_by(PAGE);
        for (gpa, page) in addresses.zip(pages) {
            let page = match kind {
                PageKind::Measured => LaunchPage::Normal(&page.0),
                PageKind::SnpSecrets => LaunchPage::Secrets,
                PageKind::SnpCpuid => LaunchPage::Cpuid,
                PageKind::Unmeasured | PageKind::Shared | PageKind::SnpCpuidXf => LaunchPage::Unmeasured,
            };
            self.digest.add_page(gpa, page);
        }
    }

    /// What can be said of the domain once its launch is finished.
    fn sealed(&self) -> Sealed {
        Sealed {
            protected: self.policy & POLICY_DEBUG == 0,
            policy: Some(self.policy),
            digest: Some(self.digest.value()),
        }
    }

    fn private(&self) -> Result<&Arc<PrivateMemory>, LaunchError> {
        self.memory.as_ref().ok_or_else(|| LaunchError::Unsupported("there is no private memory".to_owned()))
    }
}

/// All are measured, so all are known: those of which the image says nothing in the state of [`Vmsa::reset`].
fn save_area(contexts: &BTreeMap<u16, Vmsa>, index: u16) -> Cow<'_, Vmsa> {
    contexts.get(&index).map_or_else(|| Cow::Owned(Vmsa::reset()), Cow::Borrowed)
}

fn page_type(kind: PageKind) -> Result<u32, LaunchError> {
    match kind {
        PageKind::Measured => Ok(KVM_SEV_SNP_PAGE_TYPE_NORMAL),
        PageKind::Unmeasured => Ok(KVM_SEV_SNP_PAGE_TYPE_UNMEASURED),
        PageKind::SnpSecrets => Ok(KVM_SEV_SNP_PAGE_TYPE_SECRETS),
        PageKind::SnpCpuid => Ok(KVM_SEV_SNP_PAGE_TYPE_CPUID),
        PageKind::Shared | PageKind::SnpCpuidXf => {
            Err(LaunchError::Unsupported(format!("a page of kind {kind:?} in an SNP domain")))
        }
    }
}

/// Some pages in words.
fn name(kind: PageKind, pages: u64) -> String {
    let kind = match kind {
        PageKind::Measured => "measured",
        PageKind::Unmeasured => "unmeasured",
        PageKind::Shared => "shared",
        PageKind::SnpSecrets => "secrets",
        PageKind::SnpCpuid | PageKind::SnpCpuidXf => "CPUID",
    };
    format!("{pages} {kind} page{}", if pages == 1 { "" } else { "s" })
}

impl Platform for Snp {
    fn kind(&self) -> status::Platform {
        status::Platform::Snp
    }

    fn image_platform(&self) -> ImagePlatform {
        ImagePlatform::Snp
    }

    fn vm_type(&self) -> u64 {
        u64::from(KVM_X86_SNP_VM)
    }

    fn shows_memory_encryption(&self) -> bool {
        true
    }

    fn prepare_vm(&mut self, vm: &VmFd) -> Result<(), LaunchError> {
        // Without, KVM refuses the guest every change of a page's side.
        let mut exits = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
        exits.args = [1 << HC_MAP_GPA_RANGE, 0, 0, 0];
        vm.enable_cap(&exits).map_err(|error| {
            LaunchError::new("KVM_ENABLE_CAP", " of exits for KVM_HC_MAP_GPA_RANGE", error)
        })?;
        let mut init = kvm_sev_init { ghcb_version: GHCB_VERSION, ..Default::default() };
        launch(vm, &self.sev, &mut init, "")?;
        if self.options.certificates {
            launch(vm, &self.sev, &mut EnableCertificateRequests, "")?;
        }
        Ok(())
    }

    fn add_memory(&mut self, vm: &VmFd, ram: &[Ram]) -> Result<Option<Arc<PrivateMemory>>, LaunchError> {
        let slot = |ram: &Ram| {
            let slot = &ram.slot;
            let shared = ram.file.clone();
            let shared =
                shared.ok_or_else(|| LaunchError::Unsupported("RAM that is in no memfd".to_owned()))?;
            let private = sys::guest_memfd(vm, slot.length)?;
            sys::add_private_slot(vm, slot, &private)?;
            let end = slot.guest_address.saturating_add(slot.length);
            Ok(PrivateSlot::new(slot.guest_address..end, shared, private))
        };
        let slots = ram.iter().map(slot).collect::<Result<Vec<_>, LaunchError>>()?;
        Ok(self.memory.insert(Arc::new(PrivateMemory::new(slots))).clone().into())
    }

    /// KVM has no read-only slots here; a guest that writes to a mapping that the host only reads ends.
    fn add_window(&self, vm: &VmFd, slot: &MemorySlot) -> Result<(), LaunchError> {
        memory_slot::add(vm, &MemorySlot { read_only: false, ..*slot })
    }

    fn begin(&mut self, vm: &VmFd, info: &PlatformInfo) -> Result<(), LaunchError> {
        self.policy = self.options.policy.or(info.policy).unwrap_or(DEFAULT_SNP_POLICY);
        let mut start = kvm_sev_snp_launch_start { policy: self.policy, ..Default::default() };
        launch(vm, &self.sev, &mut start, &format!(" with policy {:#x}", self.policy))
    }

    fn load(
        &mut self,
        vm: &VmFd,
        _memory: &GuestMemoryMmap,
        pages: &LaunchPages<'_>,
    ) -> Result<Option<String>, LaunchError> {
        let mut change = None;
        let length = pages.pages.saturating_mul(PAGE_SIZE);
        self.private()?.convert(vm, pages.gpa, length, Side::Private, |_| true)?;
        let mut bytes = pages.bytes;
        let (mut gpa, mut left) = (pages.gpa, pages.pages);
        while left != 0 {
            let count = left.min(MOST_PAGES);
            // Not more than `MOST_PAGES`.
            let mut buffer = vec![AlignedPage([0; PAGE]); count as usize];
            let (now, later) = bytes.split_at(bytes.len().min(buffer.as_bytes().len()));
            buffer.as_mut_bytes().iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            match (pages.kind, buffer.as_mut_slice()) {
                (PageKind::SnpCpuid, [page]) => change = self.update_cpuid(vm, gpa, page)?,
                (kind, buffer) => self.update(vm, gpa, kind, buffer)?,
            }
            bytes = later;
            gpa = gpa.saturating_add(count.saturating_mul(PAGE_SIZE));
            left = left.saturating_sub(count);
        }
        Ok(change)
    }

    fn set_context(&mut self, index: u16, context: &VcpuContext<'_>) -> Result<(), LaunchError> {
        let VcpuContext::SnpVmsa { gpa, vmsa } = context else {
            return Err(LaunchError::Unsupported("a vCPU of another platform in an SNP domain".to_owned()));
        };
        if *gpa != VMSA_GPA {
            let error = format!("the VMSA of vCPU {index} is for {gpa:#x}, and KVM has it at {VMSA_GPA:#x}");
            return Err(LaunchError::Unsupported(error));
        }
        let built = Vmsa::from_page(vmsa)
            .as_kvm_builds()
            .map_err(|source| LaunchError::Registers { index, source })?;
        match self.contexts.insert(index, built) {
            None => Ok(()),
            Some(_) => Err(LaunchError::Unsupported(format!("two contexts for vCPU {index}"))),
        }
    }

    fn save_area(&self, index: u16) -> Option<Cow<'_, Vmsa>> {
        Some(save_area(&self.contexts, index))
    }

    fn set_id_block(&mut self, block: &SnpIdBlock) -> Result<(), LaunchError> {
        let id = (IdBlock::of_image(block, self.policy), IdAuthentication::of_image(block));
        self.id = Some(Box::new(id));
        Ok(())
    }

    fn finish(&mut self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<Sealed, LaunchError> {
        let id = self.options.id.as_deref().or(self.id.as_deref());
        let mut finish =
            kvm_sev_snp_launch_finish { host_data: self.options.host_data, ..Default::default() };
        if let Some((block, authentication)) = id {
            finish.id_block_uaddr = block.as_bytes().as_ptr() as u64;
            finish.id_auth_uaddr = authentication.as_bytes().as_ptr() as u64;
            finish.id_block_en = 1;
            finish.auth_key_en = u8::from(authentication.author_key_algorithm != 0);
        }
        for (index, _) in (0..).zip(vcpus) {
            let save_area = save_area(&self.contexts, index);
            self.digest.add_vmsa(&save_area);
        }
        let with = if id.is_some() { " with an ID block" } else { "" };
        launch(vm, &self.sev, &mut finish, with)?;
        // The first one starts the others, which KVM would not even let wait for that in their state after a reset.
        for (index, vcpu) in vcpus.iter().enumerate().skip(1) {
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_AP_RESET_HOLD })
                .map_err(|error| LaunchError::new("KVM_SET_MP_STATE", format!(" of vCPU {index}"), error))?;
        }
        Ok(self.sealed())
    }
}

#[cfg(test)]
mod tests;
