//! Runs containers, and boots the same kernels directly, in turns. Everything is copied to memory first, so that nobody waits
//! for a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::console::Console;
use crate::inside::rounds;
use crate::{Result, progress};

/// Memory of a domain, MiB, where it is not the smallest.
const MEMORY: u64 = 128;
/// How many containers there are at once when memory is looked at.
const AT_ONCE: [usize; 3] = [1, 4, 8];

/// No round is begun after this time, once there are some.
const STARTS_TIME: Duration = Duration::from_secs(180);

/// Says one line.
const HELLO: &str = "echo bench hello 0";
/// Says it, and stays until it gets one.
const STAY: &str = "echo bench hello 0; read line";
/// Says how much memory, KiB, the guest's kernel could give to programs.
const AVAILABLE: &str = "while read name value unit; do
    if test $name = MemAvailable:; then echo bench available $value; fi
done < /proc/meminfo";

/// Phases of a container's start, by the mark of the monitor's where each ends. The first begins with the start of `cofferdam`.
const PHASES: [(&str, &str); 12] = [
    ("monitor", "running"),
    ("first stage and kernel", "init_pseudo_file_systems"),
    ("pseudo file systems", "init_modules"),
    ("modules", "init_manifest"),
    ("manifest", "init_layers"),
    ("layers", "init_scratch"),
    ("scratch", "init_root"),
    ("root", "init_process"),
    ("process", "init_running"),
    ("container", "init_stopping"),
    ("power off", "stopped"),
    ("exit", EXIT),
];
/// Those of a direct boot.
const DIRECT_PHASES: [(&str, &str); 4] =
    [("monitor", "running"), ("kernel and init", FIRST_LINE), ("power off", "stopped"), ("exit", EXIT)];
/// Marks that are not the monitor's.
const FIRST_LINE: &str = "first line";
const EXIT: &str = "exit";

/// A kernel.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// What it is called.
    pub name: String,
    /// Its bzImage.
    pub kernel: PathBuf,
    /// The image of containers' domains.
    pub image: PathBuf,
    /// The command line in that.
    pub command_line: String,
    /// Memory, MiB, of the smallest domain that it is to run a container in.
    pub smallest_memory: u64,
}

/// What is to be run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// `cofferdam`, and what has to be beside it.
    pub programs: Vec<PathBuf>,
    /// With what.
    pub kernels: Vec<Kernel>,
    /// A RAM disk that says one line and powers off.
    pub initrd: PathBuf,
    /// A container with a shell.
    pub container: PathBuf,
    /// How often each is started.
    pub rounds: usize,
}

/// A start, in seconds since before it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// Until the line had come.
    pub first_line: f64,
    /// Until `cofferdam` had ended.
    pub exit: f64,
    /// Lengths of its phases, in their order.
    pub phases: Vec<(String, f64)>,
}

/// What was measured with a kernel.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Containers.
    pub containers: Vec<Start>,
    /// Direct boots.
    pub direct: Vec<Start>,
    /// How much of the host's memory, MiB, each further one of several containers takes.
    pub further: Vec<(usize, f64)>,
    /// How much of its memory, MiB, a guest in the smallest domain has in use.
    pub used: f64,
}

/// What was measured with each kernel of the plan.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Findings {
    /// In the plan's order.
    pub kernels: Vec<Measured>,
}

/// Runs the plan in the file `plan`, and writes the findings to stdout.
pub fn run(plan: &Path) -> Result<()> {
    let mut plan: Plan = serde_json::from_slice(&fs::read(plan)?)?;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let host = Host::move_to_memory(&mut plan, directory.path())?;
    let mut findings = Findings { kernels: plan.kernels.iter().map(|_| Measured::default()).collect() };
    // The first round warms the caches.
    for round in rounds(plan.rounds + 1, STARTS_TIME) {
        let pairs = plan.kernels.iter().zip(&mut findings.kernels);
        for (kernel, measured) in pairs {
            let container = |host: &Host| start(host.container(kernel, MEMORY, HELLO), &PHASES);
            let direct = |host: &Host| start(host.direct(kernel), &DIRECT_PHASES);
            // Who is first changes every round.
            let (ours, reference) = if round % 2 == 0 {
                let ours = container(&host)?;
                (ours, direct(&host)?)
            } else {
                let reference = direct(&host)?;
                (container(&host)?, reference)
            };
            progress(format_args!(
                "start {round} of {}, {}: {:.2} s, direct boot {:.2} s",
                plan.rounds, kernel.name, ours.first_line, reference.first_line
            ));
            if round > 0 {
                measured.containers.push(ours);
                measured.direct.push(reference);
            }
        }
    }
    for (kernel, measured) in plan.kernels.iter().zip(&mut findings.kernels) {
        measured.used = host.used(kernel)?;
        measured.further = host.further(kernel)?;
    }
    println!("{}", serde_json::to_string(&findings)?);
    Ok(())
}

/// Runs `command` until it has ended.
fn start(mut command: Command, phases: &[(&str, &str)]) -> Result<Start> {
    let start = Instant::now();
    let mut console = Console::start(&mut command)?;
    console.wait_for("hello")?;
    let first_line = start.elapsed().as_secs_f64();
    let last = console.end()?;
    let exit = start.elapsed().as_secs_f64();
    let outcome: Value = serde_json::from_str(&last)?;
    let mut before = 0.0;
    let mut lengths = Vec::new();
    for (name, mark) in phases {
        let time = match *mark {
            FIRST_LINE => first_line,
            EXIT => exit,
            mark => {
                let time = outcome["phases"][mark].as_f64();
                time.ok_or_else(|| format!("no {mark} in {outcome}"))? / 1e6
            }
        };
        lengths.push(((*name).to_owned(), time - before));
        before = time;
    }
    Ok(Start { first_line, exit, phases: lengths })
}

/// Where everything is.
struct Host {
    cofferdam: PathBuf,
    run_directory: PathBuf,
    initrd: PathBuf,
    container: PathBuf,
}

impl Host {
    /// Copies everything below `directory`.
    fn move_to_memory(plan: &mut Plan, directory: &Path) -> Result<Self> {
        let copy = |path: &Path, name: &str| -> Result<PathBuf> {
            let to = directory.join(name);
            fs::copy(path, &to)?;
            Ok(to)
        };
        for (at, kernel) in plan.kernels.iter_mut().enumerate() {
            kernel.kernel = copy(&kernel.kernel, &format!("kernel{at}"))?;
            kernel.image = copy(&kernel.image, &format!("image{at}"))?;
        }
        for program in &plan.programs {
            copy(program, &program.file_name().unwrap_or_default().to_string_lossy())?;
        }
        let container = directory.join("container");
        if !Command::new("cp").arg("-a").arg(&plan.container).arg(&container).status()?.success() {
            return Err("cp failed".into());
        }
        Ok(Self {
            cofferdam: directory.join("cofferdam"),
            run_directory: directory.join("run"),
            initrd: copy(&plan.initrd, "initrd")?,
            container,
        })
    }

    fn run(&self, memory: u64) -> Command {
        let mut command = Command::new(&self.cofferdam);
        command.env("COFFERDAM_RUN_DIR", &self.run_directory);
        command.args(["run", "--quiet", "--json", "--memory", &format!("{memory}M")]);
        command
    }

    fn direct(&self, kernel: &Kernel) -> Command {
        let mut command = self.run(MEMORY);
        command.args(["--boot", "direct", "--cmdline", &kernel.command_line]);
        command.arg("--kernel").arg(&kernel.kernel).arg("--initrd").arg(&self.initrd);
        command
    }

    fn container(&self, kernel: &Kernel, memory: u64, script: &str) -> Command {
        let mut command = self.run(memory);
        command.arg("--interactive").arg("--image").arg(&kernel.image);
        command.arg("--container").arg(&self.container).args(["--", "/bin/sh", "-c", script]);
        command
    }

    /// How much memory, MiB, a container's guest has in use in the smallest domain of a kernel, all of the kernel's included.
    fn used(&self, kernel: &Kernel) -> Result<f64> {
        let memory = kernel.smallest_memory;
        let mut console = Console::start(&mut self.container(kernel, memory, AVAILABLE))?;
        let available = console.wait_for("available")? / 1024.0;
        console.end()?;
        progress(format_args!(
            "{}: {available:.1} of {memory} MiB are available to a container",
            kernel.name
        ));
        Ok(memory as f64 - available)
    }

    /// How much memory of the host, MiB, each further one of so many containers takes, in the smallest domains of a kernel.
    fn further(&self, kernel: &Kernel) -> Result<Vec<(usize, f64)>> {
        let before = kernel_memory()?;
        let mut running: Vec<Console> = Vec::new();
        let (mut first, mut further) = (0.0, Vec::new());
        for number in AT_ONCE {
            let already = running.len();
            for _ in already..number {
                running.push(Console::start(&mut self.container(kernel, kernel.smallest_memory, STAY))?);
            }
            for console in running.iter_mut().skip(already) {
                console.wait_for("hello")?;
            }
            let of_processes = running
                .iter()
                .try_fold(0.0, |sum, console| -> Result<f64> { Ok(sum + processes_memory(console.id())?) })?;
            let of_kernel = kernel_memory()? - before;
            progress(format_args!(
                "{}, {number} at once: processes {of_processes:.1} MiB, the host's kernel for them {of_kernel:.1}",
                kernel.name
            ));
            let all = of_processes + of_kernel;
            if number == 1 {
                first = all;
            } else {
                further.push((number, (all - first) / (number - 1) as f64));
            }
        }
        for mut console in running {
            console.send("end")?;
            console.end()?;
        }
        Ok(further)
    }
}

/// Memory of a process and all that it has started, guest memory included, MiB: pages that several processes share (the
/// program's) count in parts to each (`Pss`).
fn processes_memory(id: u32) -> Result<f64> {
    let own = field(&fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?, "Pss")?;
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    children.split_ascii_whitespace().try_fold(own, |sum, child| Ok(sum + processes_memory(child.parse()?)?))
}

/// What the kernel of this machine has for itself, but for caches that it would give back, MiB.
fn kernel_memory() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let names = ["SUnreclaim", "KernelStack", "PageTables", "SecPageTables", "VmallocUsed", "Percpu"];
    names.iter().try_fold(0.0, |sum, name| Ok(sum + field(&text, name)?))
}

/// A line `NAME: NUMBER kB`, as MiB.
fn field(text: &str, name: &str) -> Result<f64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value =
        value.and_then(|value| value.trim().strip_suffix(" kB")).ok_or_else(|| format!("no {name}"))?;
    Ok(value.parse::<f64>()? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "PssAnon:  1 kB\nPss:    2048 kB\nHuge: 3\n";
        assert_eq!(field(text, "Pss").unwrap(), 2.0);
        assert!(field(text, "Huge").is_err() && field(text, "Ps").is_err());
    }

    #[test]
    fn a_start_is_cut_at_its_marks() {
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo bench hello 0; echo '{"phases":{"running":2000,"stopped":0}}'"#]);
        let start = start(command, &DIRECT_PHASES).unwrap();
        assert_eq!(start.phases[0], ("monitor".to_owned(), 0.002));
        let sum: f64 = start.phases.iter().map(|(_, length)| length).sum();
        assert!((sum - start.exit).abs() < 1e-9 && start.first_line <= start.exit);
        let mut command = Command::new("sh");
        command.args(["-c", "echo bench hello 0; echo '{}'"]);
        assert!(super::start(command, &PHASES).unwrap_err().to_string().contains("running"));
    }
}
