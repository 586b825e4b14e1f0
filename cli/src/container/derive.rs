//! A new manifest from a stored one, with what the command line says; or, of a manifest that is used exactly as it is,
//! the option that contradicts it.

use cofferdam_container::image::Image;
use cofferdam_container::process::{Identity, ProcessError, identity_by_numbers};
use cofferdam_container_manifest::{
    Manifest, ManifestError, Protection, Scratch, Signal, StartError, digest, encode,
};
use thiserror::Error;

/// What a terminal is to programs that are not told, as of other container tools.
const TERM: &str = "xterm";

/// What the command line says of a container.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Program and arguments, in place of the image's command.
    pub command: Vec<String>,
    /// Variables, with their values.
    pub env: Vec<(String, String)>,
    /// User and group.
    pub user: Option<String>,
    /// Size of the scratch device, bytes.
    pub scratch: Option<u64>,
    /// A read-only root file system.
    pub read_only: bool,
    /// A terminal.
    pub terminal: bool,
    /// Standard input.
    pub stdin: bool,
    /// Further commands that the host may run.
    pub exec: Vec<Vec<String>>,
    /// Further signals that the host may send.
    pub signals: Vec<Signal>,
}

/// A manifest that is bound, and what a start adds to it.
#[derive(Debug)]
pub struct Bound {
    /// The manifest.
    pub manifest: Manifest,
    /// Its encoding.
    pub bytes: Vec<u8>,
    /// The digest that the launch binds.
    pub digest: [u8; 32],
    /// Values that this start gives to variables.
    pub start: Vec<(String, String)>,
}

/// Why there is no such manifest.
#[derive(Debug, Error)]
pub enum DeriveError {
    /// The manifest is used as it is.
    #[error("{option}: the manifest says otherwise ({field}), and --manifest uses it as it is")]
    Contradicts {
        /// The option.
        option: &'static str,
        /// The field that has another value.
        field: &'static str,
    },
    /// Nobody knows what the image says.
    #[error(
        "{0}: the container's folder has no image.json, which `cofferdam container build` writes; build it again"
    )]
    NoImage(&'static str),
    /// The image does not know it, or says of no program.
    #[error("{option}: {error}")]
    Image {
        /// The option.
        option: &'static str,
        /// Why not.
        error: ProcessError,
    },
    /// No manifest can say that.
    #[error("{option}: {error}")]
    Manifest {
        /// The option.
        option: &'static str,
        /// Why not.
        error: ManifestError,
    },
    /// A value for a start.
    #[error("--env: {0}")]
    Start(#[from] StartError),
}

/// The manifest that `changes` make of `base`, whose image is `image`. If it is to be used exactly as it is, they may
/// only say what it says, and give values to the variables that it declares for a start.
///
/// # Errors
/// If something contradicts an exact manifest, or is not possible.
pub fn derive(
    base: Manifest,
    image: Option<&Image>,
    changes: &Changes,
    exact: bool,
) -> Result<Bound, DeriveError> {
    let mut deriving = Deriving { manifest: base, exact };
    deriving.process(image, changes)?;
    deriving.host(changes)?;
    let start = deriving.environment(&changes.env)?;
    let manifest = deriving.manifest;
    manifest.process.start_environment(&start)?;
    let bytes =
        encode(&manifest).map_err(|error| DeriveError::Manifest { option: option_of(&error), error })?;
    let digest = digest(&bytes);
    Ok(Bound { manifest, bytes, digest, start })
}

struct Deriving {
    manifest: Manifest,
    exact: bool,
}

impl Deriving {
    /// Gives a field the value that an option asks for.
    fn set<T: PartialEq>(
        &mut self,
        option: &'static str,
        field: &'static str,
        place: impl FnOnce(&mut Manifest) -> &mut T,
        value: T,
    ) -> Result<(), DeriveError> {
        let place = place(&mut self.manifest);
        if *place == value {
            return Ok(());
        }
        if self.exact {
            return Err(DeriveError::Contradicts { option, field });
        }
        *place = value;
        Ok(())
    }

    fn process(&mut self, image: Option<&Image>, changes: &Changes) -> Result<(), DeriveError> {
        if !changes.command.is_empty() {
            const OPTION: &str = "COMMAND";
            let image = image.ok_or(DeriveError::NoImage(OPTION))?;
            let failed = |error| DeriveError::Image { option: OPTION, error };
            let args = image.args(&changes.command).map_err(failed)?;
            self.set(OPTION, "process.args", |manifest| &mut manifest.process.args, args)?;
        }
        if let Some(user) = &changes.user {
            const OPTION: &str = "--user";
            let (uid, gid, groups) = identity(image, user)?;
            self.set(OPTION, "process.uid", |manifest| &mut manifest.process.uid, uid)?;
            self.set(OPTION, "process.gid", |manifest| &mut manifest.process.gid, gid)?;
            self.set(OPTION, "process.groups", |manifest| &mut manifest.process.groups, groups)?;
            if let Some(home) = image.filter(|_| !self.exact).and_then(|image| image.home(user)) {
                let env = &mut self.manifest.process.env;
                env.retain(|entry| !entry.starts_with("HOME="));
                env.push(home);
            }
        }
        if let Some(size) = changes.scratch {
            let stored = self.manifest.scratch.as_ref();
            let protection = stored.map_or(Protection::Authenticated, |scratch| scratch.protection);
            let scratch = Some(Scratch { protection, size });
            self.set("--scratch", "scratch", |manifest| &mut manifest.scratch, scratch)?;
        }
        if changes.read_only {
            let field = "process.read_only_root";
            self.set("--read-only", field, |manifest| &mut manifest.process.read_only_root, true)?;
        }
        Ok(())
    }

    fn host(&mut self, changes: &Changes) -> Result<(), DeriveError> {
        if changes.terminal {
            self.set("--tty", "process.terminal", |manifest| &mut manifest.process.terminal, true)?;
            if !self.exact {
                // A terminal that nobody can type on, and that never has the right size, is none.
                self.manifest.host.stdin = true;
                self.allow_signals(&[Signal::Winch])?;
                let env = &mut self.manifest.process.env;
                if !env.iter().any(|entry| entry.starts_with("TERM=")) {
                    env.push(format!("TERM={TERM}"));
                }
            }
        }
        if changes.stdin {
            self.set("--interactive", "host.stdin", |manifest| &mut manifest.host.stdin, true)?;
        }
        let mut exec = self.manifest.host.exec.clone();
        for command in &changes.exec {
            if !exec.contains(command) {
                exec.push(command.clone());
            }
        }
        self.set("--allow-exec", "host.exec", |manifest| &mut manifest.host.exec, exec)?;
        self.allow_signals(&changes.signals)
    }

    fn allow_signals(&mut self, allowed: &[Signal]) -> Result<(), DeriveError> {
        let mut signals = [self.manifest.host.signals.as_slice(), allowed].concat();
        signals.sort_unstable();
        signals.dedup();
        self.set("--allow-signal", "host.signals", |manifest| &mut manifest.host.signals, signals)
    }

    /// Takes the variables in, but for those that the manifest leaves to each start, which it returns.
    fn environment(&mut self, given: &[(String, String)]) -> Result<Vec<(String, String)>, DeriveError> {
        let mut start = Vec::new();
        let mut env = self.manifest.process.env.clone();
        for (name, value) in given {
            if self.manifest.process.start_env.iter().any(|variable| variable.name == *name) {
                start.push((name.clone(), value.clone()));
                continue;
            }
            let entry = format!("{name}={value}");
            let same = |entry: &&mut String| entry.split_once('=').is_some_and(|(known, _)| known == name);
            match env.iter_mut().find(same) {
                Some(known) => *known = entry,
                None => env.push(entry),
            }
        }
        self.set("--env", "process.env", |manifest| &mut manifest.process.env, env)?;
        Ok(start)
    }
}

/// Numbers need no image.
fn identity(image: Option<&Image>, user: &str) -> Result<Identity, DeriveError> {
    const OPTION: &str = "--user";
    let failed = |error| DeriveError::Image { option: OPTION, error };
    match image {
        Some(image) => image.identity(user).map_err(failed),
        None => identity_by_numbers(user).ok_or(DeriveError::NoImage(OPTION)),
    }
}

/// The option that gave a field its value. The manifest was valid before.
fn option_of(error: &ManifestError) -> &'static str {
    const OPTIONS: [(&str, &str); 7] = [
        ("process.args", "COMMAND"),
        ("process.env", "--env"),
        ("process.uid", "--user"),
        ("process.gid", "--user"),
        ("process.groups", "--user"),
        ("host.exec", "--allow-exec"),
        ("scratch", "--scratch"),
    ];
    let ManifestError::Field { field, .. } = error else { return "manifest" };
    let found = OPTIONS.iter().find(|(prefix, _)| field.starts_with(prefix));
    found.map_or("manifest", |(_, option)| option)
}

#[cfg(test)]
mod tests;
