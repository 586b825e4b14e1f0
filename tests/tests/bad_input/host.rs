//! A host that cannot run domains, played in a mount namespace of the command's own, in which something else is
//! mounted over `/dev/kvm`. (That each missing capability is named is tested beside the check, with a KVM that lacks it.)

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

use cofferdam_tests::host::after;
use cofferdam_tests::place;
use rustix::process::geteuid;

use crate::table::{Table, hello, without_privilege};

/// Runs `mounts` in a mount namespace of its own, and then there what is added, without privilege over files.
fn on_a_host_with(mounts: &str) -> Vec<OsString> {
    after(mounts).into_iter().chain(without_privilege().into_iter().map(OsString::from)).collect()
}

/// A row: domain and host check must be refused, in messages with all `words`.
fn refuse(row: &str, mounts: &str, words: &[&str]) {
    let mut table = Table::new();
    let socket = table.path("v.sock");
    table.refuses(row, hello().with("vsock", socket).wrapped(on_a_host_with(mounts)), words);
    table.end();

    let mut command = on_a_host_with(mounts).into_iter().chain([place::cofferdam().into()]);
    let check = Command::new(command.next().unwrap()).args(command).args(["host", "check"]).output().unwrap();
    let text = String::from_utf8(check.stdout).unwrap();
    assert_eq!(check.status.code(), Some(125), "{row}: {text}");
    let (_, remedy) = words.split_last().map(|(last, rest)| (rest, last)).unwrap();
    assert!(text.contains(remedy), "{row}: no {remedy:?} in {text}");
}

#[test]
fn no_kvm() {
    let remedy = ["sudo modprobe kvm_amd", "sudo modprobe kvm_intel", "sudo modprobe -a kvm_intel kvm_amd"];
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = |flag: &str| cpu.split_whitespace().any(|word| word == flag);
    let remedy = remedy[if has("svm") {
        0
    } else if has("vmx") {
        1
    } else {
        2
    }];
    refuse("no device", "mount -t tmpfs none /dev", &["/dev/kvm: there is no such device; ", remedy]);
    refuse("not KVM", "mount --bind /dev/null /dev/kvm", &["/dev/kvm: is not KVM's device; ", remedy]);
}

#[test]
fn no_permission() {
    let table = Table::new();
    let device = table.file("kvm", b"");
    let mount = format!("mount --bind {} /dev/kvm", device.display());
    fs::set_permissions(&device, Permissions::from_mode(0o000)).unwrap();
    let words = ["/dev/kvm: permission denied; ", "sudo setfacl -m u:$USER:rw /dev/kvm"];
    refuse("for nobody", &mount, &words);

    let groups = fs::read_to_string("/etc/group").unwrap();
    let [name, _, id, _] = *groups.lines().last().unwrap().split(':').collect::<Vec<_>>() else {
        panic!("not group(5): {groups}")
    };
    // Only root can give a file to a group of which it is no member.
    if geteuid().is_root() {
        chown(&device, None, Some(id.parse().unwrap())).unwrap();
        fs::set_permissions(&device, Permissions::from_mode(0o060)).unwrap();
        let words = ["/dev/kvm: permission denied; ", &format!("sudo usermod -aG {name} $USER")];
        refuse("for a group", &mount, &words);
    }
}
