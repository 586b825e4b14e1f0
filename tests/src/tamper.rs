//! A host that does not keep to the rules: the shipped monitor under a tracer (`hostile-host`) that changes what the
//! monitor asks of the kernel, or does behind its back, at a moment that a test names.
//!
//! The monitor is the shipped binary, with its seccomp policy in force and undumpable as always; the tracer is root, who
//! may trace it all the same, as the host's owner may.

use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// How long anything may take: the machine of the rig is an emulator on a shared one.
const PATIENCE: Duration = Duration::from_secs(240);

/// A side of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// What the host sees.
    Shared,
    /// What only the guest sees.
    Private,
}

/// When a host does something. Each rule is followed once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum When {
    /// KVM has told the monitor what CPUID guests may have.
    Supported,
    /// The monitor hands over pages from this address on to the secure processor, for the time of this number, the first being 0.
    HandOver(u64, u32),
    /// The launch has just been finished; no vCPU has run.
    Launched,
    /// The guest wants the page at this address on this side, for the first time since the launch.
    Change(Side, u64),
    /// The guest wants a page, any one, on this side, and [`Tampering::tell`] was called before.
    Told(Side),
    /// At [`Tampering::tell`], at once.
    Now,
}

/// What a host does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum What {
    /// Changes a register of a function of CPUID, EAX being 0: in what KVM supports, or on the page that is handed over.
    Cpuid {
        /// The function.
        leaf: u32,
        /// Number of the register.
        register: usize,
        /// What it has then.
        value: u32,
    },
    /// Hands over no more than the first so many bytes, and says so.
    HandOverPart(u64),
    /// Says that so many of the bytes are left to be handed over, whatever was.
    ClaimLeft(u64),
    /// Does nothing, and answers with this errno.
    Fail(i32),
    /// Nothing; the log says that it came to this.
    Note,
    /// Answers the guest that it cannot be done, after it was.
    Refuse,
    /// Says that it was done, and does nothing: now, and whenever the guest asks for any of these pages again.
    Withhold,
    /// Writes a byte to a file, which may be mapped for the guest.
    WriteFile(PathBuf, u64, u8),
    /// Takes private pages away; the guest finds new ones in their place.
    TakeAway(Range<u64>),
    /// Moves pages to a side, and takes away what was on the other, without having been asked.
    Convert(Range<u64>, Side),
    /// Puts each of two ranges of private pages in the place of the other. The addresses are where they begin, the lower one
    /// first, and their length.
    Exchange(u64, u64, u64),
    /// Puts the private pages of the first of two ranges in the place of the second, too.
    Double(u64, u64, u64),
    /// Writes this byte all over the shared side of a range.
    Fill(Range<u64>, u8),
}

/// A rule.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    /// When.
    pub when: When,
    /// What.
    pub what: What,
}

/// What the tracer is to do, as it reads it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The rules.
    pub rules: Vec<Rule>,
    /// A file that is there once the rules that wait for it may be followed.
    pub told: PathBuf,
    /// Where the tracer writes what it sees, an [`Event`] on each line.
    pub log: PathBuf,
}

/// What a tracer saw or did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Pages were about to be handed over.
    HandOver(Range<u64>),
    /// The launch was finished.
    Launched,
    /// Pages were about to change sides.
    Change(Side, Range<u64>),
    /// The rule of this number was followed; what the kernel said against it, if anything.
    Followed(usize, Option<String>),
    /// The guest goes on asking for what it does not get.
    Insists,
}

/// Has the host of a [`Run`](crate::Run) follow rules.
pub struct Tampering {
    plan: Plan,
    program: PathBuf,
    folder: TempDir,
}

impl Tampering {
    /// By `program`, which is `hostile-host`.
    pub fn new(program: &str, rules: impl IntoIterator<Item = (When, What)>) -> Self {
        let folder = tempfile::tempdir().expect("a directory can be made");
        let rules = rules.into_iter().map(|(when, what)| Rule { when, what }).collect();
        let plan = Plan { rules, told: folder.path().join("told"), log: folder.path().join("log") };
        File::create(&plan.log).expect("it can be created");
        Self { plan, program: program.into(), folder }
    }

    /// What wraps the command.
    pub fn wrapper(&self) -> [OsString; 2] {
        let path = self.folder.path().join("plan");
        fs::write(&path, serde_json::json!(self.plan).to_string()).expect("it can be written");
        [self.program.clone().into(), path.into()]
    }

    /// Lets the rules be followed that wait for it. Returns when those are that come at once.
    pub fn tell(&self) {
        File::create(&self.plan.told).expect("it can be created");
        for (number, rule) in self.plan.rules.iter().enumerate() {
            if matches!(rule.when, When::Now) {
                self.wait_for(|event| matches!(event, Event::Followed(which, _) if *which == number));
            }
        }
    }

    /// Waits for an event.
    pub fn wait_for(&self, wanted: impl Fn(&Event) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !self.log().iter().any(&wanted) {
            assert!(Instant::now() < end, "it does not happen: {:?}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What happened until now.
    pub fn log(&self) -> Vec<Event> {
        let text = fs::read_to_string(&self.plan.log).expect("it is there");
        // The last line may be half written.
        text.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| serde_json::from_str(line).expect("the tracer writes events"))
            .collect()
    }

    /// Checks that all rules were followed, and the kernel let them be.
    pub fn check(&self) {
        let log = self.log();
        for number in 0..self.plan.rules.len() {
            assert!(log.contains(&Event::Followed(number, None)), "rule {number}: {log:?}");
        }
    }
}
