//! What a launch refuses before it asks the host, and that nothing is sealed which the host has not sealed. The VM is a plain one of this
//! machine's KVM, which knows none of the commands.

use std::path::Path;

use super::*;
use crate::host;

fn snp(policy: Option<u64>) -> Snp {
    // The commands need a descriptor, and are refused before it is used.
    Snp::new(Path::new("/dev/null"), SnpOptions { policy, ..SnpOptions::default() }).unwrap()
}

fn plain_vm() -> VmFd {
    host::require(Path::new("/dev/kvm")).unwrap().create_vm().unwrap()
}

fn info(policy: Option<u64>) -> PlatformInfo {
    PlatformInfo {
        platform: ImagePlatform::Snp,
        mask: 1,
        highest_vtl: 0,
        shared_gpa_boundary: 0,
        policy,
        cca_policy: None,
    }
}

fn page(vmsa: &Vmsa) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page.iter_mut().zip(vmsa.as_bytes()).for_each(|(to, from)| *to = *from);
    page
}

#[test]
fn a_launch_that_the_host_does_not_finish_is_not_sealed() {
    let vm = plain_vm();
    let mut snp = snp(None);
    let refused = |error: LaunchError| {
        assert!(matches!(error, LaunchError::Command { .. }), "{error}");
        error.to_string()
    };
    assert!(refused(snp.begin(&vm, &info(None)).unwrap_err()).contains("LAUNCH_START with policy 0x30000"));
    assert!(refused(snp.finish(&vm, &[]).unwrap_err()).contains("LAUNCH_FINISH"));
}

#[test]
fn the_options_policy_comes_before_the_images() {
    let vm = plain_vm();
    for (option, image, expected) in [
        (None, None, DEFAULT_SNP_POLICY),
        (None, Some(0x3_0001), 0x3_0001),
        (Some(0xb_0000), Some(0x3_0001), 0xb_0000),
    ] {
        let mut snp = snp(option);
        snp.begin(&vm, &info(image)).unwrap_err();
        assert_eq!(snp.policy, expected);
    }
}

#[test]
fn a_domain_that_its_host_may_debug_is_not_protected() {
    let sealed = |policy| {
        let mut snp = snp(None);
        snp.policy = policy;
        snp.sealed()
    };
    for (policy, protected) in [
        (DEFAULT_SNP_POLICY, true),
        (0x3_0000 | 1 << 18 | 1 << 20, true),
        (DEFAULT_SNP_POLICY | POLICY_DEBUG, false),
        (u64::MAX, false),
        (!POLICY_DEBUG, true),
    ] {
        let sealed = sealed(policy);
        assert_eq!((sealed.protected, sealed.policy), (protected, Some(policy)), "{policy:#x}");
    }
    assert_eq!(POLICY_DEBUG, 0x8_0000);
}

#[test]
fn every_vcpu_has_one_save_area_where_kvm_has_it() {
    let page = page(&Vmsa::reset());
    let context = |gpa| VcpuContext::SnpVmsa { gpa, vmsa: &page };
    let mut snp = snp(None);
    snp.set_context(0, &context(VMSA_GPA)).unwrap();
    let refused = |snp: &mut Snp, index, context: &VcpuContext<'_>| {
        let error = snp.set_context(index, context).unwrap_err();
        assert!(error.is_of_image(), "{error}");
        error.to_string()
    };
    assert_eq!(refused(&mut snp, 0, &context(VMSA_GPA)), "two contexts for vCPU 0");
    assert!(
        refused(&mut snp, 1, &context(VMSA_GPA - 4096))
            .starts_with("the VMSA of vCPU 1 is for 0xffffffffe000")
    );
    let other = VcpuContext::Cca { x: [0; 8], pc: 0, flags: 0 };
    assert_eq!(refused(&mut snp, 1, &other), "a vCPU of another platform in an SNP domain");
    // SEV_FEATURES without SNP.
    let mut unprotected = page;
    unprotected[0x3b0] = 0;
    let context = VcpuContext::SnpVmsa { gpa: VMSA_GPA, vmsa: &unprotected };
    assert!(refused(&mut snp, 1, &context).contains("sev_features"));
}

#[test]
fn pages_are_of_a_kind_that_the_secure_processor_has() {
    for kind in [PageKind::Shared, PageKind::SnpCpuidXf] {
        assert!(page_type(kind).unwrap_err().is_of_image(), "{kind:?}");
    }
    let kinds = [PageKind::Measured, PageKind::Unmeasured, PageKind::SnpSecrets, PageKind::SnpCpuid];
    // Linux, arch/x86/include/uapi/asm/kvm.h.
    assert_eq!(kinds.map(|kind| page_type(kind).unwrap()), [1, 4, 5, 6]);
}

#[test]
fn there_are_no_pages_without_private_memory() {
    let mut snp = snp(None);
    let vm = plain_vm();
    let memory = GuestMemoryMmap::new();
    let pages = LaunchPages { kind: PageKind::Measured, gpa: 0, pages: 1, bytes: &[1] };
    let error = snp.load(&vm, &memory, &pages).unwrap_err();
    assert_eq!(error.to_string(), "there is no private memory");
    let slot = MemorySlot { slot: 0, guest_address: 0, length: 4096, host_address: 0, read_only: false };
    let error = snp.add_memory(&vm, &[Ram { slot, file: None }]).unwrap_err();
    assert_eq!(error.to_string(), "RAM that is in no memfd");
}

#[test]
fn the_digest_is_of_pages_that_were_handed_over() {
    let mut snp = snp(None);
    let before = snp.digest.value();
    let mut pages = vec![AlignedPage([7; PAGE]); 2];
    snp.update(&plain_vm(), 0x1_0000, PageKind::Measured, &mut pages).unwrap_err();
    assert_eq!(snp.digest.value(), before);
}
