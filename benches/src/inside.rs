//! Runs guests under both monitors, in turns. A boot is timed from the start of
//! the monitor to its end. To measure devices a guest of each monitor stays up,
//! and they take turns of half a second: a machine that is busy for a while is so to
//! both. The one whose turn it is not is idle.
//!
//! Everything is copied to memory first, so that neither monitor waits for a
//! disk. A guest measures by its own clock; that this runs at the host's speed
//! is checked over the whole of its life.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use xtask::peer::Peer;

use crate::console::Console;
use crate::guests::SUBJECTS;
use crate::machines::{Guest, Machines, Monitor};
use crate::{Result, hashing, peers, progress};

/// What both get on their command lines, and what is added to measure devices.
const COMMAND_LINE: &str = "console=ttyS0 reboot=a panic=-1 pci=off";
const QUIET: &str = " quiet";
/// Size of a disk, MiB.
const DISK: usize = 128;
/// A busy machine gets fewer rounds: none is begun after this time, once there are some.
const BOOT_TIME: Duration = Duration::from_secs(300);
const DEVICE_TIME: Duration = Duration::from_secs(420);
const FEWEST_ROUNDS: usize = 3;
/// By how much a guest's clock may be off.
const CLOCK_TOLERANCE: f64 = 0.05;

/// What is to be run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// `cofferdam-vmm`.
    pub cofferdam: PathBuf,
    /// QEMU.
    pub peer: Peer,
    /// The kernel of all guests.
    pub kernel: PathBuf,
    /// A RAM disk that says `bench boot` and powers off.
    pub boot_initrd: PathBuf,
    /// A RAM disk that runs `bench-guest` and powers off.
    pub devices_initrd: PathBuf,
    /// Number of boots of each monitor.
    pub boot_rounds: usize,
    /// Number of measurements of each kind.
    pub device_rounds: usize,
    /// The payload `first`, which ends at once.
    pub payload: PathBuf,
    /// Number of measurements of the first stage's hash.
    pub hash_rounds: usize,
}

/// Samples of one monitor, by name.
pub type Samples = BTreeMap<String, Vec<f64>>;

/// What was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Findings {
    /// Cofferdam's.
    pub ours: Samples,
    /// QEMU's.
    pub theirs: Samples,
    /// The first stage's and the host's throughput, MiB/s.
    pub hash: (Vec<f64>, Vec<f64>),
}

impl Findings {
    fn add(&mut self, monitor: Monitor, name: &str, value: f64) {
        let samples = match monitor {
            Monitor::Cofferdam => &mut self.ours,
            Monitor::Microvm => &mut self.theirs,
        };
        samples.entry(name.to_owned()).or_default().push(value);
    }
}

/// Runs the guests of the plan in the file `plan`, and writes the findings to stdout.
pub fn run(plan: &Path) -> Result<()> {
    let mut plan: Plan = serde_json::from_slice(&fs::read(plan)?)?;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let machines = move_to_memory(&mut plan, directory.path())?;
    let mut findings = Findings::default();
    for round in rounds(plan.boot_rounds, BOOT_TIME) {
        for monitor in turn(round) {
            let time = time_boot(&machines, monitor, &plan)?;
            progress(format_args!("boot {} of {}, {monitor:?}: {time:.2} s", round + 1, plan.boot_rounds));
            findings.add(monitor, "boot", time);
        }
    }
    if plan.hash_rounds > 0 {
        findings.hash = hashing::measure(&plan, directory.path())?;
    }
    if plan.device_rounds > 0 {
        measure_devices(&machines, &plan, &mut findings)?;
    }
    println!("{}", serde_json::to_string(&findings)?);
    Ok(())
}

/// As many rounds as there is time for.
pub fn rounds(most: usize, time: Duration) -> impl Iterator<Item = usize> {
    let start = Instant::now();
    (0..most).take_while(move |round| *round < FEWEST_ROUNDS || start.elapsed() < time)
}

/// Who is first changes every round.
fn turn(round: usize) -> [Monitor; 2] {
    let mut turn = [Monitor::Cofferdam, Monitor::Microvm];
    turn.rotate_left(round % 2);
    turn
}

/// Copies everything below `directory`.
fn move_to_memory(plan: &mut Plan, directory: &Path) -> Result<Machines> {
    for (name, path) in [
        ("cofferdam-vmm", &mut plan.cofferdam),
        ("kernel", &mut plan.kernel),
        ("payload", &mut plan.payload),
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
    Ok(Machines { cofferdam: plan.cofferdam.clone(), peer, directory: directory.to_owned() })
}

/// Seconds from the start of the monitor to its end.
fn time_boot(machines: &Machines, monitor: Monitor, plan: &Plan) -> Result<f64> {
    let guest = Guest {
        kernel: plan.kernel.clone(),
        initrd: plan.boot_initrd.clone(),
        command_line: COMMAND_LINE.to_owned(),
        disk: None,
    };
    let mut command = machines.command(monitor, &guest)?;
    let start = Instant::now();
    let mut console = Console::start(&mut command)?;
    console.wait_for("boot")?;
    console.end()?;
    Ok(start.elapsed().as_secs_f64())
}

/// A guest that measures what it is told to.
struct Session {
    monitor: Monitor,
    console: Console,
    /// The guest's clock and the host's when it began.
    start: (f64, Instant),
}

impl Session {
    fn start(machines: &Machines, monitor: Monitor, plan: &Plan) -> Result<Self> {
        let guest = Guest {
            kernel: plan.kernel.clone(),
            initrd: plan.devices_initrd.clone(),
            command_line: format!("{COMMAND_LINE}{QUIET}"),
            disk: Some(disk(&machines.directory.join(format!("{monitor:?}-disk")))?),
        };
        let mut console = Console::start(&mut machines.command(monitor, &guest)?)?;
        let start = (console.wait_for("start")?, Instant::now());
        Ok(Self { monitor, console, start })
    }

    fn measure(&mut self, name: &str) -> Result<f64> {
        self.console.send(name)?;
        self.console.wait_for(name)
    }

    fn end(mut self) -> Result<()> {
        self.console.send("end")?;
        let guest = self.console.wait_for("end")? - self.start.0;
        let host = self.start.1.elapsed().as_secs_f64();
        self.console.end()?;
        if (guest / host - 1.0).abs() > CLOCK_TOLERANCE {
            return Err(format!("{:?}: {host:.1} s are {guest:.1} s to the guest", self.monitor).into());
        }
        Ok(())
    }
}

fn measure_devices(machines: &Machines, plan: &Plan, findings: &mut Findings) -> Result<()> {
    peers::serve_unix(&machines.vsock())?;
    peers::serve_vhost()?;
    let mut ours = Session::start(machines, Monitor::Cofferdam, plan)?;
    let mut theirs = Session::start(machines, Monitor::Microvm, plan)?;
    for round in rounds(plan.device_rounds, DEVICE_TIME) {
        let mut line = String::new();
        for (name, _) in SUBJECTS.iter().filter(|(name, _)| *name != "boot") {
            for monitor in turn(round) {
                let session = if monitor == Monitor::Cofferdam { &mut ours } else { &mut theirs };
                let value = match session.measure(name) {
                    // QEMU's guest sometimes stands still in the middle of its writes. (Ours must not.)
                    Err(error) if monitor == Monitor::Microvm && round >= FEWEST_ROUNDS => {
                        progress(format_args!("QEMU's guest stands still, {round} rounds must do: {error}"));
                        return ours.end();
                    }
                    value => value?,
                };
                findings.add(monitor, name, value);
                line += &format!(" {value:.0}");
            }
            line.push(',');
        }
        progress(format_args!("devices {} of {}:{line}", round + 1, plan.device_rounds));
    }
    ours.end()?;
    theirs.end()
}

/// A full disk: what has no blocks yet would be quicker to read.
fn disk(path: &Path) -> Result<PathBuf> {
    let mut disk = File::create(path)?;
    for _ in 0..DISK {
        disk.write_all(&vec![0xC3; 1 << 20])?;
    }
    Ok(path.to_owned())
}
