//! Containers, each in a domain of its own.

use cofferdam_container_manifest::{Mount, Rlimit, StartVariable, Tmpfs, digest};
use cofferdam_tests::container::{Container, Ended};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The content of the file /large.
fn large() -> Vec<u8> {
    (0..200_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_container_runs_from_three_layers() {
    let script = "cat /which; echo $0 $X; sha256sum < /large; echo error >&2; exit 7";
    let mut container = Container::new(script);
    container.manifest.process.env.push("X=1 2".to_owned());
    let ended = container.finish();
    assert_eq!(ended.done.code(), 7, "{ended}");
    assert_eq!(ended.text(), format!("highest\nsh 1 2\n{}  -\n", hex(&digest(&large()))), "{ended}");
    assert_eq!(ended.stderr, b"error\n", "{ended}");
}

/// Checks that init did not start the container, for this reason.
fn check_refused(ended: &Ended, why: &str) {
    assert!(ended.was_refused(why), "no {why:?}: {ended}");
    assert_eq!(ended.done.code(), 120, "{ended}");
    assert!(ended.stdout.is_empty(), "{ended}");
}

/// What the host gives, changed in one way, and why it is refused then.
type Case = (fn(&mut Container), &'static str);

/// Everything that is wrong before a layer is read.
const CASES: [Case; 10] = [
    (|c| c.bound = Some([1; 32]), "manifest: wrong_digest"),
    (|c| c.manifest_drive = Some(vec![0; 8192]), "manifest: not_valid"),
    (|c| of_text(c, |text| text.replace(r#""version":1"#, r#""version":2"#)), "manifest: not_valid"),
    (|c| of_text(c, |text| format!("{text}\n")), "manifest: not_valid"),
    (|c| drop(c.env.insert("X".to_owned(), "1".to_owned())), "manifest: start_values_refused"),
    (|c| drop(c.drives.remove(1)), "layers: layer 1 missing"),
    (swap, "layers: layer 0 wrong_size"),
    (|c| c.drives.push(("other".to_owned(), c.drives[0].1.clone(), false)), "layers: drive 3 unexpected"),
    (|c| truncate(c, 4096), "layers: layer 2 wrong_size"),
    (|c| c.manifest.process.args[0] = "/nothing".to_owned(), "process: program_not_found"),
];

/// Puts another text in the place of the manifest, and binds its digest.
fn of_text(container: &mut Container, change: fn(String) -> String) {
    let bytes = cofferdam_container_manifest::encode(&container.manifest).unwrap();
    let changed = change(String::from_utf8(bytes).unwrap()).into_bytes();
    container.bound = Some(digest(&changed));
    container.manifest_drive =
        Some(cofferdam_container_protocol::drive::write(&changed, &container.env).unwrap());
}

/// Gives two layers each other's drives.
fn swap(container: &mut Container) {
    let id = container.drives[0].0.clone();
    container.drives[0].0 = std::mem::replace(&mut container.drives[2].0, id);
}

/// Cuts the end of the highest layer's file off.
fn truncate(container: &mut Container, bytes: u64) {
    let path = container.own_file("layer2");
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
}

#[test]
fn what_the_launch_does_not_bind_is_refused() {
    for (change, why) in CASES {
        let mut container = Container::new("echo it runs");
        change(&mut container);
        check_refused(&container.finish(), why);
    }
}

/// A user who is not root, who may do little, with a root file system that nobody can write to.
#[test]
fn the_process_is_what_the_manifest_says() {
    let script = "id; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status | tr '\\t' ' '; pwd; hostname; ulimit -n; ulimit -Hn; \
        touch /a 2>&1; touch /tmp/a && stat -c '%n %U:%G %a' /tmp /tmp/a; touch /tmp/deep/b 2>&1; cat /tmp/a/b 2>&1; \
        echo 0 > /proc/sys/kernel/panic; ls -l /proc/self/fd | wc -l; echo; ls /dev; readlink /dev/stdin; umask; \
        ps -o pid,comm; grep -E ' (/|/tmp|/dev|/proc|/proc/sys|/sys|/dev/shm) ' /proc/mounts | cut -d' ' -f2-3; \
        grep SigIgn /proc/self/status; cat < /dev/null > /dev/shm/x && echo shm; echo > /dev/stdout; env; exit 3";
    let mut container = Container::new(&format!("exec 2>&1; {script}"));
    let process = &mut container.manifest.process;
    process.uid = 1000;
    process.gid = 1001;
    process.groups = vec![5, 1002];
    process.capabilities = vec!["CAP_KILL".to_owned(), "CAP_NET_BIND_SERVICE".to_owned()];
    process.no_new_privs = true;
    process.read_only_root = true;
    process.cwd = "/made/for this".to_owned();
    process.env.push("MODE=default".to_owned());
    process.start_env = vec![StartVariable { name: "MODE".to_owned(), pattern: "fast|slow".to_owned() }];
    process.rlimits = vec![Rlimit { hard: Some(200), name: "RLIMIT_NOFILE".to_owned(), soft: Some(100) }];
    container.manifest.mounts = vec![Mount::Tmpfs(Tmpfs { path: "/tmp".to_owned(), size: 1 << 20 })];
    container.env.insert("MODE".to_owned(), "fast".to_owned());
    let ended = container.finish();
    println!("{}", ended.text());
    assert_eq!(ended.done.code(), 3, "{ended}");
}
