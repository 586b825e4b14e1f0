//! What the kernel lets each kind of thread ask of it, once a guest may run.
//!
//! The policies are `resources/seccomp/*.json`, one per kind of thread. Cargo compiles them to BPF programs, which
//! are all that the monitor holds; another file is compiled when it is given. Each thread installs its own:
//!
//! | thread | when |
//! |---|---|
//! | `api` | before it takes its first connection |
//! | `vcpu` | before it enters its guest for the first time |
//! | `vmm`, the main one | when everything is opened and every thread is started, before the vCPUs are let go |
//!
//! A thread inherits the filter of the one that starts it, so all are started before the main thread has its own.
//! A forbidden call is not made; it ends the monitor, see [`violation`].

pub mod violation;

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Read};

use cofferdam_api::source::Source;
use seccompiler::{BpfMap, TargetArch, apply_filter, compile_from_json, sock_filter};
use thiserror::Error;

use crate::descriptor;

/// Largest file of policies, bytes. The built-in ones are some 20 KiB together.
const MAX_FILE: u64 = 1 << 20;

/// A thread of the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The main thread: devices, and what clients ask for.
    Vmm,
    /// That of the vCPU with this index.
    Vcpu(usize),
    /// The one that talks to clients.
    Api,
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmm => f.write_str("vmm"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
            Self::Api => f.write_str("api"),
        }
    }
}

/// Why there are no policies, or why one is not in force.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The file cannot be read.
    #[error("--seccomp-filter {file}: {error}")]
    Read {
        /// The file, as it was given.
        file: String,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// The file is no policy.
    #[error("--seccomp-filter {file}: {error}")]
    Compile {
        /// The file, as it was given.
        file: String,
        /// What is wrong, and where.
        #[source]
        error: seccompiler::Error,
    },
    /// The file leaves a kind of thread without a policy.
    #[error("--seccomp-filter {file}: has no policy \"{kind}\"; there have to be vmm, vcpu and api")]
    Missing {
        /// The file, as it was given.
        file: String,
        /// The kind that it lacks.
        kind: &'static str,
    },
    /// The file has a policy for threads that there are not.
    #[error("--seccomp-filter {file}: has a policy {kind:?}; there have to be vmm, vcpu and api")]
    Unknown {
        /// The file, as it was given.
        file: String,
        /// The kind that there is not.
        kind: String,
    },
    /// The handler of violations cannot be had.
    #[error("seccomp: SIGSYS: {0}")]
    Handler(#[source] io::Error),
    /// The kernel takes no filter.
    #[error("seccomp: thread {thread}: {error} (--no-seccomp goes without)")]
    Install {
        /// The thread.
        thread: Thread,
        /// What the kernel answered.
        #[source]
        error: seccompiler::Error,
    },
}

/// A BPF program; an empty one filters nothing.
type Program = Cow<'static, [sock_filter]>;

/// The policies of all kinds of thread.
pub struct Policies {
    vmm: Program,
    vcpu: Program,
    api: Program,
}

impl Policies {
    /// Those of `resources/seccomp`.
    pub const fn built_in() -> Self {
        const VMM: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/vmm.rs"));
        const VCPU: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/vcpu.rs"));
        const API: &[sock_filter] = &include!(concat!(env!("OUT_DIR"), "/api.rs"));
        Self { vmm: Cow::Borrowed(VMM), vcpu: Cow::Borrowed(VCPU), api: Cow::Borrowed(API) }
    }

    /// None: every thread may ask for everything.
    pub const fn none() -> Self {
        Self { vmm: Cow::Borrowed(&[]), vcpu: Cow::Borrowed(&[]), api: Cow::Borrowed(&[]) }
    }

    /// Compiles those in a file: JSON in seccompiler's format with the policies `vmm`, `vcpu` and `api`.
    pub fn from_file(source: &Source) -> Result<Self, SeccompError> {
        let file = source.to_string();
        let mut text = Vec::new();
        descriptor::open(source)
            // One byte more shows that it is too large.
            .and_then(|file| file.take(MAX_FILE.saturating_add(1)).read_to_end(&mut text))
            .and_then(|length| match length as u64 {
                0..=MAX_FILE => Ok(()),
                _ => Err(io::Error::other(format!("is larger than {MAX_FILE} bytes"))),
            })
            .map_err(|error| SeccompError::Read { file: file.clone(), error })?;
        Self::from_json(&text, file)
    }

    fn from_json(text: &[u8], file: String) -> Result<Self, SeccompError> {
        let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(seccompiler::Error::from);
        let mut programs = match architecture.and_then(|architecture| compile_from_json(text, architecture)) {
            Ok(programs) => programs,
            Err(error) => return Err(SeccompError::Compile { file, error }),
        };
        let take = |kind: &'static str, programs: &mut BpfMap| match programs.remove(kind) {
            Some(program) => Ok(Cow::Owned(program)),
            None => Err(SeccompError::Missing { file: file.clone(), kind }),
        };
        let policies = Self {
            vmm: take("vmm", &mut programs)?,
            vcpu: take("vcpu", &mut programs)?,
            api: take("api", &mut programs)?,
        };
        match programs.into_keys().min() {
            Some(kind) => Err(SeccompError::Unknown { file, kind }),
            None => Ok(policies),
        }
    }

    /// Filters the calling thread, which is `thread`, from now on. The kernel takes this back never.
    pub fn install(&self, thread: Thread) -> Result<(), SeccompError> {
        let program = match thread {
            Thread::Vmm => &self.vmm,
            Thread::Vcpu(_) => &self.vcpu,
            Thread::Api => &self.api,
        };
        if program.is_empty() {
            return Ok(());
        }
        violation::set_thread(thread);
        apply_filter(program).map_err(|error| SeccompError::Install { thread, error })
    }
}

#[cfg(test)]
mod tests;
