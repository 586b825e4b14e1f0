//! Jails of somebody who is not root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Command, Stdio};

use cofferdam_tests::place;

use crate::jail::*;

/// The user, and the group that may open /dev/kvm.
const NOBODY: u32 = 65534;
const KVM: &str = "61236";

/// A jailer and a monitor that anybody may execute, and a base for jails that is the user's.
fn base() -> Base {
    let base = Base::new();
    fs::set_permissions(base.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(base.jails(), Some(NOBODY), Some(NOBODY)).unwrap();
    for program in [place::jailer(), place::monitor(), place::payload("hello")] {
        fs::copy(&program, base.directory.path().join(program.file_name().unwrap())).unwrap();
    }
    base
}

/// A jailer that the user starts, who is in `groups`.
fn jailer(base: &Base, groups: &str) -> Command {
    let program = |name| base.directory.path().join(name);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", groups]).arg(program("cofferdam-jailer"));
    command.args(["--id", "a", "--uid", "7", "--gid", "8", "--chroot-base-dir"]).arg(base.jails());
    command.arg("--exec-file").arg(program("cofferdam-vmm"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn somebody_who_is_not_root_has_jails_too() {
    let _alone = alone();
    let base = base();
    let mut command = jailer(&base, "--clear-groups");
    command.args(["--", "--version"]);
    let (code, text) = run(command);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("offerdam"), "{text}");
    assert!(base.is_empty());
}

#[test]
fn whoever_may_open_kvm_has_domains_in_jails() {
    let _alone = alone();
    let base = base();
    let kernel = format!("{}:/kernel", base.directory.path().join("hello").display());
    let text = r#"{"boot-source":{"kernel_image_path":"/kernel"},"machine-config":{"vcpu_count":1,"mem_size_mib":32}}"#;
    let config = format!("{}:/config.json", base.file("config.json", text).display());
    // As udev does it: a group owns the device.
    let node = base.directory.path().join("kvm").display().to_string();
    let device = format!(
        "mknod -m 660 {node} c $(stat -c '0x%t 0x%T' /dev/kvm) && chgrp {KVM} {node} && mount --bind {node} /dev/kvm"
    );
    let groups = format!("--groups={KVM}");
    for (groups, expected, words) in [
        (groups.as_str(), Some(42), "hello from a payload"),
        ("--clear-groups", Some(125), "/dev/kvm: permission denied"),
    ] {
        let mut command = jailer(&base, groups);
        command.args(["--bind", &kernel, "--bind", &config]);
        let (code, text) = run(after(&device, &with_config(command)));
        fs::remove_file(&node).unwrap();
        assert_eq!(code, expected, "{groups}: {text}");
        assert!(text.contains(words), "{groups}: {text}");
        assert!(base.is_empty(), "{:?}", base.left());
    }
}
