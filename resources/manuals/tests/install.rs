//! `make install` into a folder: what is there afterwards, that it says all there is to say and can be read by those
//! it is for, and that `make uninstall` takes it away again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Command as Definition;
use cofferdam_manuals::{make, programs};

const PROGRAMS: [&str; 3] = ["cofferdam", "cofferdam-vmm", "cofferdam-jailer"];

/// A folder to install into, and programs that stand for the real ones.
struct Installed {
    folder: tempfile::TempDir,
    destination: String,
    prefix: String,
}

impl Installed {
    /// Installs below `prefix` of a folder, or into the folder itself.
    fn new(destination: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (destination, prefix) = if destination {
            (path("root"), "/usr/local".to_owned())
        } else {
            (String::new(), path("prefix"))
        };
        fs::create_dir(path("bin")).unwrap();
        for name in PROGRAMS {
            fs::copy("/bin/true", folder.path().join("bin").join(name)).unwrap();
        }
        fs::write(folder.path().join("bin/cofferdam-init"), "init").unwrap();
        fs::write(folder.path().join("image"), "image").unwrap();
        make(&folder.path().join("manuals")).unwrap();
        let installed = Self { folder, destination, prefix };
        installed.make("install-built");
        installed
    }

    fn make(&self, target: &str) {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        let output = Command::new("make")
            .args(["--no-print-directory", target])
            .arg(format!("DESTDIR={}", self.destination))
            .arg(format!("PREFIX={}", self.prefix))
            .arg(format!("BIN_DIR={}", path("bin")))
            .arg(format!("MANUALS={}", path("manuals")))
            .arg(format!("DOMAIN_IMAGE={}", path("image")))
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        assert!(output.status.success(), "{target}: {}", text(&output));
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}{}/{name}", self.destination, self.prefix))
    }

    /// Every file that is installed, and its mode.
    fn files(&self) -> BTreeSet<(String, u32)> {
        let (mut folders, mut files) = (vec![self.path("")], BTreeSet::new());
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(self.path("")).unwrap().display().to_string();
                files.insert((name, entry.metadata().unwrap().permissions().mode() & 0o777));
            }
        }
        files
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn run(program: &str, words: &[&str], path: &Path) -> Output {
    Command::new(program).args(words).arg(path).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// A definition, and those below it, by the names of their pages.
fn pages(definition: &Definition, prefix: &str, found: &mut Vec<(String, Definition)>) {
    let name = format!("{prefix}{}", definition.get_name());
    for command in definition.get_subcommands() {
        pages(command, &format!("{name}-"), found);
    }
    found.push((name, definition.clone()));
}

fn all_pages() -> Vec<(String, Definition)> {
    let mut found = Vec::new();
    programs().iter().for_each(|program| pages(program, "", &mut found));
    found
}

#[test]
fn everything_is_put_in_place_and_taken_away() {
    let installed = Installed::new(true);
    let mut expected = BTreeSet::new();
    for name in PROGRAMS {
        expected.insert((format!("bin/{name}"), 0o755));
        expected.insert((format!("share/bash-completion/completions/{name}"), 0o644));
        expected.insert((format!("share/zsh/site-functions/_{name}"), 0o644));
        expected.insert((format!("share/fish/vendor_completions.d/{name}.fish"), 0o644));
    }
    for (name, _) in all_pages() {
        expected.insert((format!("share/man/man1/{name}.1"), 0o644));
    }
    for unit in ["cofferdam-vmm@.socket", "cofferdam-vmm@.service"] {
        expected.insert((format!("lib/systemd/system/{unit}"), 0o644));
    }
    expected.insert(("lib/cofferdam/cofferdam-init".to_owned(), 0o755));
    expected.insert(("share/cofferdam/domain.igvm".to_owned(), 0o644));
    assert_eq!(installed.files(), expected);
    let service = fs::read_to_string(installed.path("lib/systemd/system/cofferdam-vmm@.service")).unwrap();
    assert!(
        service.contains("\nExecStart=/usr/local/bin/cofferdam-vmm --id %i --api-sock fd:3\n"),
        "{service}"
    );

    fs::write(installed.path("bin/other"), "").unwrap();
    installed.make("uninstall");
    assert_eq!(installed.files().len(), 1, "only what is not ours: {:?}", installed.files());
}

/// A page names its command, every option with its value, and every command below it.
#[test]
fn man_pages_name_everything() {
    let installed = Installed::new(true);
    let pages = all_pages();
    assert!(pages.len() > 10 && pages.iter().any(|(name, _)| name == "cofferdam-host-check"));
    for (name, definition) in pages {
        let page = fs::read_to_string(installed.path(&format!("share/man/man1/{name}.1"))).unwrap();
        // roff writes a hyphen that is no line break as `\-`.
        let page = page.replace("\\-", "-");
        assert!(page.contains(&format!(".TH {name} 1")), "{name}");
        for option in definition.get_opts().filter(|option| !option.is_hide_set()) {
            let long = option.get_long().expect("every option has a long name");
            assert!(page.contains(&format!("--{long}")), "{name}: --{long}");
        }
        for command in definition.get_subcommands() {
            assert!(
                page.contains(&format!("{name}-{}(1)", command.get_name())),
                "{name}: {}",
                command.get_name()
            );
        }
    }
}

#[test]
fn completions_can_be_read_by_their_shells() {
    let installed = Installed::new(true);
    for name in PROGRAMS {
        let bash = installed.path(&format!("share/bash-completion/completions/{name}"));
        let checked = run("bash", &["-n"], &bash);
        assert!(checked.status.success(), "{}", text(&checked));
        // The shells that not every machine has.
        let files = [
            ("zsh", format!("zsh/site-functions/_{name}")),
            ("fish", format!("fish/vendor_completions.d/{name}.fish")),
        ];
        for (shell, file) in files {
            let file = installed.path(&format!("share/{file}"));
            assert!(fs::read_to_string(&file).unwrap().contains(name));
            if let Ok(checked) = Command::new(shell).arg("-n").arg(&file).output() {
                assert!(checked.status.success(), "{}", text(&checked));
            }
        }
    }
    // As bash asks when one presses Tab behind `cofferdam st` and `cofferdam stop --t`.
    let ask = |words: &str, current: u32| {
        let script = format!(
            "source \"$0\"; COMP_WORDS=({words}); COMP_CWORD={current}; \
             _cofferdam cofferdam \"${{COMP_WORDS[$COMP_CWORD]}}\" x; echo \"${{COMPREPLY[*]}}\""
        );
        let path = installed.path("share/bash-completion/completions/cofferdam");
        text(&Command::new("bash").arg("-c").arg(script).arg(path).output().unwrap())
    };
    assert_eq!(ask("cofferdam st", 1), "stats stop\n");
    assert_eq!(ask("cofferdam stop --t", 2), "--timeout\n");
}

#[test]
fn units_are_good() {
    // Without DESTDIR, so that the program of the service is where the unit says.
    let installed = Installed::new(false);
    let units = ["cofferdam-vmm@.socket", "cofferdam-vmm@.service"]
        .map(|unit| installed.path("lib/systemd/system").join(unit));
    let Ok(checked) = Command::new("systemd-analyze").arg("verify").args(&units).output() else {
        // No machine without systemd needs units.
        return;
    };
    assert!(checked.status.success() && !text(&checked).contains("cofferdam-vmm@"), "{}", text(&checked));
}
