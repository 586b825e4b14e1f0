use super::*;
use crate::config::{BootMode, BootProtocol, BootSource, Drive, Serial, SerialMode, Vsock};
use crate::config::{RateLimiter, TokenBucket};

fn config() -> DomainConfig {
    DomainConfig::from_json(
        br#"{"boot-source": {"kernel_image_path": "vmlinux"},
             "drives": [{"drive_id": "a", "path_on_host": "a.img"},
                        {"drive_id": "b", "path_on_host": "b.img"}],
             "vsock": {"guest_cid": 3, "uds_path": "v.sock"}}"#,
    )
    .unwrap()
}

/// What `validate` says of [`config`] after `change`.
fn refusal(change: impl FnOnce(&mut DomainConfig)) -> String {
    let mut config = config();
    change(&mut config);
    config.validate().unwrap_err().to_string()
}

fn accepted(change: impl FnOnce(&mut DomainConfig)) {
    let mut config = config();
    change(&mut config);
    config.validate().unwrap();
}

#[test]
fn machine_limits() {
    for count in [1, 32] {
        accepted(|c| c.machine.vcpu_count = count);
    }
    for mib in [32, 65_536] {
        accepted(|c| c.machine.mem_size_mib = mib);
    }
    assert_eq!(
        refusal(|c| c.machine.vcpu_count = 33),
        "machine-config.vcpu_count: 33 is not between 1 and 32"
    );
    assert_eq!(refusal(|c| c.machine.vcpu_count = 0), "machine-config.vcpu_count: 0 is not between 1 and 32");
    for mib in [0, 31, 65_537, u64::MAX] {
        assert_eq!(
            refusal(|c| c.machine.mem_size_mib = mib),
            format!("machine-config.mem_size_mib: {mib} is not between 32 and 65536")
        );
    }
}

#[test]
fn command_line_limits() {
    accepted(|c| c.boot.boot_args = Some("x".repeat(2048)));
    accepted(|c| c.boot.boot_args = Some(String::new()));
    assert_eq!(
        refusal(|c| c.boot.boot_args = Some("x".repeat(2049))),
        "boot-source.boot_args: 2049 bytes long; at most 2048 are possible"
    );
    assert_eq!(
        refusal(|c| c.boot.boot_args = Some("a\0b".into())),
        "boot-source.boot_args: has a NUL byte at position 1"
    );
    // The part that a root device adds counts too.
    let long = refusal(|c| {
        c.boot.boot_args = Some("x".repeat(2040));
        c.drives[0].is_root_device = true;
    });
    assert_eq!(
        long,
        "boot-source.boot_args: 2057 bytes long with the root device's \"root=/dev/vda rw\"; at most 2048 \
         are possible"
    );
}

#[test]
fn an_image_comes_alone() {
    let image = |c: &mut DomainConfig| {
        c.boot = BootSource { image_path: Some("i.igvm".into()), ..BootSource::default() }
    };
    accepted(image);
    accepted(|c| c.boot.boot_mode = Some(BootMode::Image));
    accepted(|c| c.boot.boot_mode = Some(BootMode::Direct));
    let own = "an image has its own; leave it out beside boot-source.image_path";
    type Change = fn(&mut DomainConfig);
    let cases: [(Change, &str, &str); 7] = [
        (|c| c.boot.kernel_image_path = Some("k".into()), "boot-source.kernel_image_path", own),
        (|c| c.boot.initrd_path = Some("i".into()), "boot-source.initrd_path", own),
        (|c| c.boot.boot_args = Some(String::new()), "boot-source.boot_args", own),
        (
            |c| c.boot.boot_mode = Some(BootMode::Direct),
            "boot-source.boot_mode",
            "the kernel of an image is loaded by its first stage",
        ),
        (
            |c| c.boot.image_path = None,
            "boot-source.kernel_image_path",
            "is missing, and so is boot-source.image_path",
        ),
        (
            |c| c.boot.boot_protocol = BootProtocol::Pvh,
            "boot-source.boot_protocol",
            "the first stage enters a kernel by linux64 only",
        ),
        (|c| c.boot.image_path = Some("".into()), "boot-source.image_path", "is empty"),
    ];
    for (change, field, reason) in cases {
        let message = refusal(|c| {
            image(c);
            change(c);
        });
        assert_eq!(message, format!("{field}: {reason}"));
    }
    let message = refusal(|c| {
        image(c);
        c.drives[0].is_root_device = true;
    });
    assert_eq!(
        message,
        "drives[0].is_root_device: would add to the command line, but that of an image is fixed"
    );
}

#[test]
fn boot_files() {
    assert_eq!(
        refusal(|c| c.boot.kernel_image_path = Some("".into())),
        "boot-source.kernel_image_path: is empty"
    );
    assert_eq!(
        refusal(|c| c.boot.initrd_path = Some("i\0".into())),
        "boot-source.initrd_path: has a NUL byte at position 1"
    );
    assert_eq!(
        refusal(|c| c.boot.initrd_path = Some("i".repeat(4096).into())),
        "boot-source.initrd_path: 4096 bytes long; at most 4095 are possible"
    );
}

#[test]
fn drive_ids() {
    accepted(|c| c.drives[1].drive_id = "aZ09_-".into());
    accepted(|c| c.drives[1].drive_id = "x".repeat(64));
    assert_eq!(refusal(|c| c.drives[1].drive_id = String::new()), "drives[1].drive_id: is empty");
    assert_eq!(
        refusal(|c| c.drives[1].drive_id = "x".repeat(65)),
        "drives[1].drive_id: 65 bytes long; at most 64 are possible"
    );
    for id in ["a/b", "é", "a b", ".."] {
        assert!(refusal(|c| c.drives[0].drive_id = id.into()).starts_with("drives[0].drive_id: "));
    }
    assert_eq!(refusal(|c| c.drives[1].drive_id = "a".into()), "drives[1].drive_id: \"a\" is used twice");
}

#[test]
fn drive_fields() {
    accepted(|c| c.drives[0].block_size = 4096);
    assert_eq!(
        refusal(|c| c.drives[1].block_size = 1024),
        "drives[1].block_size: 1024 is neither 512 nor 4096"
    );
    assert_eq!(refusal(|c| c.drives[1].path_on_host = "".into()), "drives[1].path_on_host: is empty");
    accepted(|c| c.drives[1].is_root_device = true);
    let two_roots = refusal(|c| {
        c.drives[0].is_root_device = true;
        c.drives[1].is_root_device = true;
    });
    assert_eq!(two_roots, "drives[1].is_root_device: drives[0] is the root device already");
}

#[test]
fn rate_limits() {
    let bucket = |size, refill_time| Some(TokenBucket { size, one_time_burst: None, refill_time });
    accepted(|c| c.drives[0].rate_limiter = Some(RateLimiter { bandwidth: bucket(1, 1), ops: bucket(1, 1) }));
    // As Firecracker's, they limit nothing.
    accepted(|c| {
        c.drives[0].rate_limiter = Some(RateLimiter { bandwidth: bucket(0, 1), ops: bucket(1, 0) });
    });
}

#[test]
fn descriptors_have_numbers_and_one_use() {
    accepted(|c| {
        c.boot.kernel_image_path = Some("fd:3".into());
        c.boot.initrd_path = Some("fd:4".into());
        c.drives[0].path_on_host = "fd:5".into();
        c.drives[1].path_on_host = "./fd:5".into();
        c.vsock.as_mut().unwrap().uds_path = "fd:6".into();
        c.serial = serde_json::from_str(r#"{"serial_out_path": "fd:7"}"#).unwrap();
    });
    for bad in ["fd:", "fd:2", "fd:x", "fd:3/a"] {
        let refused = |field: &str, message: String| {
            assert_eq!(message, format!("{field}: {:?} is not a descriptor from 3 on", &bad[3..]));
        };
        refused("boot-source.kernel_image_path", refusal(|c| c.boot.kernel_image_path = Some(bad.into())));
        refused("boot-source.initrd_path", refusal(|c| c.boot.initrd_path = Some(bad.into())));
        refused("drives[1].path_on_host", refusal(|c| c.drives[1].path_on_host = bad.into()));
        refused("vsock.uds_path", refusal(|c| c.vsock.as_mut().unwrap().uds_path = bad.into()));
        let serial = Serial { mode: SerialMode::File, serial_out_path: Some(bad.into()), rate_limiter: None };
        refused("serial.serial_out_path", refusal(|c| c.serial = serial));
    }
    let twice = refusal(|c| {
        c.boot.initrd_path = Some("fd:5".into());
        c.drives[1].path_on_host = "fd:5".into();
    });
    assert_eq!(twice, "drives[1].path_on_host: fd:5 is given twice; boot-source.initrd_path has it");
}

#[test]
fn device_count() {
    let drives = |count: usize| -> Vec<Drive> {
        let one = config().drives[0].clone();
        (0..count).map(|n| Drive { drive_id: format!("d{n}"), ..one.clone() }).collect()
    };
    accepted(|c| c.drives = drives(63));
    assert_eq!(
        refusal(|c| c.drives = drives(64)),
        "drives: 65 devices with the vsock device; at most 64 are possible"
    );
    accepted(|c| {
        c.drives = drives(64);
        c.vsock = None;
    });
}

#[test]
fn vsock_limits() {
    fn vsock(c: &mut DomainConfig) -> &mut Vsock {
        c.vsock.as_mut().unwrap()
    }
    accepted(|c| vsock(c).uds_path = "s".repeat(96).into());
    assert_eq!(
        refusal(|c| vsock(c).uds_path = "s".repeat(97).into()),
        "vsock.uds_path: 97 bytes long; at most 96 are possible"
    );
    assert_eq!(refusal(|c| vsock(c).uds_path = "".into()), "vsock.uds_path: is empty");
    accepted(|c| vsock(c).guest_cid = u32::MAX - 1);
    for cid in [0, 2, u32::MAX] {
        assert_eq!(
            refusal(|c| vsock(c).guest_cid = cid),
            format!("vsock.guest_cid: {cid} is not between 3 and 4294967294")
        );
    }
}

#[test]
fn serial_and_stop() {
    let file =
        |mode, path: Option<&str>| Serial { mode, serial_out_path: path.map(Into::into), rate_limiter: None };
    accepted(|c| c.serial = file(SerialMode::File, Some("log")));
    accepted(|c| c.serial = file(SerialMode::None, None));
    assert_eq!(
        refusal(|c| c.serial = file(SerialMode::File, None)),
        "serial.serial_out_path: is missing, and serial.mode is \"File\""
    );
    assert_eq!(refusal(|c| c.serial = file(SerialMode::File, Some(""))), "serial.serial_out_path: is empty");
    assert_eq!(
        refusal(|c| c.serial = file(SerialMode::None, Some("log"))),
        "serial.serial_out_path: is given, but serial.mode is None"
    );
    accepted(|c| c.stop_timeout_ms = 0);
    assert!(refusal(|c| c.stop_timeout_ms = u64::MAX).starts_with("stop_timeout_ms: "));
}

#[test]
fn domain_ids() {
    assert!(check_id("--id", "web-1_a").is_ok());
    assert_eq!(
        check_id("--id", "a.b").unwrap_err().to_string(),
        "--id: \"a.b\" may only have letters, digits, \"_\" and \"-\""
    );
}
