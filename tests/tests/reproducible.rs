//! The same sources and the same compiler make the same image, wherever they lie and whatever else is different.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cofferdam_tests::image::bz_image;
use cofferdam_tests::place;

/// Copies what git knows of this checkout, as it is now.
fn copy_sources(to: &Path) {
    fs::create_dir_all(to).unwrap();
    let mut list = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(place::root())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pack = Command::new("tar")
        .args(["--create", "--null", "--files-from=-"])
        .current_dir(place::root())
        .stdin(list.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let unpack = Command::new("tar")
        .arg("--extract")
        .current_dir(to)
        .stdin(pack.stdout.take().unwrap())
        .status()
        .unwrap();
    assert!(list.wait().unwrap().success() && pack.wait().unwrap().success() && unpack.success());
}

/// A cargo home at another path. What was downloaded is the same.
fn cargo_home(at: PathBuf) -> PathBuf {
    let own = env::var_os("CARGO_HOME")
        .map_or_else(|| Path::new(&env::var_os("HOME").unwrap()).join(".cargo"), PathBuf::from);
    fs::create_dir(&at).unwrap();
    symlink(own.join("registry"), at.join("registry")).unwrap();
    at
}

/// The image that a `cofferdam` makes of the files in `folder`.
fn image(cofferdam: &Path, folder: &Path) -> Vec<u8> {
    let words = "image build --kernel kernel --initrd initrd --cmdline quiet -o domain.igvm";
    let status =
        Command::new(cofferdam).args(words.split(' ')).current_dir(folder).stdout(Stdio::null()).status();
    assert!(status.unwrap().success());
    fs::read(folder.join("domain.igvm")).unwrap()
}

#[test]
#[ignore = "builds the command twice; part of `make test-all`"]
fn two_copies_of_the_sources_make_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("kernel"), bz_image()).unwrap();
    fs::write(folder.join("initrd"), [42; 5000]).unwrap();
    let expected = image(&place::cofferdam(), folder);
    for (place, home, flags) in
        [("a", "home", ""), ("another/and/a/longer/path", "home-2", "-Cdebuginfo=0 -Copt-level=1")]
    {
        let sources = folder.join(place);
        copy_sources(&sources);
        let status = Command::new("cargo")
            .args(["build", "--quiet", "--package", "cofferdam-cli"])
            .current_dir(&sources)
            .env("CARGO_HOME", cargo_home(folder.join(home)))
            .env("CARGO_TARGET_DIR", sources.join("target"))
            .env("CARGO_INCREMENTAL", "0")
            .env("RUSTFLAGS", flags)
            .status();
        assert!(status.unwrap().success());
        let built = image(&sources.join("target/debug/cofferdam"), folder);
        assert!(built == expected, "built in {place} it differs");
    }
}
