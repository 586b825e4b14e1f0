//! A protected domain in a jail, which has the secure processor's device beside KVM's.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use cofferdam_tests::place;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use crate::domain::{ACTIVE, Domain};

/// Nobody, as whom the jailed monitor runs.
const NOBODY: u32 = 65534;

/// Runs an image in a jail with these devices; the exit code, all that was printed, and the outcome.
fn jailed(domain: &Domain, devices: &str) -> (Option<i32>, String, Value) {
    let config = json!({
        "boot-source": {"image_path": "/image"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "confidential": {"platform": "snp"},
    });
    let file = |name: &str| domain.guest.file(name);
    fs::write(file("config.json"), config.to_string()).unwrap();
    let status = File::create(file("status")).unwrap();
    fcntl_setfd(&status, FdFlags::empty()).unwrap();
    let mut jailer = Command::new(place::jailer());
    jailer.args([
        "--id",
        "snp",
        "--uid",
        &NOBODY.to_string(),
        "--gid",
        &NOBODY.to_string(),
        "--device",
        devices,
    ]);
    jailer.arg("--exec-file").arg(place::monitor()).arg("--chroot-base-dir").arg(file("jails"));
    jailer.arg("--bind").arg(format!("{}:/image", domain.image.display()));
    jailer.arg("--bind").arg(format!("{}:/config.json", file("config.json").display()));
    jailer.args(["--", "--config-file", "/config.json", "--status-file"]);
    let output = jailer.arg(format!("fd:{}", status.as_raw_fd())).stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let lines = fs::read_to_string(file("status")).unwrap();
    let outcome = serde_json::from_str(lines.lines().last().unwrap_or_default()).unwrap_or(Value::Null);
    (output.status.code(), String::from_utf8_lossy(&text).into_owned(), outcome)
}

#[test]
fn a_jailed_domain_is_protected_if_its_jail_has_the_device() {
    let domain = Domain::new("test=hello");
    let (code, text, status) = jailed(&domain, "kvm,sev");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(ACTIVE), "{text}");
    assert_eq!(status["protected"], true, "{status:#}");
    assert_eq!(status["digest"], domain.measured(1), "{status:#}");

    let (code, text, _) = jailed(&domain, "kvm");
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("this host offers no snp: /dev/sev is missing"), "{text}");
}
