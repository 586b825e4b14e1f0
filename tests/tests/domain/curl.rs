//! Linux domains that are driven with nothing but curl, by the scripts in `tests/curl`.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_container_manifest::{Protection, Scratch, Signal, encode};
use cofferdam_tests::container::{Container, image};
use cofferdam_tests::{Guest, place};

fn drive(mode: &str) {
    let guest = Guest::new();
    let arguments = [
        guest.assets().guest_kernel.clone().into(),
        guest.file("initrd").into(),
        format!("{DEFAULT_COMMAND_LINE} quiet test=button").into(),
    ];
    run("domain.sh", mode, &arguments, "two domains");
}

fn drive_container(mode: &str) {
    let script = "trap 'exit 7' USR1; trap 'exit 8' TERM; touch /ready; while true; do sleep 0.1; done";
    let mut container = Container::new(script).stoppable(&[Signal::Usr1], Signal::Term, 60_000);
    let ready = ["/bin/sh", "-c", "until [ -e /ready ]; do sleep 0.1; done; exit 3"];
    container.manifest.host.exec = vec![ready.map(str::to_owned).into()];
    container.manifest.scratch = Some(Scratch { protection: Protection::Authenticated, size: 16 << 20 });
    let manifest = container.file("manifest.json");
    fs::write(&manifest, encode(&container.manifest).unwrap()).unwrap();
    let mut arguments = vec![image().into(), manifest.into()];
    arguments.extend(container.drives.iter().map(|(_, file, _)| OsString::from(file)));
    run("container.sh", mode, &arguments, "two containers");
}

fn run(script: &str, mode: &str, arguments: &[OsString], what: &str) {
    let output = Command::new(place::root().join("tests/curl").join(script))
        .arg(mode)
        .arg(place::monitor().parent().unwrap())
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    let last = stdout.lines().last().unwrap_or_default();
    assert!(last.starts_with(&format!("{script}: {what} ({mode}) were ")), "{stdout}\n{stderr}");
}

#[test]
fn curl_drives_plain_domains() {
    drive("plain");
}

#[test]
fn curl_drives_jailed_domains() {
    drive("jailed");
}

#[test]
fn curl_runs_containers() {
    drive_container("plain");
}

#[test]
fn curl_runs_jailed_containers() {
    drive_container("jailed");
}
