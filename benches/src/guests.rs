//! Linux guests under both monitors, in turns: the outer half prepares and makes
//! the rows, the inner half ([`run_inside`]) runs the guests, where there is
//! hardware virtualisation or in the rig.
//!
//! Everything that the inner half needs is copied to memory first, so that
//! neither monitor waits for a disk. A guest reports what it measured on its
//! console. It measures by its own clock; that this runs at the host's speed is
//! checked over the whole of its measurements.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam_tests::place;
use serde::{Deserialize, Serialize};
use xtask::assets::Assets;
use xtask::initramfs::InitramfsBuilder;
use xtask::modules::ModuleTree;
use xtask::peer::Peer;
use xtask::rig::{self, Request};

use crate::machines::{Guest, Machines, Monitor};
use crate::report::{Better, Row, Subject};
use crate::{Result, peers, progress};

/// What both get on their command lines, and what is added to measure devices.
const COMMAND_LINE: &str = "console=ttyS0 reboot=a panic=-1 pci=off";
const QUIET: &str = " quiet";
/// Size of the disk, MiB.
const DISK: usize = 128;
/// How long all guests together may take.
const PATIENCE: Duration = Duration::from_secs(1300);
/// By how much a guest's clock may be off.
const CLOCK_TOLERANCE: f64 = 0.05;

const fn row(name: &'static str, unit: &'static str, better: Better, goal: f64) -> Subject {
    Subject { name, unit, better, goal: Some(goal) }
}

/// What is measured, by the name that a guest gives it.
const SUBJECTS: [(&str, Subject); 8] = [
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
read -r now _ < /proc/uptime && echo bench start $now
/bench-guest block /dev/vda
/bench-guest vsock PORT
read -r now _ < /proc/uptime && echo bench end $now
poweroff -f
";

/// What the inner half is told.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    cofferdam: PathBuf,
    peer: Peer,
    kernel: PathBuf,
    boot_initrd: PathBuf,
    devices_initrd: PathBuf,
    boot_rounds: usize,
    device_rounds: usize,
}

/// Samples of one monitor, by name.
type Samples = BTreeMap<String, Vec<f64>>;

/// What the inner half says.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Findings {
    ours: Samples,
    theirs: Samples,
}

/// Prepares, runs the inner half, and makes the rows. `boot_rounds` and `device_rounds` are the numbers of guests of
/// each monitor.
pub fn run(boot_rounds: usize, device_rounds: usize) -> Result<Vec<Row>> {
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
        boot_rounds,
        device_rounds,
    };
    write_initrds(&assets, &plan)?;
    let path = directory.path().join("plan.json");
    fs::write(&path, serde_json::to_vec(&plan)?)?;
    let findings: Findings = serde_json::from_slice(&inner_half(&assets, &path)?)?;
    SUBJECTS
        .iter()
        .map(|(name, subject)| {
            let samples = |of: &Samples| of.get(*name).cloned().ok_or(format!("no sample of {name}"));
            Ok(subject.row(&samples(&findings.ours)?, &samples(&findings.theirs)?, &reference_name))
        })
        .collect()
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

/// Runs `bench inside PLAN`; returns its stdout.
fn inner_half(assets: &Assets, plan: &Path) -> Result<Vec<u8>> {
    let program = std::env::current_exe()?;
    if xtask::hardware_kvm() {
        let output = Command::new(program).arg("inside").arg(plan).stderr(Stdio::inherit()).output()?;
        return if output.status.success() { Ok(output.stdout) } else { Err("the guests failed".into()) };
    }
    progress("no hardware virtualisation: starting the rig");
    let request = Request {
        command: vec![program.into(), "inside".into(), plan.into()],
        environment: rig::default_environment(),
        shares: Vec::new(),
        memory: 4096,
        cpus: 2,
        timeout: PATIENCE,
        console: None,
    };
    let mut output = Vec::new();
    match rig::run(assets, &request, &mut output, &mut std::io::stderr())? {
        0 => Ok(output),
        code => Err(format!("the guests failed with status {code}").into()),
    }
}

/// The inner half: runs the guests of `plan`, and writes its findings to stdout.
pub fn run_inside(plan: &Path) -> Result<()> {
    let mut plan: Plan = serde_json::from_slice(&fs::read(plan)?)?;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let machines = move_to_memory(&mut plan, directory.path())?;
    let boot = Guest {
        kernel: plan.kernel,
        initrd: plan.boot_initrd,
        command_line: COMMAND_LINE.to_owned(),
        disk: None,
    };
    let devices = Guest {
        initrd: plan.devices_initrd,
        command_line: format!("{COMMAND_LINE}{QUIET}"),
        disk: Some(directory.path().join("disk")),
        ..boot.clone()
    };
    let mut findings = Findings::default();
    in_turns("boot", plan.boot_rounds, &mut findings, |monitor| time_boot(&machines, monitor, &boot))?;
    peers::serve_unix(&machines.vsock())?;
    peers::serve_vhost()?;
    in_turns("devices", plan.device_rounds, &mut findings, |monitor| {
        measure_devices(&machines, monitor, &devices)
    })?;
    println!("{}", serde_json::to_string(&findings)?);
    Ok(())
}

/// Copies everything below `directory`, and fills the disk: what has no blocks yet would be quicker to read.
fn move_to_memory(plan: &mut Plan, directory: &Path) -> Result<Machines> {
    for (name, path) in [
        ("cofferdam-vmm", &mut plan.cofferdam),
        ("kernel", &mut plan.kernel),
        ("boot-initrd", &mut plan.boot_initrd),
        ("devices-initrd", &mut plan.devices_initrd),
    ] {
        let copy = directory.join(name);
        fs::copy(&path, &copy)?;
        *path = copy;
    }
    let root = directory.join("peer");
    if !Command::new("cp").arg("-a").arg(&plan.peer.root).arg(&root).status()?.success() {
        return Err("cp failed".into());
    }
    let peer = Peer { root, ..plan.peer.clone() };
    let mut disk = File::create(directory.join("disk"))?;
    for _ in 0..DISK {
        disk.write_all(&vec![0xC3; 1 << 20])?;
    }
    Ok(Machines { cofferdam: plan.cofferdam.clone(), peer, directory: directory.to_owned() })
}

/// Runs `rounds` guests of each monitor. Who is first changes every round.
fn in_turns(
    what: &str,
    rounds: usize,
    findings: &mut Findings,
    run: impl Fn(Monitor) -> Result<Vec<(String, f64)>>,
) -> Result<()> {
    for round in 0..rounds {
        let mut turn = [Monitor::Cofferdam, Monitor::Microvm];
        turn.rotate_left(round % 2);
        for monitor in turn {
            let samples = run(monitor)?;
            let list: Vec<_> = samples.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            progress(format_args!("{what} {}/{rounds}, {monitor:?}: {}", round + 1, list.join(", ")));
            let of = if monitor == Monitor::Cofferdam { &mut findings.ours } else { &mut findings.theirs };
            for (name, value) in samples {
                of.entry(name).or_default().push(value);
            }
        }
    }
    Ok(())
}

/// Seconds from the start of the monitor to its end.
fn time_boot(machines: &Machines, monitor: Monitor, guest: &Guest) -> Result<Vec<(String, f64)>> {
    let mut command = machines.command(monitor, guest)?;
    let start = Instant::now();
    let console = console_of(&mut command)?;
    let time = start.elapsed().as_secs_f64();
    if !console.iter().any(|line| line.name == "boot") {
        return Err(format!("{monitor:?}: the guest did not reach its init").into());
    }
    Ok(vec![("boot".to_owned(), time)])
}

fn measure_devices(machines: &Machines, monitor: Monitor, guest: &Guest) -> Result<Vec<(String, f64)>> {
    let console = console_of(&mut machines.command(monitor, guest)?)?;
    let at = |name: &str| console.iter().find(|line| line.name == name);
    let (Some(start), Some(end)) = (at("start"), at("end")) else {
        return Err(format!("{monitor:?}: the guest did not come to its end: {console:?}").into());
    };
    // The guest's clock is checked by what it says of its own time.
    let (guest_time, host_time) = (end.value - start.value, (end.seen - start.seen).as_secs_f64());
    if (guest_time / host_time - 1.0).abs() > CLOCK_TOLERANCE {
        return Err(format!("{monitor:?}: {host_time:.1} s are {guest_time:.1} s to the guest").into());
    }
    let measured = console.iter().filter(|line| SUBJECTS.iter().any(|(name, _)| line.name == *name));
    Ok(measured.map(|line| (line.name.clone(), line.value)).collect())
}

/// A line `bench NAME VALUE` on a guest's console.
#[derive(Debug)]
struct Line {
    name: String,
    value: f64,
    seen: Instant,
}

/// Runs a monitor to its end; returns the lines that matter.
fn console_of(command: &mut Command) -> Result<Vec<Line>> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut lines = Vec::new();
    let mut console = String::new();
    for line in BufReader::new(child.stdout.take().ok_or("no stdout")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        lines.extend(parse(&line));
        console += &line;
        console.push('\n');
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("{command:?}: {status}; its console:\n{console}").into());
    }
    Ok(lines)
}

fn parse(line: &str) -> Option<Line> {
    let mut words = line.split_ascii_whitespace();
    let (mark, name, value) = (words.next()?, words.next()?, words.next()?);
    let value = value.parse().ok()?;
    (mark == "bench").then(|| Line { name: name.to_owned(), value, seen: Instant::now() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_console_are_measurements_or_nothing() {
        let line = parse("bench random_read 12.5\r").unwrap();
        assert_eq!((line.name.as_str(), line.value), ("random_read", 12.5));
        for other in ["", "bench", "bench x", "bench x y", "[ 0.1] bench x 1"] {
            assert!(parse(other).is_none(), "{other}");
        }
    }
}
