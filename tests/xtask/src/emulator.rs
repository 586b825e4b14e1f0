//! The emulator: QEMU with the patch series of `tests/emulator`, built from Debian's source package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::Apt;
use crate::cache::Cache;
use crate::{Error, tool};

/// Debian's source package.
const SOURCE: &str = "qemu";

/// The version of it that the series is made for, of trixie-security.
const VERSION: &str = "1:10.0.13+ds-0+deb13u1";

/// What the emulator is linked to.
const RUNTIME_PACKAGES: [&str; 7] =
    ["libglib2.0-0", "libpixman-1-0", "libnettle8", "libhogweed6", "libgmp10", "libssl3", "zlib1g"];

/// What building it needs, apart from meson.
const BUILD_PACKAGES: [&str; 17] = [
    "gcc",
    "libc6-dev",
    "make",
    "ninja-build",
    "pkg-config",
    "flex",
    "bison",
    "dpkg-dev",
    "patch",
    "python3-venv",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "libssl-dev",
    "nettle-dev",
    "zlib1g-dev",
    "libattr1-dev",
    "libcap-ng-dev",
];

const CONFIGURE: &[&str] = &[
    "--python=/usr/bin/python3",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-tcg",
    "--enable-system",
    "--enable-virtfs",
    "--enable-attr",
    "--enable-pixman",
    "--enable-nettle",
    "--enable-malloc-trim",
    "--disable-docs",
    "--disable-fdt",
    "--disable-tools",
    "--disable-install-blobs",
    "--disable-werror",
];

/// The emulator's program; built if it is not in `cache`. Makes sure that the
/// libraries it needs are there.
pub fn fetch(cache: &Cache) -> Result<PathBuf, Error> {
    let series = series()?;
    let pinned = format!("{SOURCE}={VERSION}");
    let is_built = cache.has("qemu", &recipe(&pinned, &series));
    let source = if is_built { pinned } else { offered_source(cache, &recipe(&pinned, &series))? };
    let entry = cache.entry("qemu", &recipe(&source, &series), |directory| {
        let program = directory.join("qemu-system-x86_64");
        build(cache, &source, &series, directory, &program)
    })?;
    let program = entry.join("qemu-system-x86_64");
    check(&program)?;
    Ok(program)
}

/// What an emulator depends on that is built of the source package `source` with `series`.
fn recipe<'a>(source: &'a str, series: &'a [(PathBuf, Vec<u8>)]) -> Vec<&'a [u8]> {
    let patches = series.iter().map(|(_, content)| content.as_slice());
    [b"1", source.as_bytes()].into_iter().chain(patches).collect()
}

/// The source package to build for what `wanted` is the recipe of: that of [`VERSION`], or what has taken its place. The choice is kept,
/// so that what was built stays in use.
fn offered_source(cache: &Cache, wanted: &[&[u8]]) -> Result<String, Error> {
    let entry = cache.entry("qemu-version", wanted, |directory| {
        let sources = source_packages(cache)?.show("showsrc", SOURCE)?;
        let offered = sources.iter().filter(|source| source.get("Package") == Some(SOURCE));
        let offered: Vec<&str> = offered.filter_map(|source| source.get("Version")).collect();
        let version = choose_version(VERSION, &offered)?;
        let path = directory.join("version");
        fs::write(&path, version).map_err(Error::file("write", path))
    })?;
    let path = entry.join("version");
    let version = fs::read_to_string(&path).map_err(Error::file("read", path))?;
    if version != VERSION {
        tool::progress(format_args!(
            "Debian does not offer {SOURCE} {VERSION}: taking {version} in its place"
        ));
    }
    Ok(format!("{SOURCE}={version}"))
}

/// `pinned` if it is offered, else the newest that is offered of the same upstream series.
fn choose_version<'a>(pinned: &str, offered: &[&'a str]) -> Result<&'a str, Error> {
    if let Some(version) = offered.iter().find(|version| **version == pinned) {
        return Ok(version);
    }
    let mut newest = None;
    for version in offered.iter().copied().filter(|version| series_of(version) == series_of(pinned)) {
        if newest.map_or(Ok(true), |newest| is_newer(version, newest))? {
            newest = Some(version);
        }
    }
    newest.ok_or_else(|| Error::Unavailable {
        what: format!("the source of {SOURCE} {pinned}, or a newer one of its series"),
        reason: format!("Debian offers {}", offered.join(", ")),
    })
}

/// Epoch and the first two numbers of a version: `1:10.0.13+ds-1` is of `1:10.0`.
fn series_of(version: &str) -> Option<&str> {
    let (point, _) = version.match_indices('.').nth(1)?;
    version.get(..point)
}

fn is_newer(version: &str, than: &str) -> Result<bool, Error> {
    let mut compare = Command::new("dpkg");
    let status = compare.args(["--compare-versions", version, "gt", than]).status();
    Ok(status.map_err(|source| Error::Start { program: "dpkg".into(), source })?.success())
}

/// The source packages of Debian 13.
fn source_packages(cache: &Cache) -> Result<Apt, Error> {
    Apt::new(cache, "trixie-source", &["deb-src main trixie", "deb-src security trixie-security"])
}

/// The directory of the emulated machine's firmware: SeaBIOS, and the option
/// ROM with which it starts the kernel given to the emulator.
pub fn firmware(cache: &Cache) -> Result<PathBuf, Error> {
    cache.entry("firmware", &[b"1"], |directory| {
        let unpacked = directory.join("unpacked");
        fs::create_dir(&unpacked).map_err(Error::file("create", &unpacked))?;
        let apt = Apt::new(cache, "bookworm", &["deb main bookworm"])?;
        apt.unpack("seabios", &unpacked)?;
        apt.unpack("qemu-system-data", &unpacked)?;
        for file in ["seabios/bios-256k.bin", "qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin"] {
            let from = unpacked.join("usr/share").join(file);
            let name = Path::new(file).file_name().unwrap_or_default();
            fs::rename(&from, directory.join(name)).map_err(Error::file("move", from))?;
        }
        fs::remove_dir_all(&unpacked).map_err(Error::file("remove", unpacked))
    })
}

/// Starts the emulator once; if it does not, its libraries may be missing.
fn check(program: &Path) -> Result<(), Error> {
    let start = || tool::run(Command::new(program).arg("--version"));
    if start().is_err() {
        tool::install("the emulator", &RUNTIME_PACKAGES)?;
        start()?;
    }
    Ok(())
}

fn repository() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().and_then(Path::parent);
    root.unwrap_or(Path::new("."))
}

/// The patches, with their contents, in order.
fn series() -> Result<Vec<(PathBuf, Vec<u8>)>, Error> {
    let directory = repository().join("tests/emulator/patches");
    let entries = fs::read_dir(&directory).map_err(Error::file("read", &directory))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    paths.sort();
    let content = |path: PathBuf| {
        let content = fs::read(&path).map_err(Error::file("read", &path))?;
        Ok((path, content))
    };
    paths.into_iter().map(content).collect()
}

/// Builds the emulator of the source package `source` in `directory` and moves it to `program`.
fn build(
    cache: &Cache,
    source: &str,
    series: &[(PathBuf, Vec<u8>)],
    directory: &Path,
    program: &Path,
) -> Result<(), Error> {
    tool::progress("building the emulator from Debian's source (5 to 10 minutes on 2 cores)");
    tool::install("building the emulator", &BUILD_PACKAGES)?;
    let work = directory.join("work");
    fs::create_dir(&work).map_err(Error::file("create", &work))?;
    let meson = work.join("meson");
    fs::create_dir(&meson).map_err(Error::file("create", &meson))?;
    let lines = ["deb main bookworm-backports", "deb main bookworm"];
    Apt::new(cache, "bookworm-backports", &lines)?.unpack("meson/bookworm-backports", &meson)?;
    source_packages(cache)?.source(source, &work)?;
    let tree = unpack_source(&work)?;
    for (path, _) in series {
        tool::run(Command::new("patch").args(["-s", "-p1", "-i"]).arg(path).current_dir(&tree))?;
    }
    compile(&tree, &meson)?;
    let built = tree.join("build/qemu-system-x86_64");
    tool::run(Command::new("strip").arg(&built))?;
    fs::rename(&built, program).map_err(Error::file("move", built))?;
    fs::remove_dir_all(&work).map_err(Error::file("remove", work))
}

fn unpack_source(work: &Path) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(work).map_err(Error::file("read", work))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    let description = paths.find(|path| path.extension().is_some_and(|extension| extension == "dsc"));
    let description = description.ok_or_else(|| Error::Malformed {
        path: work.to_owned(),
        reason: "no .dsc in the source package".into(),
    })?;
    let tree = work.join("qemu");
    // apt-get has checked it against the signed list of sources.
    let mut unpack = Command::new("dpkg-source");
    tool::run(unpack.args(["-x", "--no-check"]).arg(description).arg(&tree))?;
    Ok(tree)
}

fn compile(tree: &Path, meson: &Path) -> Result<(), Error> {
    let build = tree.join("build");
    fs::create_dir(&build).map_err(Error::file("create", &build))?;
    // Debian 12's own meson is too old; the one of backports is not installed.
    let modules = meson.join("usr/lib/python3/dist-packages");
    let program = |name: &str| {
        let mut command = Command::new(name);
        command.env("PYTHONPATH", &modules).current_dir(&build);
        command
    };
    let flags = format!("--extra-cflags=-ffile-prefix-map={}=", tree.display());
    tool::progress("configuring the emulator");
    tool::run(program("../configure").args(CONFIGURE).arg(flags))?;
    tool::progress("compiling the emulator");
    tool::run(program("ninja").arg("qemu-system-x86_64"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_is_complete_and_in_order() {
        let series = series().unwrap();
        for (index, (path, content)) in series.iter().enumerate() {
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(name.starts_with(&format!("{:04}-", index + 1)), "{name}");
            assert!(content.starts_with(b"From "), "{name}");
        }
        let last = String::from_utf8_lossy(&series.last().unwrap().1).into_owned();
        assert!(last.contains(&format!("[PATCH {0}/{0}]", series.len())));
    }

    const RELEASE: &str = "1:10.0.8+ds-0+deb13u1";
    const NEXT: &str = "1:10.0.14+ds-0+deb13u1";
    const OTHER: &str = "1:10.1.2+ds-1~bpo13+1";

    #[test]
    fn the_pinned_version_is_taken_while_it_is_offered() {
        assert_eq!(choose_version(VERSION, &[NEXT, VERSION, RELEASE]).unwrap(), VERSION);
    }

    #[test]
    fn then_the_newest_of_its_series_is() {
        for offered in [[RELEASE, NEXT, OTHER], [NEXT, OTHER, RELEASE], [OTHER, RELEASE, NEXT]] {
            assert_eq!(choose_version(VERSION, &offered).unwrap(), NEXT, "{offered:?}");
        }
        assert_eq!(
            choose_version(VERSION, &["1:10.0.14+ds-1", "1:10.0.14+ds-0+deb13u2"]).unwrap(),
            "1:10.0.14+ds-1"
        );
    }

    #[test]
    fn no_other_series_is_taken() {
        for offered in [&[][..], &[OTHER], &["1:9.2.4+ds-1", "10.0.13", "1:10.10.1", "1:10"]] {
            let error = choose_version(VERSION, offered).unwrap_err().to_string();
            assert!(error.contains(VERSION) && error.contains(&offered.join(", ")), "{error}");
        }
    }

    /// Debian is not asked again.
    #[test]
    fn a_choice_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let entry = cache.entry("qemu-version", &[b"wanted"], |directory| {
            fs::write(directory.join("version"), NEXT).unwrap();
            Ok(())
        });
        entry.unwrap();
        assert_eq!(offered_source(&cache, &[b"wanted"]).unwrap(), format!("qemu={NEXT}"));
    }
}
