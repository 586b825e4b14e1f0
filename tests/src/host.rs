//! Hosts as a test wants them: wrappers for [`Run::wrapped`](crate::Run::wrapped), and what a domain may leave behind.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

/// Runs the shell commands `before` in a mount namespace of its own, and then there what is added.
pub fn after(before: &str) -> Vec<OsString> {
    let unshare: &[&str] = if geteuid().is_root() {
        &["unshare", "--mount"]
    } else {
        &["unshare", "--map-root-user", "--mount"]
    };
    let script = format!("{before} && exec \"$@\"");
    unshare.iter().copied().chain(["sh", "-c", &script, "sh"]).map(OsString::from).collect()
}

/// Lets this process, and what it starts, have as many descriptors as it may: a shell gives it 1,024, and a thousand
/// connections take more.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .expect("it is within the maximum");
}

/// Page faults of all guests of this host, as KVM counts them. Only root can see that.
pub fn page_faults() -> u64 {
    let (folder, count) = ("/sys/kernel/debug", "/sys/kernel/debug/kvm/pf_taken");
    if !Path::new(count).exists() {
        let mounted = Command::new("mount").args(["-t", "debugfs", "debugfs", folder]).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount debugfs");
    }
    fs::read_to_string(count).expect("KVM's counts").trim().parse().expect("a number")
}

/// A name that no other domain has.
pub fn unique_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A process that has `id` among its arguments, if there is one.
pub fn process_with(id: &str) -> Option<PathBuf> {
    let has_id = |folder: &PathBuf| {
        let line = fs::read(folder.join("cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).any(|word| word == id.as_bytes())
    };
    let processes = fs::read_dir("/proc").expect("/proc is there").flatten();
    processes.map(|entry| entry.path()).find(has_id)
}
