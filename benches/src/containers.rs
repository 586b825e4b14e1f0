//! Containers in domains of their own, against direct boots of the same kernels: this half prepares and makes the rows, the
//! other one ([`crate::container_runs`]) runs them, where there is hardware virtualisation or in the rig.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam_tests::place;
use xtask::assets::Assets;
use xtask::cache::Cache;
use xtask::initramfs::InitramfsBuilder;
use xtask::small_kernel;

use crate::container_runs::{Findings, Kernel, Measured, Plan, Start};
use crate::guests::inner_half;
use crate::report::{Better, Row, Subject, median};
use crate::{Result, progress};

/// What a further container may take of the host, MiB.
const MEMORY_LIMIT: f64 = 40.0;
/// What goes into the container and the reference's RAM disk.
const APPLETS: [&str; 3] = ["sh", "echo", "poweroff"];
/// Says one line, as the container does.
const INIT: &[u8] = b"#!/bin/sh\necho bench hello 0\npoweroff -f\n";

/// Prepares, runs the inner half with `rounds` starts of each kind, and makes the rows.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    progress("fetching what is missing of the kernels and the rig (the small kernel is built once)");
    let assets = Assets::fetch()?;
    let small = small_kernel::fetch(&Cache::open()?)?;
    let directory = tempfile::tempdir_in("/tmp")?;
    let path = |name: &str| directory.path().join(name);
    let mut initrd = InitramfsBuilder::new();
    initrd.busybox(&assets.busybox, &APPLETS)?.file("init", 0o755, INIT);
    fs::write(path("initrd"), initrd.build())?;
    let plan = Plan {
        programs: vec![place::cofferdam(), place::monitor()],
        kernels: vec![
            kernel("our kernel", small, None, 64, path("small.igvm"))?,
            kernel(
                "Debian's",
                assets.container_kernel.clone(),
                assets.container_modules.as_deref(),
                128,
                path("debian.igvm"),
            )?,
        ],
        initrd: path("initrd"),
        container: container(&assets.busybox, directory.path())?,
        rounds,
    };
    fs::write(path("plan.json"), serde_json::to_vec(&plan)?)?;
    let findings: Findings =
        serde_json::from_slice(&inner_half(&assets, "inside-containers", &path("plan.json"))?)?;
    show_phases(&plan, &findings);
    rows(&plan, &findings)
}

/// A kernel, and the image that `cofferdam image build --init` makes of it.
fn kernel(
    name: &str,
    kernel: PathBuf,
    modules: Option<&Path>,
    smallest_memory: u64,
    image: PathBuf,
) -> Result<Kernel> {
    const COMMAND_LINE: &str = "command line: ";
    let mut build = Command::new(place::cofferdam());
    build.args(["image", "build", "--init", "--kernel"]).arg(&kernel).arg("-o").arg(&image);
    if let Some(modules) = modules {
        build.arg("--modules").arg(modules);
    }
    tool(&mut build)?;
    let said = tool(Command::new(place::cofferdam()).args(["image", "inspect"]).arg(&image))?;
    let command_line = said.lines().find_map(|line| line.strip_prefix(COMMAND_LINE));
    let command_line = command_line.ok_or("the image has no command line")?.to_owned();
    Ok(Kernel { name: name.to_owned(), kernel, image, command_line, smallest_memory })
}

/// A container of busybox, below `directory`.
fn container(busybox: &Path, directory: &Path) -> Result<PathBuf> {
    let (root, output) = (directory.join("root"), directory.join("container"));
    let bin = root.join("bin");
    fs::create_dir_all(&bin)?;
    fs::copy(busybox, bin.join("busybox"))?;
    for name in APPLETS {
        symlink("busybox", bin.join(name))?;
    }
    let mut build = Command::new(place::cofferdam());
    build.args(["container", "build"]).arg(root).arg("-o").arg(&output).args(["--", "/bin/sh"]);
    tool(&mut build)?;
    Ok(output)
}

fn tool(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// A time of all of these starts, in seconds.
fn column(starts: &[Start], of: impl Fn(&Start) -> f64) -> Vec<f64> {
    starts.iter().map(of).collect()
}

fn rows(plan: &Plan, findings: &Findings) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut add = |name: String, unit, goal, (ours, reference): (&[f64], &[f64]), reference_name: &str| {
        let subject = Subject { name: "", unit, better: Better::Lower, goal };
        rows.push(Row { name, ..subject.row(ours, reference, reference_name) });
    };
    for (kernel, found) in plan.kernels.iter().zip(&findings.kernels) {
        let Kernel { name, smallest_memory, .. } = kernel;
        for (what, of) in [
            ("container to first line", (|start| start.first_line) as fn(&Start) -> f64),
            ("container to exit", |start| start.exit),
        ] {
            let samples = (&*column(&found.containers, of), &*column(&found.direct, of));
            add(format!("{what}, {name}"), "s", Some(1.3), samples, "direct boot, one line");
        }
        for (number, memory) in &found.further {
            let name = format!("memory of a further one of {number}, {name}");
            add(name, "MiB", Some(1.0), (&[*memory], &[MEMORY_LIMIT]), "the limit");
        }
        let name = format!("guest memory after start, {name}");
        let memory = (&[found.used][..], &[*smallest_memory as f64][..]);
        add(name, "MiB", None, memory, "all of the domain's");
    }
    let [ours, debians] = &findings.kernels[..] else { return Err("two kernels were to be measured".into()) };
    for (what, of) in [
        ("direct boot to first line, our kernel", (|found| &found.direct) as fn(&Measured) -> &Vec<Start>),
        ("container to first line, our kernel", |found| &found.containers),
    ] {
        let times = |found| column(of(found), |start| start.first_line);
        add(what.to_owned(), "s", None, (&times(ours), &times(debians)), "Debian's cloud kernel");
    }
    Ok(rows)
}

/// Where the time of a start goes: a line for each phase, with the median of its length.
fn show_phases(plan: &Plan, findings: &Findings) {
    for (kernel, found) in plan.kernels.iter().zip(&findings.kernels) {
        for (what, starts) in [("container", &found.containers), ("direct boot", &found.direct)] {
            progress(format_args!("{what}, {}: phases, ms", kernel.name));
            let Some(first) = starts.first() else { continue };
            for (index, (name, _)) in first.phases.iter().enumerate() {
                let lengths: Vec<f64> =
                    starts.iter().filter_map(|start| Some(start.phases.get(index)?.1)).collect();
                progress(format_args!("  {name:<22} {:>8.0}", median(&lengths) * 1e3));
            }
        }
    }
}
