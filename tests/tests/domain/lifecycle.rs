//! Boot, console, and every way to end.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use cofferdam_api::status::ExitReason;
use cofferdam_tests::image::Image;
use cofferdam_tests::run::send;
use cofferdam_tests::{Finished, Guest, Run, place};
use rustix::process::{Signal, kill_process};

/// Checks that the guest ended for `reason` and that nothing of its domain is left.
fn check(done: &Finished, reason: ExitReason, code: i32) {
    assert_eq!(done.outcome().exit_reason, reason, "{done}");
    assert_eq!(done.code(), code, "{done}");
    assert_nothing_runs();
}

/// No monitor runs. (The tests of this tier run one after another.)
fn assert_nothing_runs() {
    let monitor = place::monitor();
    let running: Vec<PathBuf> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|process| fs::read_link(process.join("exe")).is_ok_and(|exe| exe == monitor))
        .collect();
    assert!(running.is_empty(), "a monitor still runs: {running:?}");
}

#[test]
fn the_small_guest_of_the_assets_boots() {
    let guest = Guest::new();
    let assets = guest.assets();
    let done = Run::verified(&assets.guest_kernel).with("initrd", &assets.guest_initrd).finish();
    check(&done, ExitReason::PowerOff, 0);
    assert!(done.console().contains("-cloud-amd64"), "{done}");
    assert_eq!(done.outcome().exit_code, Some(0), "{done}");
    assert!(done.outcome().phases.contains_key("user_space"), "{done}");
}

#[test]
fn every_kernel_format_and_protocol_boots_with_1_and_2_cpus() {
    let guest = Guest::new();
    let assets = guest.assets();
    for (kernel, protocol) in
        [(&assets.guest_kernel, "auto"), (&assets.guest_vmlinux, "pvh"), (&assets.guest_vmlinux, "linux64")]
    {
        for cpus in ["1", "2"] {
            let done = guest
                .run_kernel(kernel, "test=hello")
                .with("cpus", cpus)
                .with("boot-protocol", protocol)
                .finish();
            check(&done, ExitReason::PowerOff, 0);
            assert!(done.console().contains(&format!("-cloud-amd64, {cpus} CPUs")), "{protocol}: {done}");
        }
    }
}

/// By the default way: the first stage verifies a kernel of either format, and enters it.
#[test]
fn every_kernel_format_boots_through_an_image_with_1_and_2_cpus() {
    let guest = Guest::new();
    let assets = guest.assets();
    for (kernel, cpus) in [(&assets.guest_kernel, "1"), (&assets.guest_vmlinux, "2")] {
        let done = guest.run_kernel(kernel, "test=hello").with("cpus", cpus).finish();
        check(&done, ExitReason::PowerOff, 0);
        assert!(done.console().contains(&format!("-cloud-amd64, {cpus} CPUs")), "{done}");
        assert!(done.outcome().identity.manifest_hash.is_some(), "{done}");
    }
}

/// The corners of the matrix, from a file.
#[test]
#[ignore = "long: make test-all"]
fn linux_boots_from_an_image_file_with_1_to_8_cpus_and_128_mib_to_2_gib() {
    let guest = Guest::new();
    let line = format!("{} quiet test=hello", cofferdam_api::config::DEFAULT_COMMAND_LINE);
    let initrd = fs::read(guest.file("initrd")).unwrap();
    let kernel = fs::read(&guest.assets().guest_kernel).unwrap();
    let image = guest.file("domain.igvm");
    Image { initrd: &initrd, command_line: &line, ..Image::of(kernel) }.write(&image);
    for (cpus, memory) in [("1", "128M"), ("2", "256M"), ("8", "2G")] {
        let done = Run::image(&image).with("cpus", cpus).with("memory", memory).finish();
        check(&done, ExitReason::PowerOff, 0);
        assert!(done.console().contains(&format!("-cloud-amd64, {cpus} CPUs")), "{memory}: {done}");
    }
}

#[test]
#[ignore = "long: make test-all"]
fn linux_boots_with_8_cpus() {
    let guest = Guest::new();
    let done = guest.run("hello").with("cpus", "8").finish();
    check(&done, ExitReason::PowerOff, 0);
    assert!(done.console().contains("-cloud-amd64, 8 CPUs"), "{done}");
}

/// Debian's 6.12 cloud kernel says itself that it needs 72 MiB from the start of RAM, and is refused with less; with
/// little more, for this RAM disk, it runs.
#[test]
#[ignore = "long: make test-all"]
fn linux_boots_in_little_memory() {
    let guest = Guest::new();
    let line = format!("{} quiet test=hello", cofferdam_api::config::DEFAULT_COMMAND_LINE);
    let run = |memory| {
        let run = Run::new(&guest.assets().guest_kernel).with("initrd", guest.file("initrd"));
        run.with("memory", memory).with("cmdline", &line).finish()
    };
    let refused = run("64M");
    check(&refused, ExitReason::Config, 125);
    assert!(
        refused.outcome().message.contains("64 MiB is too small: the kernel needs the first"),
        "{refused}"
    );
    check(&run("80M"), ExitReason::PowerOff, 0);
}

#[test]
fn the_guests_code_passes_unchanged() {
    let guest = Guest::new();
    for code in [7, 125] {
        check(&guest.run_with("code", code).finish(), ExitReason::PowerOff, code);
    }
}

#[test]
fn reboot_and_panic_are_told_apart() {
    let guest = Guest::new();
    check(&guest.run("reboot").finish(), ExitReason::Reboot, 121);
    check(&guest.run("panic").finish(), ExitReason::Panic, 121);
}

/// Without `reboot=` Linux tries EFI, then the BIOS; by the keyboard controller or a triple fault it does what it
/// is told.
#[test]
fn linux_resets_in_every_way_it_knows() {
    let guest = Guest::new();
    for (word, reason, code) in [
        ("", ExitReason::Reboot, 121),
        ("reboot=k", ExitReason::Reboot, 121),
        ("reboot=t", ExitReason::TripleFault, 122),
    ] {
        let line = format!("console=ttyS0 panic=-1 quiet {word} test=reboot");
        check(&guest.run_line(&guest.assets().guest_kernel, &line).finish(), reason, code);
    }
}

#[test]
fn sigterm_presses_the_power_button() {
    let guest = Guest::new();
    let running = guest.run("button").with("stop-timeout", "240s").start();
    running.wait_for("waiting for the power button");
    running.signal(Signal::TERM);
    let done = running.finish();
    check(&done, ExitReason::Stopped, 143);
    assert!(done.console().contains("guest: button"), "{done}");
    assert_eq!(done.outcome().exit_code, Some(0), "{done}");
}

#[test]
fn sigterm_stops_a_guest_that_ignores_the_button() {
    let guest = Guest::new();
    let running = guest.run("idle").with("stop-timeout", "500ms").with("vsock", guest.file("v")).start();
    running.wait_for("guest: idle");
    running.signal(Signal::TERM);
    let done = running.finish();
    check(&done, ExitReason::Stopped, 143);
    assert!(done.outcome().message.contains("did not power off"), "{done}");
    assert!(guest.files().is_empty(), "{:?}", guest.files());
}

#[test]
fn a_killed_monitor_leaves_nothing() {
    let guest = Guest::new();
    let running = guest.run("idle").with("vsock", guest.file("v")).start();
    running.wait_for("guest: idle");
    kill_process(running.monitor_pid(), Signal::KILL).unwrap();
    let done = running.finish();
    check(&done, ExitReason::MonitorError, 124);
    assert!(guest.files().is_empty(), "{:?}", guest.files());
}

#[test]
fn console_input_arrives_byte_for_byte() {
    let guest = Guest::new();
    let mut running = guest.run_with("cat", 256).start();
    // Once the guest's terminal is raw it takes every byte as it is.
    running.wait_for("guest: type");
    let bytes: Vec<u8> = (0..=255).collect();
    let stdin = running.stdin();
    send(&stdin, &bytes);
    let done = running.finish();
    check(&done, ExitReason::PowerOff, 0);
    let (_, dump) =
        done.console().split_once("guest: type").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let seen: Vec<u8> =
        dump.split_whitespace().filter_map(|word| u8::from_str_radix(word, 16).ok()).collect();
    assert_eq!(seen, bytes);
}

#[test]
fn the_host_check_says_that_a_plain_domain_can_run() {
    let output = Command::new(place::cofferdam()).args(["host", "check", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["platforms"]["plain"], true);
}
