//! What a domain costs the host: its private and its shared pages together are no more than its memory.

use std::fs;
use std::path::PathBuf;

use cofferdam_tests::host::unique_id;

use crate::domain::{Domain, succeeded};

const GUEST: u64 = 512 << 20;

/// A control group that counts memory, with what was charged to it at most.
struct Group(PathBuf);

impl Group {
    fn new() -> Self {
        let root = PathBuf::from("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        let path = root.join(unique_id());
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A wrapper that runs a command in it.
    fn wrapper(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }

    /// The most that was charged to it, bytes.
    fn peak(&self) -> u64 {
        fs::read_to_string(self.0.join("memory.peak")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The guest fills its memory, gives it back, and makes pages shared and private again many times. The group is charged
/// for all of it, the monitor and KVM's tables included; the image's pages are charged to this process, which wrote it.
#[test]
fn private_and_shared_pages_together_are_no_more_than_the_guests_memory() {
    let domain = Domain::new("test=convert argument=300");
    let group = Group::new();
    let done = domain.run(2, "512M").wrapped(group.wrapper()).finish();
    succeeded(&done);
    let peak = group.peak();
    assert!(peak > 300 << 20, "{peak} bytes: the guest used more than that");
    assert!(peak <= GUEST / 100 * 105, "{peak} bytes for a guest of {GUEST}");
}
