//! Many jails at a time, a third of which lose a process to `kill -9`.

use std::fs::{self, DirEntry};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use cofferdam_tests::held::Held;
use cofferdam_tests::host::unique_id;
use rustix::process::{Signal, kill_process};

use crate::jail::*;

/// Jails that there are at a time.
const AT_A_TIME: usize = 8;

/// What is done to a jail.
#[derive(Clone, Copy)]
struct Fate {
    /// When, after its start. A jail that is left alone has none.
    killed_after: Option<Duration>,
    /// Which of its processes, counted round: the jailer, and its children in the order of their starts.
    victim: usize,
}

/// A third are killed, at any time from before the jail is there until after its guest runs.
fn fates(jails: usize, mut seed: u64) -> Vec<Fate> {
    let mut random = |below: u64| {
        // The constants are Knuth's, of MMIX.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let mut fate = |number| {
        // As often early as late.
        let longest = [1_000, 5_000, 20_000, 80_000][random(4) as usize];
        let after = Duration::from_micros(random(longest));
        Fate { killed_after: (number % 3 == 0).then_some(after), victim: random(6) as usize }
    };
    (0..jails).map(&mut fate).collect()
}

/// Runs one, and sees to its end.
fn endure(base: &Base, id: &str, fate: Fate) {
    let payload = if fate.killed_after.is_some() { "spin" } else { "hello" };
    let mut command = base.domain(id, payload, VSOCK);
    command.args(["--cgroup", some_cgroup()]);
    let mut jail = Running(with_config(command).spawn().unwrap());
    let Some(after) = fate.killed_after else {
        let (status, text) = jail.finish();
        assert_eq!(status.code(), Some(42), "{id}: {status}: {text}");
        return;
    };
    thread::sleep(after);
    let family: Vec<_> = [jail.pid()].into_iter().chain(jail.children()).collect();
    // It may have gone with another one.
    let _ = kill_process(family[fate.victim % family.len()], Signal::KILL);
    // If that was the keeper, the domain goes on; else this reaches nobody, or comes too late.
    let _ = kill_process(jail.pid(), Signal::TERM);
    let (status, text) = jail.finish();
    assert!(!matches!(status.code(), Some(0 | 42)), "{id}: {status}: {text}");
}

fn is_directory(entry: DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir())
}

fn storm(jails: usize) {
    let _alone = alone();
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    println!("seed {seed}");
    let (base, name) = (Base::new(), unique_id());
    let files_before = names_in(base.directory.path());
    let (fates, next) = (fates(jails, seed), AtomicUsize::new(0));
    let id = |number: usize| format!("{name}-{number}");
    let before = Held::now();
    thread::scope(|scope| {
        let work = || {
            while let number = next.fetch_add(1, Ordering::Relaxed)
                && let Some(fate) = fates.get(number)
            {
                endure(&base, &id(number), *fate);
                fs::remove_file(base.directory.path().join(format!("{}.json", id(number)))).unwrap();
            }
        };
        (0..AT_A_TIME).for_each(|_| drop(scope.spawn(work)));
    });
    // Their parents go with the last of them, unless somebody else has cgroups there.
    let is_unused =
        |parent: &PathBuf| !fs::read_dir(parent).into_iter().flatten().flatten().any(is_directory);
    let groups = || {
        let own = (0..jails).flat_map(|number| cgroups(&id(number)));
        own.chain(cgroups("").into_iter().filter(is_unused)).collect::<Vec<_>>()
    };
    let clean = wait_until(|| base.is_empty() && groups().is_empty() && jailed(&base).is_empty());
    assert!(clean, "{:?} {:?} {:?}", base.left(), groups(), jailed(&base));
    assert_eq!(names_in(base.directory.path()), files_before);
    before.check(jails);
}

#[test]
fn twenty_jails_a_third_of_them_killed_leave_nothing() {
    storm(20);
}

#[test]
#[ignore = "long: make test-all"]
fn two_hundred_jails_a_third_of_them_killed_leave_nothing() {
    storm(200);
}
