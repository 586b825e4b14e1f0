//! A container image of Debian with Python: what a minimal system (debootstrap's `minbase`) has, unpacked and not configured, Python, and a
//! program on top, each as a layer of an OCI image layout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::apt::Apt;
use crate::cache::Cache;
use crate::{Error, tool};

/// The essential packages of bookworm, and apt.
const MINBASE: [&str; 24] = [
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "dpkg",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "init-system-helpers",
    "libc-bin",
    "login",
    "ncurses-base",
    "ncurses-bin",
    "perl-base",
    "sed",
    "sysvinit-utils",
    "tar",
    "util-linux",
    "apt",
];
const PYTHON: [&str; 1] = ["python3-minimal"];
/// The program of the highest layer.
const PROGRAM: &str = "import os, sys\nprint(sys.argv[1:], os.environ.get('WORD'), os.getuid(), sep='|')\n";

/// The folder of the image layout.
pub fn fetch(cache: &Cache) -> Result<PathBuf, Error> {
    let recipe =
        [b"1", MINBASE.join(" ").as_bytes(), PYTHON[0].as_bytes(), PROGRAM.as_bytes()].map(<[u8]>::to_vec);
    let recipe: Vec<&[u8]> = recipe.iter().map(Vec::as_slice).collect();
    cache.entry("debian-python", &recipe, |layout| {
        let apt = Apt::new(cache, "bookworm", &["deb main bookworm"])?;
        let place = tempfile::tempdir_in(layout).map_err(Error::file("create a directory in", layout))?;
        let [base, python, program] = ["base", "python", "program"].map(|name| place.path().join(name));
        for folder in [&base, &python, &program.join("srv")] {
            fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
        }
        apt.unpack_with_dependencies(&MINBASE, &base)?;
        // What the package's own script does.
        for name in ["passwd", "group"] {
            let (from, to) = (format!("usr/share/base-passwd/{name}.master"), base.join("etc").join(name));
            fs::copy(base.join(from), &to).map_err(Error::file("write", &to))?;
        }
        apt.unpack_with_dependencies(&PYTHON, &python)?;
        let script = program.join("srv/words.py");
        fs::write(&script, PROGRAM).map_err(Error::file("write", &script))?;
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(Error::file("create", &blobs))?;
        let layers = [base, python, program].map(|content| pack(&content, &blobs));
        let layers = layers.into_iter().collect::<Result<Vec<Value>, Error>>()?;
        let ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids},
            "config": {"Entrypoint": ["/usr/bin/python3"], "Cmd": ["/srv/words.py", "none"]},
        });
        let config = blob(&config, &blobs)?;
        let manifest = blob(&json!({"schemaVersion": 2, "config": config, "layers": layers}), &blobs)?;
        let index = layout.join("index.json");
        let text = json!({"schemaVersion": 2, "manifests": [manifest]}).to_string();
        fs::write(&index, text).map_err(Error::file("write", &index))
    })
}

/// Makes a layer of a folder, and returns its descriptor.
fn pack(content: &Path, blobs: &Path) -> Result<Value, Error> {
    let archive = blobs.join("new");
    let fixed = ["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "-cf"];
    tool::run(Command::new("tar").args(fixed).arg(&archive).arg("-C").arg(content).arg("."))?;
    named(&archive, blobs)
}

fn blob(value: &Value, blobs: &Path) -> Result<Value, Error> {
    let file = blobs.join("new");
    fs::write(&file, value.to_string()).map_err(Error::file("write", &file))?;
    named(&file, blobs)
}

/// Gives a file the name of its digest, and returns its descriptor.
fn named(file: &Path, blobs: &Path) -> Result<Value, Error> {
    let output = tool::run(Command::new("sha256sum").arg(file))?;
    let digest: String = String::from_utf8_lossy(&output).chars().take(64).collect();
    let size = fs::metadata(file).map_err(Error::file("look at", file))?.len();
    fs::rename(file, blobs.join(&digest)).map_err(Error::file("rename", file))?;
    Ok(json!({"digest": format!("sha256:{digest}"), "size": size}))
}
