//! The small guest kernel: Debian's Linux source with the configuration of `resources/kernel`, everything built in.
//!
//! The same source, configuration and compiler give the same bytes, wherever and whenever it is built: Linux has nothing of the
//! machine in it but what is set here (Linux, Documentation/kbuild/reproducible-builds.rst).

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::apt::Apt;
use crate::cache::Cache;
use crate::{Error, tool};

/// Debian's package of the source, and the suites in which it is looked for, the newest version first.
const SOURCE: &str = "linux-source-6.12";
const SUITES: [&str; 2] = ["deb main bookworm-backports", "deb main bookworm"];
/// What is set in the configuration; everything else that can be is off.
const CONFIGURATION: &str = include_str!("../../../resources/kernel/container.config");
/// What is changed in the source.
const PATCH: &str = include_str!("../../../resources/kernel/acpi-without-pci.patch");
/// What building it needs.
const PACKAGES: [&str; 11] =
    ["gcc", "libc6-dev", "make", "patch", "flex", "bison", "bc", "perl", "libelf-dev", "lz4", "xz-utils"];
/// What Linux puts into its banner.
const BANNER: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "cofferdam"),
    ("KBUILD_BUILD_HOST", "cofferdam"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// The kernel's file; built if it is not in `cache`. Beside it are the lists of what is built in, for
/// `cofferdam image build --init`, and `config`, the whole configuration.
pub fn fetch(cache: &Cache) -> Result<PathBuf, Error> {
    let source = source(cache)?;
    let digest = tool::filter_file("sha256sum", &[], &source)?;
    tool::install("building the guest kernel", &PACKAGES)?;
    let compiler = tool::run(Command::new("gcc").arg("--version"))?;
    let recipe = [b"1", CONFIGURATION.as_bytes(), PATCH.as_bytes(), &digest, &compiler];
    let entry = cache.entry("small-kernel", &recipe, |directory| {
        let work = directory.join("work");
        fs::create_dir(&work).map_err(Error::file("create", &work))?;
        build(&source, &work)?;
        for (from, to) in [
            ("arch/x86/boot/bzImage", "vmlinuz"),
            ("modules.builtin", "modules.builtin"),
            ("modules.builtin.modinfo", "modules.builtin.modinfo"),
            (".config", "config"),
        ] {
            let from = work.join(from);
            fs::rename(&from, directory.join(to)).map_err(Error::file("move", from))?;
        }
        fs::remove_dir_all(&work).map_err(Error::file("remove", work))
    })?;
    Ok(entry.join("vmlinuz"))
}

/// The archive of the source.
fn source(cache: &Cache) -> Result<PathBuf, Error> {
    let archive = format!("{SOURCE}.tar.xz");
    let entry = cache.entry(SOURCE, &[b"1"], |directory| {
        let unpacked = directory.join("unpacked");
        fs::create_dir(&unpacked).map_err(Error::file("create", &unpacked))?;
        Apt::new(cache, "bookworm-backports", &SUITES)?.unpack(SOURCE, &unpacked)?;
        let from = unpacked.join("usr/src").join(&archive);
        fs::rename(&from, directory.join(&archive)).map_err(Error::file("move", from))?;
        fs::remove_dir_all(&unpacked).map_err(Error::file("remove", unpacked))
    })?;
    Ok(entry.join(archive))
}

/// Unpacks the archive into `tree`, and compiles it.
fn build(archive: &Path, tree: &Path) -> Result<(), Error> {
    tool::run(Command::new("tar").args(["--strip-components=1", "-xf"]).arg(archive).arg("-C").arg(tree))?;
    for (name, content) in [("container.config", CONFIGURATION), ("container.patch", PATCH)] {
        let path = tree.join(name);
        fs::write(&path, content).map_err(Error::file("write", path))?;
    }
    tool::run(Command::new("patch").args(["-s", "-p1", "-i", "container.patch"]).current_dir(tree))?;
    let make = |arguments: &[&str]| {
        let mut make = Command::new("make");
        make.arg("-s").args(arguments).current_dir(tree);
        // Where `make test-all` starts this, it hands its own settings on.
        make.envs(BANNER).env("LC_ALL", "C").env_remove("MAKEFLAGS").env_remove("MFLAGS");
        tool::run(&mut make)
    };
    make(&["KCONFIG_ALLCONFIG=container.config", "allnoconfig"])?;
    let path = tree.join(".config");
    let configuration = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    let missing = missing(&configuration);
    if !missing.is_empty() {
        let reason = format!("this source cannot have {}", missing.join(", "));
        return Err(Error::Malformed { path, reason });
    }
    tool::progress("compiling the small guest kernel (about 9 minutes of a processor)");
    let jobs = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    make(&[&format!("-j{jobs}"), "bzImage"])?;
    Ok(())
}

/// The lines that were asked for and that `configuration` does not have.
fn missing(configuration: &str) -> Vec<&'static str> {
    let has = |wanted: &&str| configuration.lines().any(|line| line == *wanted);
    CONFIGURATION.lines().filter(|line| line.starts_with("CONFIG_") && !has(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_were_dropped_are_named() {
        assert_eq!(missing(CONFIGURATION), [""; 0]);
        let dropped = CONFIGURATION.replace("CONFIG_DM_VERITY=y", "# CONFIG_DM_VERITY is not set");
        assert_eq!(missing(&dropped), ["CONFIG_DM_VERITY=y"]);
    }

    #[test]
    fn each_line_sets_something_once() {
        let mut names: Vec<_> = CONFIGURATION
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| line.strip_prefix("CONFIG_").and_then(|rest| rest.split_once('=')).unwrap().0)
            .collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
