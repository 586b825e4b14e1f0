//! A domain of these tests: the tiers' Linux guest in an image, and what its owner does with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_api::status::{ExitReason, Platform};
use cofferdam_tests::{Finished, Guest, Run, place};
use serde_json::Value;
use xtask::assets::Assets;

/// What the kernel says when it runs protected.
pub const ACTIVE: &str = "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP";

/// An image of the Linux guest.
pub struct Domain {
    /// The guest, in whose directory the image is.
    pub guest: Guest,
    /// The image.
    pub image: PathBuf,
}

impl Domain {
    /// The guest with `words` added to the default command line.
    pub fn new(words: &str) -> Self {
        Self::with(words, &[])
    }

    /// The same, built with more options.
    pub fn with(words: &str, options: &[&str]) -> Self {
        Self::of(|assets| assets.guest_kernel.clone(), words, options)
    }

    /// The same, with another kernel.
    pub fn of(kernel: impl FnOnce(&Assets) -> PathBuf, words: &str, options: &[&str]) -> Self {
        let guest = Guest::new();
        let image = guest.file("domain.igvm");
        let line = format!("{DEFAULT_COMMAND_LINE} quiet {words}");
        let mut build = Command::new(place::cofferdam());
        build.args(["image", "build", "--kernel"]).arg(kernel(guest.assets()));
        build.arg("--initrd").arg(guest.file("initrd")).args(["--cmdline", &line]).args(options);
        finish(build.arg("-o").arg(&image));
        Self { guest, image }
    }

    /// A run of it with SEV-SNP.
    pub fn run(&self, cpus: u32, memory: &str) -> Run {
        run(&self.image, cpus).with("memory", memory)
    }

    /// What its launch digest must be with so many CPUs.
    pub fn measured(&self, cpus: u32) -> String {
        measured(&self.image, cpus)
    }
}

/// A run of any image with SEV-SNP.
pub fn run(image: &Path, cpus: u32) -> Run {
    Run::image(image).with("platform", "snp").with("cpus", cpus.to_string())
}

/// What the launch digest of an image must be with so many CPUs.
pub fn measured(image: &Path, cpus: u32) -> String {
    let mut measure = Command::new(place::cofferdam());
    measure.args(["image", "measure"]).arg(image);
    let text = finish(measure.args(["--platform", "snp", "--json", "--vcpus", &cpus.to_string()]));
    let report: Value = serde_json::from_str(&text).unwrap();
    report["digests"][0]["digest"].as_str().unwrap().to_owned()
}

/// The ID block of an image with so many CPUs, and its authentication, signed with a new key.
pub fn signed(image: &Path, cpus: u32) -> (PathBuf, PathBuf) {
    let key = image.with_extension("key");
    if !key.exists() {
        let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"];
        finish(Command::new("openssl").arg("genpkey").args(curve).arg("-out").arg(&key));
    }
    let mut sign = Command::new(place::cofferdam());
    sign.args(["image", "sign"]).arg(image).args(["--vcpus", &cpus.to_string(), "--key"]).arg(&key);
    finish(sign.arg("-o").arg(image));
    let with = |ending: &str| {
        let mut path = image.as_os_str().to_owned();
        path.push(ending);
        PathBuf::from(path)
    };
    (with(".id-block"), with(".id-auth"))
}

/// Checks that a protected guest did what it was told and powered off.
pub fn succeeded(done: &Finished) {
    let outcome = done.outcome();
    assert_eq!(outcome.exit_reason, ExitReason::PowerOff, "{done}");
    assert_eq!(done.code(), 0, "{done}");
    assert_eq!((outcome.platform, outcome.protected), (Some(Platform::Snp), true), "{done}");
}

/// Runs a command that must succeed; returns what it prints.
pub fn finish(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What `cofferdam image inspect` says of an image.
pub fn inspected(image: &Path) -> Value {
    let text = finish(Command::new(place::cofferdam()).args(["image", "inspect", "--json"]).arg(image));
    serde_json::from_str(&text).unwrap()
}

/// A copy of the file `image`, with one bit flipped at `offset`.
pub fn flipped(image: &Path, offset: u64) -> PathBuf {
    let mut bytes = fs::read(image).unwrap();
    bytes[usize::try_from(offset).unwrap()] ^= 0x10;
    let path = image.with_extension("flipped");
    fs::write(&path, bytes).unwrap();
    path
}
