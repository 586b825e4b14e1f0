//! What runs Linux guests: the domain and SNP tiers of the tests, and `make run`.
//! Where the hardware can do it they run directly, elsewhere in the rig.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::Error;
use crate::apt::Apt;
use crate::assets::{self, Assets, SnpAssets};
use crate::cache::Cache;
use crate::kernel;
use crate::ovmf;
use crate::rig::{self, Request, RigError, Snp};
use crate::small_kernel;
use crate::tool::{self, progress};

/// How long a tier may take. Its budget is 12 minutes on an idle machine, or less.
const TIER_TIMEOUT: Duration = Duration::from_secs(40 * 60);
/// The same with the long tests.
const LONG_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// The variable of [`newer_kernel`].
const NEWER_KERNEL: &str = "COFFERDAM_NEWER_KERNEL";
const DEMO_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// What the container of the demonstration is made of, and what it runs.
const DEMO_PACKAGES: [&str; 3] = ["base-files", "coreutils", "dash"];
const DEMO_SCRIPT: &[u8] = include_bytes!("demo-script");

/// What a tier's guests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// KVM.
    Domain,
    /// KVM with SEV-SNP.
    Snp,
}

impl Tier {
    /// The name of its test program, and of the feature that it needs.
    fn name(self) -> &'static str {
        match self {
            Self::Domain => "domain",
            Self::Snp => "snp",
        }
    }

    /// Whether its tests can run on this machine itself.
    fn runs_here(self) -> bool {
        match self {
            Self::Domain => crate::hardware_kvm(),
            Self::Snp => crate::hardware_snp(),
        }
    }
}

/// Which tests of a tier are run.
#[derive(Clone, Debug, clap::Args)]
pub struct Selection {
    /// The long tests too
    #[arg(long)]
    long: bool,
    /// Containers on the small kernel (`cargo xtask kernel`), instead of Debian's
    #[arg(long)]
    small_kernel: bool,
    /// Keep the emulator's messages in this file
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Only tests whose names contain one of these
    filter: Vec<String>,
}

/// Builds the tests of `tier` and runs those of `selection`. Returns the exit status of the tests.
pub fn tests(tier: Tier, selection: &Selection) -> Result<u8, RigError> {
    let mut assets = Assets::fetch()?;
    if selection.small_kernel {
        assets.container_kernel = small_kernel::fetch(&Cache::open()?)?;
        assets.container_modules = None;
    }
    if selection.long && tier == Tier::Domain {
        assets.fetch_for_long_tests()?;
    }
    progress(format_args!("building the tests of the {} tier", tier.name()));
    let mut command = vec![test_program(tier.name())?.into(), "--test-threads=1".into()];
    command.extend(selection.long.then(|| "--include-ignored".into()));
    command.extend(selection.filter.iter().map(OsString::from));
    let timeout = if selection.long { LONG_TIMEOUT } else { TIER_TIMEOUT };
    let request = Request { log: selection.log.clone(), ..Request::new(command, timeout) };
    let mut handed_on = Vec::new();
    if selection.long && tier == Tier::Snp {
        handed_on.push((ovmf::ENVIRONMENT.into(), ovmf::Peer::fetch()?.root().into()));
        handed_on.push((NEWER_KERNEL.into(), SnpAssets::fetch()?.kernel.into()));
    }
    run(&assets, handed_on, tier, request)
}

/// A kernel of 7.x, which `cargo xtask snp-tests --long` names to guests.
pub fn newer_kernel() -> Option<PathBuf> {
    std::env::var_os(NEWER_KERNEL).map(PathBuf::from)
}

/// Makes the image of containers' domains with Debian's cloud kernel, by what `make build` has built.
pub fn domain_image(output: &Path) -> Result<(), Error> {
    let kernel = kernel::fetch(&Cache::open()?, kernel::GUEST)?;
    let mut build = Command::new(cofferdam());
    build.args(["image", "build", "--init", "--kernel"]).arg(kernel.image);
    let said = tool::run(build.arg("--modules").arg(kernel.modules).arg("-o").arg(output))?;
    progress(String::from_utf8_lossy(&said).trim_end());
    Ok(())
}

/// Builds a container image of Debian packages and runs it in a domain. Returns the exit status of `cofferdam run`.
pub fn demo() -> Result<u8, RigError> {
    let assets = Assets::fetch()?;
    let root = container_root(&Cache::open()?)?;
    let (image, container) = (Path::new("target/domain.igvm"), Path::new("target/demo-container"));
    domain_image(image)?;
    let build: [&OsStr; 8] = [
        "container".as_ref(),
        "build".as_ref(),
        root.as_ref(),
        "-o".as_ref(),
        container.as_ref(),
        "--".as_ref(),
        "/bin/sh".as_ref(),
        "/hello".as_ref(),
    ];
    let mut command = Command::new(cofferdam());
    command.args(build);
    progress(format_args!("the commands, as you would type them: {}", tool::line(&command)));
    let said = tool::run(&mut command)?;
    progress(String::from_utf8_lossy(&said).trim_end());
    let command: Vec<OsString> = vec![
        cofferdam().into(),
        "run".into(),
        "--image".into(),
        image.into(),
        "--container".into(),
        container.into(),
        "--cpus".into(),
        "2".into(),
        "--memory".into(),
        "256M".into(),
    ];
    let words: Vec<String> = command.iter().map(|word| tool::quote(word)).collect();
    progress(format_args!("and: {}", words.join(" ")));
    let status = run(&assets, Vec::new(), Tier::Domain, Request::new(command, DEMO_TIMEOUT))?;
    progress(format_args!("the container's exit status: {status}"));
    Ok(status)
}

/// A root file system of Debian packages, and a script in it.
fn container_root(cache: &Cache) -> Result<PathBuf, Error> {
    let packages = DEMO_PACKAGES.join(" ");
    let entry = cache.entry("demo-root", &[b"1", packages.as_bytes(), DEMO_SCRIPT], |directory| {
        let root = directory.join("root");
        fs::create_dir(&root).map_err(Error::file("create", &root))?;
        Apt::new(cache, "bookworm", &["deb main bookworm"])?
            .unpack_with_dependencies(&DEMO_PACKAGES, &root)?;
        let script = root.join("hello");
        fs::write(&script, DEMO_SCRIPT).map_err(Error::file("write", script))
    })?;
    Ok(entry.join("root"))
}

/// The command that `make build` has built, or the one in the folder `$COFFERDAM_BIN`.
fn cofferdam() -> PathBuf {
    let folder = std::env::var_os("COFFERDAM_BIN")
        .map_or("target/x86_64-unknown-linux-musl/release".into(), PathBuf::from);
    folder.join("cofferdam")
}

/// Runs a command that boots the guests of `tier`, where they run, with these variables in its environment.
fn run(
    assets: &Assets,
    mut handed_on: Vec<(OsString, OsString)>,
    tier: Tier,
    mut request: Request,
) -> Result<u8, RigError> {
    handed_on.push((assets::ENVIRONMENT.into(), serde_json::json!(assets).to_string().into()));
    if tier.runs_here() {
        progress("running on this machine's own KVM");
        return Ok(directly(&request.command, handed_on)?);
    }
    let what = match tier {
        Tier::Domain => "virtualisation",
        Tier::Snp => "SEV-SNP",
    };
    progress(format_args!("this machine offers no {what}: running in the rig, an emulated one (slow)"));
    request.environment.extend(handed_on);
    if tier == Tier::Snp {
        request.snp = Some(Snp { assets: SnpAssets::fetch()?, trace: 1 });
    }
    rig::run(assets, &request, &mut io::stdout(), &mut io::stderr())
}

fn directly(command: &[OsString], environment: Vec<(OsString, OsString)>) -> Result<u8, Error> {
    let Some((program, arguments)) = command.split_first() else { return Ok(0) };
    let status = Command::new(program)
        .args(arguments)
        .envs(environment)
        .status()
        .map_err(|source| Error::Start { program: program.to_string_lossy().into_owned(), source })?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Builds the test program `name`, and asks cargo where it is.
fn test_program(name: &str) -> Result<PathBuf, Error> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--quiet", "-p", "cofferdam-tests", "--features", name, "--test", name, "--no-run"]);
    cargo.arg("--message-format=json");
    let output = tool::run(&mut cargo)?;
    String::from_utf8_lossy(&output)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| Error::Unavailable {
            what: format!("the program of the {name} tests"),
            reason: "cargo does not name it in its messages".to_owned(),
        })
}
