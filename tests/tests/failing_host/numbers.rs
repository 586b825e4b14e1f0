//! The numbers that a domain has to bear.

use std::fs;

use cofferdam_tests::{Run, place};

use crate::payload;

#[test]
fn eight_vcpus() {
    for _ in 0..5 {
        let done = payload("smp").with("cpus", "8").with("cmdline", "cpus=8").finish();
        assert_eq!((done.code(), done.console().as_str()), (0, "cpus 8\n"), "{done}");
    }
}

/// From the smallest to the largest, a page in every 64 MiB of it is used, and the last one.
#[test]
fn memory_from_32_mib_to_64_gib() {
    for (mib, pages) in [(32, 2), (33, 2), (3072, 49), (3073, 50), (4096, 66), (65536, 1026)] {
        let done = Run::new(place::payload("memory"))
            .with("memory", format!("{mib}M"))
            .with("cmdline", format!("mib={mib} step=64"))
            .finish();
        assert_eq!(done.code(), 0, "{mib} MiB: {done}");
        assert_eq!(done.console(), format!("{pages} pages\n"), "{mib} MiB: {done}");
    }
}

#[test]
fn every_page_of_32_mib() {
    let done = payload("memory").with("cmdline", "mib=32").finish();
    assert_eq!((done.code(), done.console().as_str()), (0, "4096 pages\n"), "{done}");
}

#[test]
fn twenty_drives_each_with_its_own_content() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = payload("disks");
    for index in 0..20_u8 {
        let disk = folder.path().join(index.to_string());
        fs::write(&disk, vec![index + 100; 1 << 16]).unwrap();
        let mode = if index % 2 == 0 { "" } else { ",ro" };
        run = run.with("drive", format!("path={}{mode}", disk.display()));
    }
    let done = run.with("cmdline", "repeat=20").finish();
    assert_eq!(done.code(), 20, "{done}");
    for index in 0..20 {
        let line = format!("disk {index}: 20 done, 0 failed, first byte {}", index + 100);
        assert!(done.console().lines().any(|seen| seen == line), "no {line:?}: {done}");
    }
}
