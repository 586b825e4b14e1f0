//! Images of Debian's kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_api::status::ExitReason;
use cofferdam_tests::host::page_faults;
use cofferdam_tests::run::send;
use cofferdam_tests::{Guest, Run, place};
use serde_json::Value;

/// Length of the initial RAM disk, bytes.
const INITRD: u64 = 20 << 20;

/// Runs `cofferdam image` and returns what it prints.
fn image(words: &[&str], folder: &Path) -> String {
    let output =
        Command::new(place::cofferdam()).arg("image").args(words).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A guest whose initial RAM disk has 20 MiB.
fn large_guest() -> Guest {
    let guest = Guest::new();
    // The kernel reads over zeroes behind an initial RAM disk.
    fs::OpenOptions::new().write(true).open(guest.file("initrd")).unwrap().set_len(INITRD).unwrap();
    guest
}

/// Makes `domain.igvm` of the guest, whose init gets `words`. Returns the folder that it is in.
fn image_of(guest: &Guest, words: &str) -> PathBuf {
    let kernel = guest.assets().guest_kernel.to_str().unwrap();
    let folder = guest.file("initrd").parent().unwrap().to_owned();
    let line = format!("{DEFAULT_COMMAND_LINE} quiet {words}");
    let words = ["build", "--kernel", kernel, "--initrd", "initrd", "--cmdline", &line, "-o", "domain.igvm"];
    image(&words, &folder);
    folder
}

/// What is said of `domain.igvm` in `folder`.
fn inspected(folder: &Path) -> Value {
    serde_json::from_str(&image(&["inspect", "domain.igvm", "--json"], folder)).unwrap()
}

#[test]
fn an_image_is_the_same_wherever_it_is_built_and_little_of_it_is_measured() {
    let guest = large_guest();
    let initrd = guest.file("initrd");
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

    let report = inspected(there.path());
    assert!(report["measured_pages"]["snp"].as_u64().unwrap() <= 13, "{report}");
    assert_eq!(report["manifest"]["initrd"]["size"], INITRD);
    assert_eq!(report["manifest"]["kernel"]["intact"], true);
    // It can run in a domain of 128 MiB.
    assert!(report["manifest"]["min_memory"].as_u64().unwrap() <= 128 << 20, "{report}");
}

#[test]
fn one_file_boots_with_1_to_8_cpus_and_128_mib_to_2_gib() {
    let guest = large_guest();
    let folder = image_of(&guest, "test=hello");
    let mut hashes = Vec::new();
    for (cpus, memory) in [("1", "128M"), ("2", "512M"), ("8", "2G")] {
        let done = Run::image(folder.join("domain.igvm")).with("cpus", cpus).with("memory", memory).finish();
        assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{done}");
        assert!(done.console().contains(&format!("-cloud-amd64, {cpus} CPUs")), "{done}");
        hashes.push(done.outcome().identity.image_hash.unwrap());
    }
    let report = inspected(&folder);
    assert!(hashes.iter().all(|hash| report["sha256"] == **hash), "{hashes:?}");
}

/// Page faults of a guest, the only one, until its user space waits.
fn page_faults_of(run: Run) -> u64 {
    let mut running = run.start();
    running.wait_for("guest: type");
    let faults = page_faults();
    send(running.stdin(), b"x");
    assert_eq!(running.finish().code(), 0);
    faults
}

/// What the first stage reads, and where it copies the kernel to, is mapped before it begins; and when the window is closed, the pages that
/// the guest has in use stay mapped. Each alone costs thousands of faults.
#[test]
#[ignore = "long: make test-all"]
fn the_first_stage_costs_no_page_faults() {
    let guest = Guest::new();
    let run = || guest.run_with("cat", 1);
    let (image, direct) = (page_faults_of(run()), page_faults_of(run().with("boot", "direct")));
    assert!(image < direct, "{image}; without the first stage {direct}");
}

/// Nobody waits for it at the end: what becomes of the file once it is read does not matter.
#[test]
#[ignore = "long: make test-all"]
fn the_hash_of_the_file_is_read_while_the_domain_runs() {
    let guest = large_guest();
    let folder = image_of(&guest, "test=cat argument=1");
    let report = inspected(&folder);

    let mut running = Run::image(folder.join("domain.igvm")).with("memory", "256M").start();
    running.wait_for("guest: type");
    let (size, counts) = (report["size"].as_u64().unwrap(), format!("/proc/{}/io", running.monitor_pid()));
    let end = Instant::now() + Duration::from_secs(240);
    // Bytes that it has read: the guest has no drive, and the window is no file that is read.
    while !fs::read_to_string(&counts)
        .unwrap()
        .lines()
        .any(|line| line.strip_prefix("rchar: ").is_some_and(|bytes| bytes.parse::<u64>().unwrap() > size))
    {
        assert!(Instant::now() < end, "the file is not read");
        thread::sleep(Duration::from_millis(10));
    }
    fs::write(folder.join("domain.igvm"), "").unwrap();
    send(running.stdin(), b"x");
    let outcome = running.finish().outcome();
    assert_eq!(outcome.identity.image_hash.as_deref(), report["sha256"].as_str());
}
