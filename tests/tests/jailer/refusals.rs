//! What is refused, in which words, and what somebody has planted.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};

use cofferdam_tests::place;

use crate::jail::*;

#[test]
fn arguments_that_would_reach_out_of_the_jail_are_refused() {
    let _alone = alone();
    let base = Base::new();
    let long = "x".repeat(65);
    for id in ["", "a/b", "..", ".", "../../etc", long.as_str()] {
        let (code, text) = run(base.jailer(id));
        assert_eq!(code, Some(125), "{id:?}: {text}");
        assert!(text.contains("--id"), "{id:?}: {text}");
    }
    for (option, value) in [
        ("--bind", "/etc/passwd:/../x"),
        ("--bind", "/etc/passwd:/a/../../x"),
        ("--bind", "/etc/../etc/passwd"),
        ("--bind", "/etc:/"),
        ("--parent-cgroup", "../x"),
        ("--parent-cgroup", "/x"),
        ("--cgroup", "../memory.max=1"),
        ("--cgroup", "cgroup.procs=1"),
        ("--device", "mem"),
        ("--resource-limit", "nproc=1"),
        ("--fd", "2"),
    ] {
        let mut command = base.jailer("a");
        command.args([option, value]);
        let (code, text) = run(command);
        assert_eq!(code, Some(125), "{option} {value}: {text}");
        assert!(text.contains(option), "{option} {value}: {text}");
    }
    assert!(base.is_empty());
}

#[test]
fn errors_say_step_call_and_path_and_leave_nothing() {
    let _alone = alone();
    let base = Base::new();
    let script = base.file("script", "#!/bin/sh\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for (arguments, words) in [
        (["--bind", "/no/such:/file"], &["chroot", "open /no/such", "No such file"][..]),
        (["--bind", "/etc/passwd:/dev/kvm/x"], &["chroot", "--bind", "kvm"]),
        (["--netns", "/no/such"], &["namespaces", "open /no/such"]),
        (["--netns", "/etc/passwd"], &["namespaces", "setns /etc/passwd"]),
        (["--cgroup", "nosuch.max=1"], &["cgroup", "nosuch"]),
        (["--exec-file", "/no/such"], &["--exec-file /no/such", "No such file"]),
        (["--exec-file", "/etc"], &["--exec-file /etc"]),
        (["--exec-file", script.to_str().unwrap()], &["exec", "script", "static"]),
        (["--fd", "913"], &["descriptor 913"]),
        (["--resource-limit", "no-file=99999999999"], &["limits", "no-file", "setrlimit"]),
    ] {
        let mut command = base.jailer("a");
        if arguments[0] == "--exec-file" {
            command = Command::new(place::jailer());
            command.args(["--id", "a", "--uid", "1", "--gid", "1", "--chroot-base-dir"]).arg(base.jails());
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        command.args(arguments);
        let (code, text) = run(command);
        assert_eq!(code, Some(125), "{arguments:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{arguments:?}: no {word:?} in {text}");
        }
        assert!(base.is_empty(), "{arguments:?}");
    }
}

#[test]
fn links_of_a_previous_occupant_lead_nowhere() {
    let _alone = alone();
    let base = Base::new();
    let outside = tempfile::tempdir().unwrap();
    for link in ["kernel", "dev", "config.json", "deep"] {
        fs::create_dir_all(base.root("a")).unwrap();
        symlink(outside.path(), base.root("a").join(link)).unwrap();
        let mut command = base.domain("a", "hello", "");
        command.args(["--bind", "/etc/passwd:/deep/down/file"]);
        let (code, text) = run(with_config(command));
        assert_eq!(code, Some(125), "{link}: {text}");
        assert!(text.contains("symbolic link") && text.contains(link), "{link}: {text}");
        assert!(names_in(outside.path()).is_empty(), "{link}");
        // What was prepared stays, and only that.
        assert_eq!(names_in(&base.root("a")), BTreeSet::from([link.to_owned()]));
        fs::remove_dir_all(base.jails().join("cofferdam-vmm")).unwrap();
    }
}

/// Links that lead out of the base, in place of each of the jail's own directories.
#[test]
fn directories_of_the_jail_are_no_links() {
    let _alone = alone();
    let base = Base::new();
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir_all(outside.path().join("a/root")).unwrap();
    fs::create_dir_all(outside.path().join("root")).unwrap();
    let root = base.root("a");
    for link in [root.as_path(), root.parent().unwrap(), root.ancestors().nth(2).unwrap()] {
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(outside.path(), link).unwrap();
        let (code, text) = run(with_config(base.domain("a", "hello", VSOCK)));
        assert_eq!(code, Some(125), "{link:?}: {text}");
        assert!(text.contains("leads through a symbolic link"), "{link:?}: {text}");
        assert_eq!(names_in(outside.path()), BTreeSet::from(["a".to_owned(), "root".to_owned()]), "{link:?}");
        assert!(names_in(&outside.path().join("root")).is_empty(), "{link:?}");
        assert!(names_in(&outside.path().join("a/root")).is_empty(), "{link:?}");
        fs::remove_dir_all(base.jails()).unwrap();
    }
}

/// A link in place of /run, which the jailer makes if it is missing, is left alone.
#[test]
fn a_link_in_place_of_run_leads_nowhere() {
    let _alone = alone();
    let base = Base::new();
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir_all(base.root("a")).unwrap();
    symlink(outside.path(), base.root("a").join("run")).unwrap();
    let owner = fs::metadata(outside.path()).unwrap().uid();
    let (code, text) = run(with_config(base.domain("a", "hello", "")));
    assert_eq!(code, Some(42), "{text}");
    assert_eq!(fs::metadata(outside.path()).unwrap().uid(), owner);
    assert_eq!(names_in(&base.root("a")), BTreeSet::from(["run".to_owned()]));
}
