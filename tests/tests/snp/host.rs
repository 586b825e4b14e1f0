//! The ground that this tier stands on.

use std::fs::{self, File};
use std::process::Command;

use cofferdam_tests::api::ApiMonitor;
use cofferdam_tests::place;
use serde_json::Value;
use xtask::rig;

use crate::domain::Domain;

#[test]
fn the_host_runs_guests_with_snp() {
    let parameter = fs::read_to_string("/sys/module/kvm_amd/parameters/sev_snp").unwrap();
    assert_eq!(parameter.trim(), "Y");
    File::options().read(true).write(true).open("/dev/sev").unwrap();
}

#[test]
fn the_host_check_says_so() {
    let output = Command::new(place::cofferdam()).args(["host", "check", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["platforms"]["snp"], true, "{report:#}");
    let checks = report["checks"].as_array().unwrap();
    let reason = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!((&check["ok"], &check["remedy"]), (&Value::Bool(true), &Value::Null), "{check:#}");
        check["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason("snp"), "KVM makes SEV-SNP guests, and /dev/sev is there");
    assert!(reason("snp_policy_bits").contains(": SMT, DEBUG, SINGLE_SOCKET"), "{report:#}");
    assert!(reason("snp_features").starts_with("0x"), "{report:#}");
    assert!(reason("snp_certificates").contains("--snp-certs"), "{report:#}");
    let (firmware, asids) = (reason("snp_firmware"), reason("snp_asids"));
    if rig::inside() {
        // Those of the emulated secure processor and processor; other tests run guests.
        assert!(firmware.starts_with("interface 1.55, build 32, guests: "), "{firmware}");
        assert!(asids.ends_with(" of 49 are left for guests"), "{asids}");
    }
}

/// A monitor that runs a domain answers the same, but for what it may not ask.
#[test]
fn a_running_monitor_asks_no_secure_processor() {
    let domain = Domain::new("test=idle");
    let folder = tempfile::tempdir().unwrap();
    let monitor = ApiMonitor::start(folder.path());
    let config = serde_json::json!({
        "boot-source": {"image_path": domain.image},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "confidential": {"platform": "snp"},
        "serial": {"mode": "None"},
    });
    // What is configured says nothing of a launch.
    monitor.done("PUT /vm", &config.to_string());
    let (_, before) = monitor.ask("GET /vm", "");
    let claims = ["platform", "digest", "policy"].map(|field| &before[field]);
    assert_eq!((claims, &before["protected"]), ([&Value::Null; 3], &Value::Bool(false)), "{before:#}");
    monitor.done("PUT /vm?start=true", &config.to_string());
    let (status, report) = monitor.ask("GET /host", "");
    assert_eq!((status, &report["platforms"]["snp"]), (200, &Value::Bool(true)), "{report:#}");
    let text = report.to_string();
    assert!(text.contains("a monitor that runs a domain may not ask the secure processor"), "{report:#}");
    let (_, status) = monitor.ask("GET /vm", "");
    assert_eq!((&status["platform"], &status["protected"]), (&"snp".into(), &true.into()), "{status:#}");
    assert_eq!(status["digest"], domain.measured(1), "{status:#}");
}
