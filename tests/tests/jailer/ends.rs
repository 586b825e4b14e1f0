//! Ends of all kinds, after which nothing is left.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::jail::*;

#[test]
fn a_prepared_root_keeps_what_was_in_it() {
    let _alone = alone();
    let base = Base::new();
    fs::create_dir_all(base.root("a")).unwrap();
    fs::hard_link(base.file("there", "x"), base.root("a").join("there")).unwrap();
    let (code, text) = run(with_config(base.domain("a", "hello", VSOCK)));
    assert_eq!(code, Some(42), "{text}");
    assert_eq!(names_in(&base.root("a")), BTreeSet::from(["there".to_owned()]));
    assert_eq!(names_in(base.root("a").parent().unwrap()), BTreeSet::from(["root".to_owned()]));
}

#[test]
fn an_id_in_use_is_refused() {
    let _alone = alone();
    let base = Base::new();
    let socket = base.root("a").join("v.sock");
    let mut first = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("in use"), "{text}");
    kill_process(first.pid(), Signal::TERM).unwrap();
    assert_eq!(first.finish().0.code(), Some(143));
    assert!(base.is_empty());
}

#[test]
fn whichever_process_is_killed_all_goes() {
    let _alone = alone();
    let base = Base::new();
    let socket = base.root("a").join("v.sock");
    let who: [fn(&Running) -> Pid; 2] = [Running::pid, Running::monitor];
    for pid_of in who {
        let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
        let monitor = running.monitor();
        kill_process(pid_of(&running), Signal::KILL).unwrap();
        running.finish();
        assert!(wait_until(|| base.is_empty() && !is_executed(monitor)));
    }
    // Without its keeper the jail goes on, and ends as cleanly.
    let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    kill_process(running.keeper(), Signal::KILL).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(UnixStream::connect(&socket).is_ok());
    kill_process(running.pid(), Signal::TERM).unwrap();
    assert_eq!(running.finish().0.code(), Some(143));
    assert!(base.is_empty());
    // When both are killed at once, the next jail of this id removes what is left.
    let mut running = Running::start(with_config(base.domain("a", "spin", VSOCK)), &socket);
    let monitor = running.monitor();
    kill_process(running.keeper(), Signal::KILL).unwrap();
    kill_process(running.pid(), Signal::KILL).unwrap();
    running.finish();
    assert!(wait_until(|| !is_executed(monitor)));
    assert!(!base.is_empty());
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(42), "{text}");
    assert!(base.is_empty());
}

#[test]
fn a_daemon_runs_on_without_its_starter() {
    let _alone = alone();
    let base = Base::new();
    let mut command = base.domain("a", "spin", VSOCK);
    command.arg("--daemonize");
    // Ends when the pipes do, so nobody may have kept them.
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(0), "{text}");
    assert!(wait_until(|| base.root("a").join("v.sock").exists()));
    let pid_file = fs::read_to_string(base.root("a").join("cofferdam-vmm.pid")).unwrap();
    let monitor = Pid::from_raw(pid_file.parse().unwrap()).unwrap();
    assert_eq!(
        fs::read_link(format!("/proc/{}/fd/1", monitor.as_raw_nonzero())).unwrap(),
        Path::new("/dev/null")
    );
    kill_process(monitor, Signal::KILL).unwrap();
    assert!(wait_until(|| base.is_empty() && jailed(&base).is_empty()));
    let mut command = base.jailer("a");
    command.args(["--daemonize", "--bind", "/no/such"]);
    let (code, text) = run(command);
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("/no/such"), "{text}");
}
