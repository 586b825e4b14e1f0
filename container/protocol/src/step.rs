//! The step port: what init of a container's domain tells the host of its way to the container's process.
//!
//! One write of 32 bits, to a port whose number `cofferdam_firmware::layout` has:
//!
//! ```text
//! bits  0 to  7  step
//! bits  8 to 15  reason; 0: none
//! bits 16 to 27  index of the object; bits 28 to 30: its kind, 7 for none
//! bit  31        fatal: the domain ends
//! ```
//!
//! So a guest can say little, and nothing of what it computes with. The host shows it as what it is, a claim of the
//! guest's; numbers without a name are shown as numbers.

use std::fmt;

/// What a guest reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The step that init has reached.
    pub step: Step,
    /// What failed in it, if anything did.
    pub reason: Option<Reason>,
    /// What the reason is about.
    pub object: Option<Object>,
    /// Whether the domain ends of it.
    pub fatal: bool,
}

/// Names of numbers, with the words in which they are shown.
macro_rules! numbers {
    ($(#[$meta:meta])* $name:ident: $what:literal; $($(#[$doc:meta])* $variant:ident = $number:literal $word:literal),* $(,)?) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$doc])* $variant,)*
            /// A number without a name.
            Unknown(u8),
        }

        impl $name {
            /// All that have a name.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// What has this number.
            pub fn from_number(number: u8) -> Self {
                match number {
                    $($number => Self::$variant,)*
                    other => Self::Unknown(other),
                }
            }

            /// Its number.
            pub fn number(self) -> u8 {
                match self {
                    $(Self::$variant => $number,)*
                    Self::Unknown(number) => number,
                }
            }
        }

        /// Its name; words are joined by `_`.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($word),)*
                    Self::Unknown(number) => write!(f, concat!($what, "_{}"), number),
                }
            }
        }
    };
}

numbers! {
    /// The steps of init, in their order.
    Step: "step";
    /// Pseudo file systems are mounted.
    PseudoFileSystems = 1 "pseudo_file_systems",
    /// Modules of the kernel are loaded.
    Modules = 2 "modules",
    /// The manifest is read, and compared with the digest that the launch binds.
    Manifest = 3 "manifest",
    /// Layers and data volumes are verified.
    Layers = 4 "layers",
    /// The scratch device is set up.
    Scratch = 5 "scratch",
    /// The root file system is put together.
    Root = 6 "root",
    /// The process is prepared.
    Process = 7 "process",
    /// The process runs.
    Running = 8 "running",
    /// The process has ended, or an orderly stop has begun.
    Stopping = 9 "stopping",
}

numbers! {
    /// Why a step failed.
    Reason: "reason";
    /// It is not there.
    Missing = 1 "missing",
    /// It is there, and the manifest does not have it.
    Unexpected = 2 "unexpected",
    /// It has another size than the manifest says.
    WrongSize = 3 "wrong_size",
    /// It cannot be read.
    Unreadable = 4 "unreadable",
    /// It is larger than anything that is read.
    TooLarge = 5 "too_large",
    /// It is no manifest of a version that is known, or contradicts itself.
    NotValid = 6 "not_valid",
    /// It is not what the launch binds.
    WrongDigest = 7 "wrong_digest",
    /// The launch binds no manifest.
    NoDigest = 8 "no_digest",
    /// The platform gives no attestation report.
    NoReport = 9 "no_report",
    /// The host gives values for a start that the manifest does not allow.
    StartValuesRefused = 10 "start_values_refused",
    /// A block is not what the root hash says.
    VerityFailure = 11 "verity_failure",
    /// dm-verity cannot be set up.
    VerityRefused = 12 "verity_refused",
    /// dm-crypt or dm-integrity cannot be set up.
    EncryptionRefused = 13 "encryption_refused",
    /// There is no hardware random source.
    NoRandomSource = 14 "no_random_source",
    /// It cannot be formatted.
    FormatFailed = 15 "format_failed",
    /// It cannot be mounted.
    MountFailed = 16 "mount_failed",
    /// It cannot be loaded.
    LoadFailed = 17 "load_failed",
    /// A path leads out of the root file system, or through a symbolic link.
    PathRefused = 18 "path_refused",
    /// The program is not there.
    ProgramNotFound = 19 "program_not_found",
    /// The program cannot be run.
    ProgramNotRunnable = 20 "program_not_runnable",
    /// User, groups, capabilities or limits cannot be set.
    IdentityRefused = 21 "identity_refused",
    /// There is no memory left.
    OutOfMemory = 22 "out_of_memory",
    /// The kernel refused something else.
    KernelRefused = 23 "kernel_refused",
    /// Init has an error.
    InitFailed = 24 "init_failed",
}

/// What a reason is about: a kind, and an index in the manifest or in the order of what is done, from 0 to 0xFFE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A layer of the manifest, the lowest first.
    Layer(u16),
    /// A data volume, in the order of the mounts.
    Volume(u16),
    /// A mount of the manifest.
    Mount(u16),
    /// A module, in the order in which they are loaded.
    Module(u16),
    /// A drive, as Linux numbers them.
    Drive(u16),
    /// A pseudo file system, in the order in which they are mounted.
    FileSystem(u16),
    /// Of kind 6, which has no name.
    Unknown(u16),
}

const INDEX: u32 = 0xFFF;
const NO_KIND: u32 = 7;

impl Object {
    fn from_field(field: u32) -> Option<Self> {
        let index = (field & INDEX) as u16;
        match field >> 12 & 7 {
            0 => Some(Self::Layer(index)),
            1 => Some(Self::Volume(index)),
            2 => Some(Self::Mount(index)),
            3 => Some(Self::Module(index)),
            4 => Some(Self::Drive(index)),
            5 => Some(Self::FileSystem(index)),
            6 => Some(Self::Unknown(index)),
            _ => None,
        }
    }

    /// An index that is too large is given as the largest one.
    fn field(self) -> u32 {
        let (kind, index) = match self {
            Self::Layer(index) => (0, index),
            Self::Volume(index) => (1, index),
            Self::Mount(index) => (2, index),
            Self::Module(index) => (3, index),
            Self::Drive(index) => (4, index),
            Self::FileSystem(index) => (5, index),
            Self::Unknown(index) => (6, index),
        };
        kind << 12 | u32::from(index).min(INDEX)
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(index) => write!(f, "layer {index}"),
            Self::Volume(index) => write!(f, "volume {index}"),
            Self::Mount(index) => write!(f, "mount {index}"),
            Self::Module(index) => write!(f, "module {index}"),
            Self::Drive(index) => write!(f, "drive {index}"),
            Self::FileSystem(index) => write!(f, "file system {index}"),
            Self::Unknown(index) => write!(f, "object {index}"),
        }
    }
}

impl Report {
    /// What this number says: every number says something.
    pub fn from_number(number: u32) -> Self {
        let [step, reason, ..] = number.to_le_bytes();
        Self {
            step: Step::from_number(step),
            reason: (reason != 0).then(|| Reason::from_number(reason)),
            object: Object::from_field(number >> 16 & 0x7FFF),
            fatal: number >> 31 != 0,
        }
    }

    /// The number that says it.
    pub fn number(self) -> u32 {
        let object = self.object.map_or(NO_KIND << 12 | INDEX, Object::field);
        u32::from(self.step.number())
            | u32::from(self.reason.map_or(0, Reason::number)) << 8
            | object << 16
            | u32::from(self.fatal) << 31
    }
}

/// As `layers: layer 2 verity failure`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = |name: String| name.replace('_', " ");
        f.write_str(&words(self.step.to_string()))?;
        match (self.object, self.reason) {
            (None, None) => Ok(()),
            (Some(object), None) => write!(f, ": {object}"),
            (None, Some(reason)) => write!(f, ": {}", words(reason.to_string())),
            (Some(object), Some(reason)) => write!(f, ": {object} {}", words(reason.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_report_in_numbers_and_words() {
        let report = Report {
            step: Step::Layers,
            reason: Some(Reason::VerityFailure),
            object: Some(Object::Layer(2)),
            fatal: true,
        };
        assert_eq!(report.number(), 0x8002_0B04);
        assert_eq!(report.to_string(), "layers: layer 2 verity failure");
        let reached = Report { step: Step::PseudoFileSystems, reason: None, object: None, fatal: false };
        assert_eq!(reached.number(), 0x7FFF_0001);
        assert_eq!(reached.to_string(), "pseudo file systems");
    }

    #[test]
    fn numbers_and_names_are_each_one_s_own() {
        let steps: HashSet<_> = Step::ALL.iter().map(ToString::to_string).collect();
        let reasons: HashSet<_> = Reason::ALL.iter().map(ToString::to_string).collect();
        assert_eq!((steps.len(), reasons.len()), (Step::ALL.len(), Reason::ALL.len()));
        for (at, step) in Step::ALL.iter().enumerate() {
            assert_eq!((usize::from(step.number()), Step::from_number(step.number())), (at + 1, *step));
        }
        for (at, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(
                (usize::from(reason.number()), Reason::from_number(reason.number())),
                (at + 1, *reason)
            );
        }
    }

    #[test]
    fn what_has_no_name_is_shown_as_a_number() {
        assert_eq!(Report::from_number(0xE005_C84D).to_string(), "step 77: object 5 reason 200");
        assert_eq!(Report::from_number(0).to_string(), "step 0: layer 0");
    }

    #[test]
    fn an_index_that_is_too_large_stays_an_index() {
        let object = Some(Object::Drive(u16::MAX));
        let report = Report { step: Step::Layers, reason: None, object, fatal: false };
        assert_eq!(Report::from_number(report.number()).object, Some(Object::Drive(0xFFF)));
    }

    proptest! {
        #[test]
        fn every_number_is_a_report_and_back(number in any::<u32>()) {
            let report = Report::from_number(number);
            prop_assert_eq!(Report::from_number(report.number()), report);
            if report.object.is_some() {
                prop_assert_eq!(report.number(), number);
            }
            prop_assert!(!report.to_string().is_empty());
        }
    }
}
