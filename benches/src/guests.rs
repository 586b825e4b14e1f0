//! Linux guests under both monitors: this half prepares and makes the rows, the
//! other one ([`crate::inside`]) runs the guests, where there is hardware
//! virtualisation or in the rig.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cofferdam_tests::place;
use xtask::assets::Assets;
use xtask::initramfs::InitramfsBuilder;
use xtask::modules::ModuleTree;
use xtask::peer::Peer;
use xtask::rig::{self, Request};

use crate::inside::{Findings, Plan};
use crate::report::{Better, Row, Subject};
use crate::{Result, peers, progress};

/// How long all guests together may take.
const PATIENCE: Duration = Duration::from_secs(1300);

const fn row(name: &'static str, unit: &'static str, better: Better, goal: f64) -> Subject {
    Subject { name, unit, better, goal: Some(goal) }
}

/// What is measured, by the name that a guest gives it.
pub const SUBJECTS: [(&str, Subject); 8] = [
    ("boot", row("Debian kernel to busybox init and out", "s", Better::Lower, 0.8)),
    ("random_read", row("block, random 4 KiB reads", "IO/s", Better::Higher, 1.0)),
    ("random_write", row("block, random 4 KiB writes", "IO/s", Better::Higher, 1.0)),
    ("sequential_read", row("block, sequential reads", "MiB/s", Better::Higher, 1.0)),
    ("sequential_write", row("block, sequential writes", "MiB/s", Better::Higher, 1.0)),
    ("vsock_send", row("vsock, guest to host", "MiB/s", Better::Higher, 1.0)),
    ("vsock_receive", row("vsock, host to guest", "MiB/s", Better::Higher, 1.0)),
    ("vsock_round_trip", row("vsock, round trip of 64 bytes", "µs", Better::Lower, 1.0)),
];

const BOOT_INIT: &[u8] = b"#!/bin/sh\necho bench boot 0\npoweroff -f\n";
const DEVICES_INIT: &str = "#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for m in $(cat /modules); do
    insmod \"/m/$m.ko\"
done
/bench-guest /dev/vda PORT
poweroff -f
";

const HASH: Subject =
    Subject { name: "first stage, copy and SHA-256", unit: "MiB/s", better: Better::Higher, goal: None };

/// How much is measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rounds {
    /// Guests of each monitor that boot and end.
    pub boots: usize,
    /// Measurements of each kind in a guest of each monitor.
    pub devices: usize,
    /// Measurements of the first stage.
    pub hashes: usize,
}

/// Prepares, runs the inner half, and makes the rows.
pub fn run(rounds: Rounds) -> Result<Vec<Row>> {
    progress("fetching what is missing of the guests, the rig and the peer");
    let assets = Assets::fetch()?;
    let peer = Peer::fetch()?;
    let directory = tempfile::tempdir_in("/tmp")?;
    let reference_name = format!("QEMU {} microvm", peer.version);
    let plan = Plan {
        cofferdam: place::monitor(),
        peer,
        kernel: assets.guest_vmlinux.clone(),
        boot_initrd: directory.path().join("boot-initrd"),
        devices_initrd: directory.path().join("devices-initrd"),
        boot_rounds: rounds.boots,
        device_rounds: rounds.devices,
        payload: place::payload("first"),
        hash_rounds: rounds.hashes,
    };
    write_initrds(&assets, &plan)?;
    let path = directory.path().join("plan.json");
    fs::write(&path, serde_json::to_vec(&plan)?)?;
    let findings: Findings = serde_json::from_slice(&inner_half(&assets, "inside", &path)?)?;
    Ok(rows(&findings, &reference_name))
}

fn rows(findings: &Findings, reference_name: &str) -> Vec<Row> {
    let row = |(name, subject): &(&str, Subject)| {
        Some(subject.row(findings.ours.get(*name)?, findings.theirs.get(*name)?, reference_name))
    };
    let (first_stage, host) = &findings.hash;
    let hash = (!host.is_empty()).then(|| HASH.row(first_stage, host, "the same code on the host"));
    hash.into_iter().chain(SUBJECTS.iter().filter_map(row)).collect()
}

fn write_initrds(assets: &Assets, plan: &Plan) -> Result<()> {
    let applets = ["sh", "cat", "echo", "mount", "insmod", "poweroff"];
    let mut boot = InitramfsBuilder::new();
    boot.busybox(&assets.busybox, &applets)?.file("init", 0o755, BOOT_INIT);
    fs::write(&plan.boot_initrd, boot.build())?;
    let init = DEVICES_INIT.replace("PORT", &peers::PORT.to_string());
    let modules = ["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport"];
    let mut devices = InitramfsBuilder::new();
    devices
        .busybox(&assets.busybox, &applets)?
        .program("bench-guest", &place::bench_guest())?
        .file("init", 0o755, init.as_bytes())
        .modules(&ModuleTree::open(&assets.guest_modules)?.resolve(&modules)?);
    fs::write(&plan.devices_initrd, devices.build())?;
    Ok(())
}

/// Runs `bench WORD PLAN` where guests run; returns its stdout.
pub fn inner_half(assets: &Assets, word: &str, plan: &Path) -> Result<Vec<u8>> {
    let program = std::env::current_exe()?;
    if xtask::hardware_kvm() {
        let output = Command::new(program).arg(word).arg(plan).stderr(Stdio::inherit()).output()?;
        return if output.status.success() { Ok(output.stdout) } else { Err("the guests failed".into()) };
    }
    progress("no hardware virtualisation: starting the rig");
    let request = Request::new(vec![program.into(), word.into(), plan.into()], PATIENCE);
    let mut output = Vec::new();
    match rig::run(assets, &request, &mut output, &mut std::io::stderr())? {
        0 => Ok(output),
        code => Err(format!("the guests failed with status {code}").into()),
    }
}
