//! Images of Debian's kernel.

use std::fs;
use std::path::Path;
use std::process::Command;

use cofferdam_tests::place;
use serde_json::Value;

use crate::guest::Guest;

/// Length of the initial RAM disk, bytes.
const INITRD: u64 = 20 << 20;

/// Runs `cofferdam image` and returns what it prints.
fn image(words: &[&str], folder: &Path) -> String {
    let output =
        Command::new(place::cofferdam()).arg("image").args(words).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_image_is_the_same_wherever_it_is_built_and_little_of_it_is_measured() {
    let guest = Guest::new();
    let initrd = guest.file("initrd");
    // The kernel reads over zeroes behind an initial RAM disk.
    fs::OpenOptions::new().write(true).open(&initrd).unwrap().set_len(INITRD).unwrap();
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let build = |kernel: &Path, initrd: &Path, folder: &Path| {
        let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
        image(&["build", "--kernel", kernel, "--initrd", initrd, "-o", "domain.igvm"], folder);
        fs::read(folder.join("domain.igvm")).unwrap()
    };
    let first = build(&guest.assets().guest_kernel, &initrd, here.path());
    fs::copy(&guest.assets().guest_kernel, there.path().join("k")).unwrap();
    fs::copy(&initrd, there.path().join("i")).unwrap();
    let second = build(Path::new("k"), Path::new("i"), there.path());
    assert!(first == second);

    let report = image(&["inspect", "domain.igvm", "--json"], there.path());
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(report["measured_pages"]["snp"].as_u64().unwrap() <= 13, "{report}");
    assert_eq!(report["manifest"]["initrd"]["size"], INITRD);
    assert_eq!(report["manifest"]["kernel"]["intact"], true);
    // It can run in a domain of 128 MiB.
    assert!(report["manifest"]["min_memory"].as_u64().unwrap() <= 128 << 20, "{report}");
}
