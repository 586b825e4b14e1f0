//! What can go wrong in a developer task. The messages are for the person who
//! typed the command: they name the file or program, and what to do.

use std::path::PathBuf;

/// A failed developer task.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb: "read", "create".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("cannot run `{program}`: {source}{}", tool_hint(program))]
    Start {
        /// The program's name.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}):\n{}", output.trim_end())]
    Failed {
        /// The command line.
        command: String,
        /// Its exit status, or the signal that ended it.
        status: std::process::ExitStatus,
        /// The end of what it wrote to stderr, or where that is.
        output: String,
    },
    /// A file's contents are not what they should be.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Debian packages are missing that only an administrator can install.
    #[error("{purpose} needs packages that are not installed; run\n    apt-get install -y --no-install-recommends {}", packages.join(" "))]
    Packages {
        /// What needs them.
        purpose: &'static str,
        /// The missing ones.
        packages: Vec<String>,
    },
    /// A package repository does not have what the recipe asks for.
    #[error("{what}: {reason}")]
    Unavailable {
        /// What was looked for.
        what: String,
        /// Why it is not there.
        reason: String,
    },
    /// A kernel module is neither in the module tree nor built in.
    #[error("{}: no module `{name}`", tree.display())]
    NoModule {
        /// The module tree.
        tree: PathBuf,
        /// The module's name.
        name: String,
    },
}

/// The package of a program that Debian does not install by default.
fn tool_hint(program: &str) -> String {
    let package = match program {
        "xz" => "xz-utils",
        "zstd" => "zstd",
        "dpkg-source" => "dpkg-dev",
        "ninja" => "ninja-build",
        _ => return String::new(),
    };
    format!(" (apt-get install {package})")
}

impl Error {
    /// Makes a [`Error::File`] of an I/O error, for `map_err`.
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
