//! What is asked of SEV-SNP and cannot be: each refusal says what was asked, and who said no.

use std::fs;
use std::path::PathBuf;

use cofferdam_api::status::{ExitReason, Platform};
use cofferdam_tests::Run;
use cofferdam_tests::image::{Image, bz_image};
use tempfile::TempDir;

use crate::domain::{Domain, run};

/// An image with a kernel that is never reached.
fn small_image(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("domain.igvm");
    Image { command_line: "quiet", ..Image::of(bz_image()) }.write(&path);
    path
}

/// Checks the end of a domain that was never launched; returns the message.
fn refused(run: Run, reason: ExitReason) -> String {
    let done = run.with("memory", "64M").finish();
    let outcome = done.outcome();
    assert_eq!(outcome.exit_reason, reason, "{done}");
    assert_eq!((outcome.platform, outcome.protected), (None, false), "{done}");
    assert_eq!((&outcome.identity.policy, &outcome.identity.digest), (&None, &None), "{done}");
    outcome.message
}

/// Where in an image file the first vCPU's save area is, by its PAT and SEV_FEATURES.
fn save_area(image: &[u8]) -> usize {
    let has = |page: &[u8]| page[0x268..0x270] == 0x0007_0406_0007_0406_u64.to_le_bytes() && page[0x3b0] == 1;
    image.chunks(4096).position(|page| page.len() == 4096 && has(page)).unwrap() * 4096
}

/// KVM builds save areas itself. What it could not build must not be lost in silence.
#[test]
fn registers_that_kvm_cannot_set_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let good = fs::read(&image).unwrap();
    let start = save_area(&good);
    for (field, offset) in [("virtual_tom", 0x3c8), ("sev_features", 0x3b1), ("g_pat", 0x268), ("dr7", 0x160)]
    {
        let mut bytes = good.clone();
        bytes[start + offset] ^= 0x10;
        fs::write(&image, bytes).unwrap();
        let message = refused(run(&image, 1), ExitReason::Config);
        assert!(message.contains(&format!("vCPU 0: VMSA field {field} (offset ")), "{message}");
        assert!(message.contains("in what KVM builds and measures"), "{message}");
    }
}

#[test]
fn what_the_host_refuses_has_the_call_and_what_it_was_about() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    // RAPL_DIS: a bit that firmware may have, and the emulated one does not.
    let message = refused(run(&image, 1).with("snp-policy", "0x830000"), ExitReason::LaunchRefused);
    assert!(message.contains("KVM_SEV_SNP_LAUNCH_START with policy 0x830000: Invalid argument"), "{message}");
    // An interface of the firmware that is newer than it.
    let message = refused(run(&image, 1).with("snp-policy", "0x300ff"), ExitReason::LaunchRefused);
    assert!(message.contains("with policy 0x300ff: "), "{message}");
    assert!(message.ends_with("; the secure processor says POLICY_FAILURE (0x7)"), "{message}");
}

#[test]
fn a_domain_that_the_host_may_debug_is_not_protected() {
    let domain = Domain::new("test=hello");
    let debug = || domain.run(1, "256M").with("snp-policy", "0xb0000");
    let done = debug().finish();
    assert_eq!(done.code(), 0, "{done}");
    let outcome = done.outcome();
    assert_eq!((outcome.platform, outcome.protected), (Some(Platform::Snp), false), "{done}");
    assert_eq!(outcome.identity.policy.as_deref(), Some("0xb0000"), "{done}");
    let done = debug().flag("require-protected").finish();
    assert_eq!(done.code(), 125, "{done}");
    let message = done.outcome().message;
    assert_eq!(message, "confidential.require_protected: the guest policy lets the host debug the domain");
}
