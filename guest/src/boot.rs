//! From nothing to the container's process, step by step.

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use cofferdam_container_manifest::{self as manifest, Manifest};
use cofferdam_container_protocol::modules::Need;
use cofferdam_container_protocol::step::{Object, Reason, Report, Step};
use cofferdam_container_protocol::{STDERR_PORT, STDIN_PORT, STDOUT_PORT, drive};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot, sethostname};

use crate::binding::Platform;
use crate::drives::{self, Drive};
use crate::failure::{Failure, Reasoned, index};
use crate::modules::Modules;
use crate::root::Parts;
use crate::space::Space;
use crate::spawn::{Program, spawn};
use crate::streams::{self, Outputs, Ports};
use crate::supervise::{self, Supervisor};
use crate::verity::{self, Verified, Watch};
use crate::{loopback, ports, scratch};

/// Exit code of a domain that its guest refused, for a monitor that does not know the step port.
const REFUSED: u8 = 120;
/// Pseudo file systems, and where they are mounted.
const PSEUDO: [(&str, &str); 3] = [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")];

/// The step that is being done.
struct Progress(Step);

impl Progress {
    fn reach(&mut self, step: Step) {
        self.0 = step;
        ports::report(Report { step, reason: None, object: None, fatal: false });
    }
}

/// Boots, and ends the domain when the container has ended.
pub fn run() {
    let mut progress = Progress(Step::PseudoFileSystems);
    let Err(failure) = boot(&mut progress);
    let step = progress.0;
    // For people, on the domain's console.
    let _ = writeln!(std::io::stderr(), "cofferdam-init: {step}: {failure}");
    ports::report(Report { step, reason: Some(failure.reason), object: failure.object, fatal: true });
    power_off(REFUSED);
}

fn power_off(code: u8) {
    ports::exit_code(code);
    // If even that fails the kernel ends the domain, for its first process ends.
    let _ = reboot(RebootCommand::PowerOff);
}

fn boot(progress: &mut Progress) -> Result<Infallible, Failure> {
    progress.reach(Step::PseudoFileSystems);
    for (at, (kind, path)) in PSEUDO.iter().enumerate() {
        mount_pseudo(kind, path)
            .because(Reason::MountFailed)
            .map_err(|f| f.of(Object::FileSystem(index(at))))?;
    }
    progress.reach(Step::Modules);
    let platform = Platform::detect();
    let mut modules = Modules::read()?;
    modules.load(None)?;
    if let Some(need) = platform.need() {
        modules.load(Some(need))?;
    }
    progress.reach(Step::Manifest);
    let drives = drives::find(Path::new(drives::SYS_BLOCK))?;
    let (manifest, env) = read_manifest(platform, &drives)?;
    progress.reach(Step::Layers);
    let assigned = drives::assign(&drives, &manifest)?;
    let events = verity::events()?;
    let devices = assigned.trees.iter().map(|(object, drive, tree)| tree.set_up(*object, drive));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    progress.reach(Step::Scratch);
    let scratch = match (assigned.scratch, &manifest.scratch) {
        (Some(drive), Some(scratch)) => {
            modules.load(Some(Need::Scratch))?;
            Some(scratch::set_up(drive, scratch)?)
        }
        _ => None,
    };
    drop(modules);
    progress.reach(Step::Root);
    let parts = Parts { manifest: &manifest, devices: &devices, scratch: scratch.as_deref() };
    let space = Space::new(&parts).map_err(|failure| explained(failure, &devices))?;
    progress.reach(Step::Process);
    sethostname(manifest.hostname.as_bytes()).because(Reason::KernelRefused)?;
    // A kernel without networks runs containers that need none.
    let _ = loopback::up();
    let outputs = Arc::new(Outputs::default());
    let started = start(&space, &manifest, &env, &outputs).map_err(|failure| explained(failure, &devices))?;
    let watch = Watch::new(devices, manifest.on_verity_failure);
    let supervisor = Supervisor::new(space, manifest, env, outputs, started, watch);
    thread::spawn({
        let supervisor = supervisor.clone();
        move || loop {
            verity::wait(&events);
            supervisor.look(Step::Running);
        }
    });
    supervise::listen(&supervisor);
    progress.reach(Step::Running);
    ports::user_space();
    let status = supervisor.run();
    power_off(status);
    Err(Failure::new(Reason::KernelRefused))
}

/// A failure in which a wrong block of a layer shows is that block's.
fn explained(failure: Failure, devices: &[Verified]) -> Failure {
    verity::failure(devices).unwrap_or(failure)
}

fn mount_pseudo(kind: &str, path: &str) -> rustix::io::Result<()> {
    match rustix::fs::mkdir(path, rustix::fs::Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    mount(kind, path, kind, MountFlags::NOSUID | MountFlags::NOEXEC, None)
}

/// The manifest that the launch binds, and the environment for this start.
fn read_manifest(platform: Platform, drives: &[Drive]) -> Result<(Manifest, Vec<String>), Failure> {
    platform.check_random_source()?;
    let command_line = fs::read_to_string("/proc/cmdline").because(Reason::KernelRefused)?;
    let bound = platform.bound_digest(&command_line)?;
    let bytes = drives::the(drives, drive::MANIFEST)?.read(drive::MAX_DRIVE)?;
    checked(&bytes, bound)
}

/// What is on the manifest's drive, if it is what the launch binds.
fn checked(drive: &[u8], bound: [u8; 32]) -> Result<(Manifest, Vec<String>), Failure> {
    let content = drive::read(drive).map_err(|error| match error {
        drive::DriveError::Start { .. } | drive::DriveError::StartLength(_) => {
            Failure::new(Reason::StartValuesRefused)
        }
        drive::DriveError::ManifestLength(_) | drive::DriveError::Nul(_) => Failure::new(Reason::NotValid),
    })?;
    if manifest::digest(content.manifest) != bound {
        return Err(Failure::new(Reason::WrongDigest));
    }
    let manifest = manifest::decode(content.manifest).map_err(|_| Failure::new(Reason::NotValid))?;
    let env = manifest.process.start_environment(&content.env);
    let env = env.map_err(|_| Failure::new(Reason::StartValuesRefused))?;
    Ok((manifest, env))
}

/// Starts the container's process.
fn start(
    space: &Space,
    manifest: &Manifest,
    env: &[String],
    outputs: &Arc<Outputs>,
) -> Result<supervise::Process, Failure> {
    let process = &manifest.process;
    let program = Program::new(process, &process.args, env).ok_or(Failure::new(Reason::NotValid))?;
    let ports = Ports { stdin: STDIN_PORT, stdout: STDOUT_PORT, stderr: STDERR_PORT };
    let (streams, plumbing) = streams::connect(ports, process.terminal, &manifest.host)?;
    Ok(supervise::Process::new(spawn(space, &program, streams)?, plumbing, outputs))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MANIFEST: &str = r#"{"host":{"exec":[],"signals":[],"stderr":false,"stdin":false,"stdout":false,"stop":null},"hostname":"a","layers":[{"root_hash":"0000000000000000000000000000000000000000000000000000000000000000","salt":"","size":4096}],"mounts":[],"on_verity_failure":"kill","process":{"args":["/a"],"capabilities":[],"cwd":"/","env":["A=1"],"gid":0,"groups":[],"no_new_privs":true,"read_only_root":true,"rlimits":[],"start_env":[{"name":"A","pattern":"[12]"}],"terminal":false,"uid":0},"scratch":null,"version":1}"#;

    #[test]
    fn a_manifest_is_read_if_it_is_the_one_that_the_launch_binds() {
        let bound = manifest::digest(MANIFEST.as_bytes());
        let drive = |manifest: &str, name: &str, value: &str| {
            let env = BTreeMap::from([(name.to_owned(), value.to_owned())]);
            drive::write(manifest.as_bytes(), &env).unwrap()
        };
        let (_, env) = checked(&drive(MANIFEST, "A", "2"), bound).unwrap();
        assert_eq!(env, ["A=2"]);
        let refused = |drive: &[u8], bound| checked(drive, bound).unwrap_err().reason;
        assert_eq!(refused(&drive(MANIFEST, "A", "2"), [0; 32]), Reason::WrongDigest);
        assert_eq!(refused(&drive(MANIFEST, "A", "3"), bound), Reason::StartValuesRefused);
        assert_eq!(refused(&drive(MANIFEST, "B", "2"), bound), Reason::StartValuesRefused);
        assert_eq!(refused(&[0; 4096], bound), Reason::NotValid);
        let mount = r#""mounts":[{"tmpfs":{"path":"/a/../..","size":4096}}]"#;
        let args = format!(r#""args":["/a"{}]"#, r#","b""#.repeat(manifest::MAX_WORDS));
        for other in [
            MANIFEST.replace(r#":1}"#, ":2}"),
            MANIFEST.replace(r#":1}"#, r#":1,"y":1}"#),
            format!("{MANIFEST} "),
            MANIFEST.replace("\"a\"", "\"-\""),
            MANIFEST.replace(r#""mounts":[]"#, mount),
            MANIFEST.replace(r#""args":["/a"]"#, &args),
        ] {
            assert_ne!(other, MANIFEST);
            let bound = manifest::digest(other.as_bytes());
            assert_eq!(refused(&drive(&other, "A", "2"), bound), Reason::NotValid, "{other}");
        }
    }
}
