//! The guest of the domain tests: Debian's cloud kernel and a small initial RAM disk of our own.

use std::fs;
use std::path::{Path, PathBuf};

use cofferdam_tests::{Run, place};
use tempfile::TempDir;
use xtask::assets::{Assets, GUEST_MODULES};
use xtask::initramfs::InitramfsBuilder;
use xtask::modules::ModuleTree;

const INIT: &[u8] = include_bytes!("guest-init");
const APPLETS: [&str; 23] = [
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
];

/// A directory for one test, with the guest's initial RAM disk in it.
pub struct Guest {
    assets: Assets,
    directory: TempDir,
}

impl Guest {
    /// A guest with nothing but its kernel.
    pub fn new() -> Self {
        let assets = Assets::from_environment().expect("`cargo xtask domain-tests` names the assets");
        let directory = tempfile::tempdir().unwrap();
        let modules = ModuleTree::open(&assets.guest_modules).unwrap().resolve(&GUEST_MODULES).unwrap();
        let mut image = InitramfsBuilder::new();
        image
            .busybox(&assets.busybox, &APPLETS)
            .unwrap()
            .program("bin/test-guest", &place::test_guest())
            .unwrap()
            .file("init", 0o755, INIT)
            .modules(&modules);
        fs::write(directory.path().join("initrd"), image.build()).unwrap();
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
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
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
