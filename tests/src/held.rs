//! What a machine holds for those that run on it: what a leak would make grow.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// How long the machine may take to come back to what it held.
const SETTLE: Duration = Duration::from_secs(240);

/// What the machine holds at one moment.
#[derive(Debug)]
pub struct Held {
    /// Open files of the machine.
    files: usize,
    /// Shared memory of the machine, MiB, as that of guests is.
    shared: usize,
    /// This process's descriptors.
    descriptors: usize,
    /// Control groups.
    groups: usize,
    /// Namespaces that some process is in.
    namespaces: usize,
    /// Locks on files.
    locks: usize,
    /// Mounts that this process sees.
    mounts: String,
}

impl Held {
    /// Looks.
    pub fn now() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let first = |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<usize>().ok());
        let memory = text("/proc/meminfo");
        let groups = text("/proc/cgroups");
        let group_counts =
            groups.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)?.parse::<usize>().ok());
        let shared = memory.lines().find_map(|line| first(line.strip_prefix("Shmem:")?));
        Self {
            files: first(&text("/proc/sys/fs/file-nr")).expect("a number of open files"),
            shared: shared.expect("an amount of shared memory") / 1024,
            descriptors: fs::read_dir("/proc/self/fd").expect("/proc is there").count(),
            groups: group_counts.sum(),
            namespaces: namespaces().len(),
            locks: text("/proc/locks").lines().count(),
            mounts: text("/proc/self/mountinfo"),
        }
    }

    /// Checks that after `starts` of something the machine holds what it held, but for what others on it may have
    /// added meanwhile, which is less than half of what one more for each start would be. It may take a while to settle.
    pub fn check(&self, starts: usize) {
        let end = Instant::now() + SETTLE;
        loop {
            let now = Self::now();
            if !now.has_grown(self, starts / 2) {
                return;
            }
            assert!(Instant::now() < end, "before: {self:?}, after: {now:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn has_grown(&self, before: &Self, by_others: usize) -> bool {
        let has_grown = |of: fn(&Self) -> usize| of(self) > of(before) + by_others;
        has_grown(|held| held.files)
            || has_grown(|held| held.shared)
            || has_grown(|held| held.groups)
            || has_grown(|held| held.namespaces)
            || has_grown(|held| held.locks)
            || self.descriptors > before.descriptors
            || self.mounts != before.mounts
    }
}

/// The namespaces that some process is in.
fn namespaces() -> BTreeSet<String> {
    let processes = fs::read_dir("/proc").expect("/proc is there").flatten();
    let links =
        processes.filter_map(|process| fs::read_dir(process.path().join("ns")).ok()).flatten().flatten();
    links.filter_map(|link| fs::read_link(link.path()).ok()?.into_os_string().into_string().ok()).collect()
}
