//! The guest of the domain and SNP tiers: Debian's cloud kernel and a small initial RAM disk of our own.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use xtask::assets::{Assets, GUEST_MODULES};
use xtask::initramfs::InitramfsBuilder;
use xtask::modules::ModuleTree;

use crate::{Run, place};

const INIT: &[u8] = include_bytes!("guest-init");
/// What gets an attestation report, and the ciphers that its messages are in. They are for a protected guest only, and go
/// to `/snp`.
const SNP_MODULES: [&str; 3] = ["ghash_generic", "gcm", "sev_guest"];
const APPLETS: [&str; 27] = [
    "sh",
    "mount",
    "umount",
    "cat",
    "insmod",
    "uname",
    "echo",
    "poweroff",
    "reboot",
    "devmem",
    "nproc",
    "sync",
    "sha256sum",
    "mkdir",
    "dd",
    "blkdiscard",
    "stty",
    "head",
    "od",
    "sleep",
    "ls",
    "printf",
    "test",
    "dmesg",
    "grep",
    "rm",
    "rmmod",
];

/// A directory for one test, with the guest's initial RAM disk in it.
pub struct Guest {
    assets: Assets,
    directory: TempDir,
}

impl Guest {
    /// A guest with nothing but its kernel.
    #[allow(clippy::new_without_default)] // it makes files
    pub fn new() -> Self {
        let assets = Assets::from_environment().expect("`cargo xtask` names the assets");
        let directory = tempfile::tempdir().expect("a directory can be made");
        let tree = ModuleTree::open(&assets.guest_modules).expect("the guest's modules are there");
        let modules = |names| tree.resolve(names).expect("the guest has these modules");
        let mut image = InitramfsBuilder::new();
        image
            .busybox(&assets.busybox, &APPLETS)
            .and_then(|image| image.program("bin/test-guest", &place::test_guest()))
            .expect("its programs are there")
            .file("init", 0o755, INIT)
            .modules(&modules(&GUEST_MODULES));
        for (index, module) in modules(&SNP_MODULES).iter().enumerate() {
            image.file(&format!("snp/{index}-{}.ko", module.name), 0o644, &module.content);
        }
        fs::write(directory.path().join("initrd"), image.build()).expect("it can be written");
        Self { assets, directory }
    }

    /// Paths of the kernels.
    pub fn assets(&self) -> &Assets {
        &self.assets
    }

    /// A file of this test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What is in the test's directory, but for the RAM disk.
    pub fn files(&self) -> Vec<String> {
        fs::read_dir(self.directory.path())
            .expect("it is there")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != "initrd")
            .collect()
    }

    /// A run of test `name` of the guest's init.
    pub fn run(&self, name: &str) -> Run {
        self.run_kernel(&self.assets.guest_kernel, &format!("test={name}"))
    }

    /// A run of test `name` with `argument`.
    pub fn run_with(&self, name: &str, argument: impl std::fmt::Display) -> Run {
        self.run_kernel(&self.assets.guest_kernel, &format!("test={name} argument={argument}"))
    }

    /// A run of `kernel` with `words` added to the default command line, quietly: the console is slow here.
    pub fn run_kernel(&self, kernel: &Path, words: &str) -> Run {
        let line = format!("{} quiet {words}", cofferdam_api::config::DEFAULT_COMMAND_LINE);
        self.run_line(kernel, &line)
    }

    /// A run of `kernel` with just this command line.
    pub fn run_line(&self, kernel: &Path, line: &str) -> Run {
        Run::verified(kernel).with("initrd", self.file("initrd")).with("memory", "256M").with("cmdline", line)
    }
}
