//! `cargo xtask`: developer tasks that need more than cargo. See the library.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use xtask::assets::{Assets, SnpAssets};
use xtask::cache::Cache;
use xtask::linux::{self, Selection, Tier};
use xtask::rig::{self, Request, RigError, Snp};
use xtask::{seccomp, small_kernel};

/// Developer tasks of Cofferdam.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Fetch what the tests need and the repository does not hold; print where it lies
    Assets {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Run a command in an emulated machine with hardware virtualisation (AMD SVM)
    Rig(RigArguments),
    /// Run the tests that boot Linux in domains: on hardware KVM, else in the rig
    DomainTests(Selection),
    /// Run the tests that boot Linux in SEV-SNP domains: on SNP hardware, else in the rig with an emulated secure processor
    SnpTests(Selection),
    /// Build a container image of Debian packages and run it in a domain: on hardware KVM, else in the rig
    Demo,
    /// Build the small guest kernel from Debian's source (about 9 minutes of a processor, once); print where it lies
    Kernel,
    /// Make the image of containers' domains with Debian's cloud kernel, by what `make build` has built
    DomainImage {
        /// The file to write
        output: PathBuf,
    },
    /// Exit with 0 if this machine's own CPU can run guests, else with 1
    HasKvm,
    /// List system calls that the seccomp policies allow and no test needs, without saying why; fails if there is one
    SeccompUnused,
    /// The rig's side inside the outer machine
    #[command(hide = true)]
    Agent,
}

#[derive(Debug, clap::Args)]
#[command(after_help = RIG_HELP)]
struct RigArguments {
    /// Memory of the outer machine, MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB", value_parser = clap::value_parser!(u32).range(512..))]
    memory: u32,
    /// CPUs of the outer machine
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// Give up after this time
    #[arg(long, default_value_t = 900, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// One more directory to pass through, read-write
    #[arg(long = "share", value_name = "DIR")]
    shares: Vec<PathBuf>,
    /// One more environment variable (PATH, HOME, CARGO*, RUST* and COFFERDAM* are passed anyway)
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    environment: Vec<String>,
    /// Keep the outer machine's console in this file (its end is shown if the rig fails)
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Keep the emulator's messages in this file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Make it a host with SEV-SNP: an emulated secure processor and reverse map table, without encryption
    #[arg(long)]
    snp: bool,
    /// How much the emulator tells of SEV-SNP: 1 launches and failures, 2 pages, 3 page states, 4 exits of guests
    #[arg(long, default_value_t = 1, value_name = "LEVEL", requires = "snp", value_parser = clap::value_parser!(u8).range(0..=4))]
    trace: u8,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const RIG_HELP: &str = "\
The command runs as root on this machine's file system below a throw-away\n\
overlay, in the current directory. /tmp and /var/tmp are passed through:\n\
what is written there stays; anything else that is written is lost. $TMPDIR,\n\
/run and /dev/shm are in memory: use them for sockets and disk images. The\n\
command's stdin is empty, its stdout and stderr come back byte-exact, and\n\
its exit status is returned; 124 after a timeout, 125 if the rig failed.\n\
$COFFERDAM_EMULATOR_LOG is the file where the emulator's messages come; with\n\
--snp, a line for each launch. $COFFERDAM_SNP_CERTIFICATES is then a directory\n\
with ark.pem, ask.pem and vcek.pem, which vouch for attestation reports.";

const TIMED_OUT: u8 = 124;
const RIG_FAILED: u8 = 125;

fn main() -> ExitCode {
    match Arguments::parse().task {
        Task::Assets { json } => report(assets(json), 1),
        Task::Rig(arguments) => rig(arguments),
        Task::DomainTests(selection) => exit(linux::tests(Tier::Domain, &selection)),
        Task::SnpTests(selection) => exit(linux::tests(Tier::Snp, &selection)),
        Task::Demo => exit(linux::demo()),
        Task::Kernel => report(kernel(), 1),
        Task::DomainImage { output } => report(linux::domain_image(&output), 1),
        Task::HasKvm => has_kvm(),
        Task::SeccompUnused => seccomp_unused(),
        Task::Agent => report(xtask::agent::run(), 1),
    }
}

fn report(result: Result<(), impl std::fmt::Display>, code: u8) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(code)
        }
    }
}

fn assets(json: bool) -> Result<(), xtask::Error> {
    let assets = Assets::fetch()?;
    if json {
        let text = serde_json::json!(assets);
        println!("{text}");
    } else {
        for (name, path) in assets.list() {
            println!("{name:<14} {}", path.display());
        }
    }
    Ok(())
}

fn kernel() -> Result<(), xtask::Error> {
    let kernel = small_kernel::fetch(&Cache::open()?)?;
    println!("{}", kernel.display());
    Ok(())
}

fn has_kvm() -> ExitCode {
    if xtask::hardware_kvm() {
        println!("yes: Linux guests run on this CPU");
        return ExitCode::SUCCESS;
    }
    println!("no: no VMX or SVM in /proc/cpuinfo, or no access to /dev/kvm; Linux guests need the rig");
    ExitCode::FAILURE
}

fn seccomp_unused() -> ExitCode {
    match seccomp::unused() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => report(Err(error), 1),
    }
}

fn rig(arguments: RigArguments) -> ExitCode {
    let mut environment = rig::default_environment();
    for variable in arguments.environment {
        match variable.split_once('=') {
            Some((name, value)) => environment.push((name.into(), value.into())),
            None => environment.extend(std::env::var_os(&variable).map(|value| (variable.into(), value))),
        }
    }
    let run = || {
        let assets = Assets::fetch()?;
        let snp = match arguments.snp {
            true => Some(Snp { assets: SnpAssets::fetch()?, trace: arguments.trace }),
            false => None,
        };
        let request = Request {
            command: arguments.command,
            environment,
            shares: arguments.shares,
            memory: arguments.memory,
            cpus: arguments.cpus,
            timeout: Duration::from_secs(arguments.timeout),
            console: arguments.console,
            log: arguments.log,
            snp,
        };
        rig::run(&assets, &request, &mut io::stdout(), &mut io::stderr())
    };
    exit(run())
}

fn exit(result: Result<u8, RigError>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error @ RigError::Timeout { .. }) => report(Err(error), TIMED_OUT),
        Err(error) => report(Err(error), RIG_FAILED),
    }
}
