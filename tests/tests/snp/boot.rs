//! One file, everywhere.

use cofferdam_api::status::Platform;
use cofferdam_tests::Run;
use cofferdam_tests::snp::Log;
use xtask::linux;

use crate::domain::{ACTIVE, Domain, succeeded};

/// Boots `domain` with SEV-SNP, and counts what passed through the secure processor.
fn boots(domain: &Domain, cpus: u32, memory: &str) {
    let log = Log::from_now_on();
    let done = domain.run(cpus, memory).finish();
    succeeded(&done);
    assert!(done.console().contains(&format!("-cloud-amd64, {cpus} CPUs")), "{done}");
    assert!(done.console().contains(ACTIVE), "{done}");
    let Some(log) = log else { return };
    let launches = log.launches();
    let [launch] = launches.as_slice() else { panic!("{launches:?}") };
    assert!(launch.pages() <= 12 + cpus, "{launch:?}");
    assert_eq!(launch.vmsa, cpus);
}

#[test]
fn the_same_file_boots_on_plain_and_with_snp() {
    let domain = Domain::new("test=hello");
    let plain = Run::image(&domain.image).with("platform", "plain").with("memory", "128M").finish();
    assert_eq!(plain.code(), 0, "{plain}");
    assert_eq!((plain.outcome().platform, plain.outcome().protected), (Some(Platform::Plain), false));
    assert!(!plain.console().contains("Memory Encryption"), "{plain}");
    boots(&domain, 1, "128M");
    boots(&domain, 2, "512M");
    boots(&domain, 1, "1G");
}

#[test]
#[ignore = "long: make test-all"]
fn it_boots_with_4_cpus_and_2_gib() {
    let domain = Domain::new("test=hello");
    boots(&domain, 4, "512M");
    boots(&domain, 2, "2G");
    boots(&domain, 2, "128M");
    boots(&domain, 2, "1G");
    // With RAM beyond the gap below 4 GiB.
    boots(&domain, 2, "4G");
}

#[test]
#[ignore = "long: make test-all"]
fn other_kernels_boot() {
    let domain = Domain::of(|assets| assets.guest_vmlinux.clone(), "test=hello", &[]);
    boots(&domain, 2, "512M");
    let newer = linux::newer_kernel().expect("`cargo xtask snp-tests --long` names it");
    // The modules of the other kernel are of no use to it, and not needed.
    let domain = Domain::of(|_| newer, "test=hello", &[]);
    let done = domain.run(2, "512M").finish();
    succeeded(&done);
    assert!(done.console().contains("guest: kernel 7."), "{done}");
    assert!(done.console().contains("2 CPUs") && done.console().contains(ACTIVE), "{done}");
}

/// What a host with SEV-SNP does by itself with an image that is for it.
#[test]
fn auto_takes_snp() {
    let domain = Domain::new("test=hello");
    succeeded(&Run::image(&domain.image).with("memory", "256M").flag("require-protected").finish());
}
