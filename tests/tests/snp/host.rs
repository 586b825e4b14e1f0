//! The ground that this tier stands on.

use std::fs::{self, File};
use std::process::Command;

use cofferdam_tests::place;
use serde_json::Value;

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
}
