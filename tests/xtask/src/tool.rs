//! Runs other programs: `apt-get`, `dpkg-deb`, `xz` and the like.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Error;

/// How much of a failed program's stderr is shown, bytes.
const TAIL: u64 = 4096;

/// Says on stderr what is being done.
pub fn progress(text: impl std::fmt::Display) {
    eprintln!("xtask: {text}");
}

/// Runs `command` to its end with its stdin closed; returns its stdout.
pub fn run(command: &mut Command) -> Result<Vec<u8>, Error> {
    command.stdin(Stdio::null());
    finish(command)
}

/// Runs `program` as a filter with the file `input` as its stdin; returns its stdout.
pub fn filter_file(program: &str, arguments: &[&str], input: &Path) -> Result<Vec<u8>, Error> {
    let input = File::open(input).map_err(Error::file("open", input))?;
    finish(Command::new(program).args(arguments).stdin(input))
}

/// Runs `program` as a filter with `input` as its stdin; returns its stdout.
pub fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, Error> {
    let mut file = scratch()?;
    file.write_all(input)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(Error::file("write", std::env::temp_dir()))?;
    finish(Command::new(program).args(arguments).stdin(file))
}

/// A file without a name: it is gone as soon as nobody has it open.
pub fn scratch() -> Result<File, Error> {
    tempfile::tempfile().map_err(Error::file("create a file in", std::env::temp_dir()))
}

/// The last bytes of `file`, as text.
pub fn tail(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let read = file
        .seek(SeekFrom::Start(length.saturating_sub(TAIL)))
        .and_then(|_| file.take(TAIL).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(unreadable: {error})"),
    }
}

fn finish(command: &mut Command) -> Result<Vec<u8>, Error> {
    let mut errors = scratch()?;
    let stderr = errors.try_clone().map_err(Error::file("duplicate", "stderr"))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .and_then(|child| child.wait_with_output())
        .map_err(|source| Error::Start { program, source })?;
    if !output.status.success() {
        let status = output.status;
        return Err(Error::Failed { command: line(command), status, output: tail(&mut errors) });
    }
    Ok(output.stdout)
}

/// The command line of `command`, quoted for a shell.
pub fn line(command: &Command) -> String {
    let words: Vec<String> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(quote).collect();
    words.join(" ")
}

/// `word` so that a POSIX shell reads it back as one word.
pub fn quote(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Which of `packages` dpkg does not have installed.
pub fn missing_packages(packages: &[&str]) -> Vec<String> {
    let installed = |package: &&str| {
        Command::new("dpkg-query")
            .args(["-W", "-f=${db:Status-Status}", package])
            .stderr(Stdio::null())
            .output()
            .is_ok_and(|output| output.stdout.starts_with(b"installed"))
    };
    packages.iter().filter(|package| !installed(package)).map(|package| (*package).to_owned()).collect()
}

/// Installs what is missing of `packages` if this process may; an error that
/// says what to type if it may not.
pub fn install(purpose: &'static str, packages: &[&str]) -> Result<(), Error> {
    let missing = missing_packages(packages);
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Packages { purpose, packages: missing });
    }
    progress(format_args!("{purpose} needs {}: installing", missing.join(" ")));
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-qq", "-y", "--no-install-recommends", "install"])
        .args(&missing))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_survive_a_shell() {
        for word in ["plain", "", "two words", "it's", "$HOME `x` \"y\" \\", "-a=b,c", "new\nline", "*?["] {
            let script = format!("printf %s {}", quote(OsStr::new(word)));
            let echoed = run(Command::new("sh").args(["-c", &script])).unwrap();
            assert_eq!(String::from_utf8(echoed).unwrap(), word);
        }
    }

    #[test]
    fn a_failure_shows_command_status_and_stderr() {
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c 'echo why >&2; exit 3'"), "{error}");
        assert!(error.contains("exit status: 3") && error.ends_with("why"), "{error}");
        let error = run(&mut Command::new("/no/such/program")).unwrap_err().to_string();
        assert!(error.contains("/no/such/program"), "{error}");
    }

    #[test]
    fn a_filter_may_read_less_or_write_more_than_its_input() {
        assert_eq!(filter("head", &["-c", "2"], &vec![b'a'; 1 << 20]).unwrap(), b"aa");
        assert_eq!(filter("sed", &["s/x/yy/g"], b"xx").unwrap(), b"yyyy");
    }

    #[test]
    fn missing_packages_are_named() {
        assert_eq!(missing_packages(&["dpkg", "no-such-package"]), ["no-such-package"]);
    }
}
