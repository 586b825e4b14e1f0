//! Cgroups.

use std::fs;

use cofferdam_tests::host::unique_id;
use rustix::process::{Signal, kill_process};

use crate::jail::*;

#[test]
fn a_cgroup_holds_its_limit_while_the_domain_lives() {
    let _alone = alone();
    let (base, id) = (Base::new(), unique_id());
    let mut command = base.domain(&id, "spin", VSOCK);
    command.args(["--cgroup", some_cgroup()]);
    let mut running = Running::start(with_config(command), &base.root(&id).join("v.sock"));
    let [directory] = &cgroups(&id)[..] else { panic!("{:?}", cgroups(&id)) };
    assert_eq!(fs::read_to_string(directory.join("pids.max")).unwrap().trim(), "33");
    let inside = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), running.monitor().as_raw_nonzero().to_string());
    kill_process(running.pid(), Signal::KILL).unwrap();
    running.finish();
    assert!(wait_until(|| base.is_empty() && cgroups(&id).is_empty()));
    let mut command = base.domain(&id, "hello", "");
    command.args(["--cgroup", "pids.max=nonsense"]);
    let (code, text) = run(with_config(command));
    assert_eq!(code, Some(125), "{text}");
    assert!(text.contains("cgroup: write") && text.contains("pids.max"), "{text}");
    assert!(base.is_empty() && cgroups(&id).is_empty());
}
