//! Who the container's process is, and what it may do at most: as the manifest says, in the kernel's terms.

use cofferdam_container_manifest::Process;
use rustix::io::{Errno, Result};
use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit};
use rustix::thread::{
    CapabilitySet, remove_capability_from_bounding_set, set_no_new_privs, set_thread_gid, set_thread_groups,
    set_thread_uid,
};

/// Capabilities in the order of their numbers (Linux, include/uapi/linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// An identity.
#[derive(Clone, Debug)]
pub struct Identity {
    /// User.
    pub uid: Uid,
    /// Group.
    pub gid: Gid,
    groups: Vec<Gid>,
    capabilities: CapabilitySet,
    limits: Vec<(Resource, Rlimit)>,
    no_new_privs: bool,
}

impl Identity {
    /// That of the manifest's process; nothing if it has names that the kernel does not have, which no valid manifest has.
    pub fn new(process: &Process) -> Option<Self> {
        let capabilities =
            process.capabilities.iter().map(|name| capability(name)).collect::<Option<Vec<_>>>()?;
        let limits = process
            .rlimits
            .iter()
            .map(|limit| Some((resource(&limit.name)?, Rlimit { current: limit.soft, maximum: limit.hard })));
        Some(Self {
            uid: Uid::from_raw(process.uid),
            gid: Gid::from_raw(process.gid),
            groups: process.groups.iter().map(|group| Gid::from_raw(*group)).collect(),
            capabilities: capabilities.into_iter().collect(),
            limits: limits.collect::<Option<_>>()?,
            no_new_privs: process.no_new_privs,
        })
    }

    /// Gives the calling thread this identity, but for [`forbid`](Self::forbid). It allocates nothing.
    ///
    /// User 0 gets, when it runs a program, what the bounding set leaves; others have nothing, and get what a program's file
    /// gives them within it.
    ///
    /// # Errors
    /// If the kernel refuses any of it.
    pub fn assume(&self) -> Result<()> {
        for (resource, limit) in &self.limits {
            setrlimit(*resource, *limit)?;
        }
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if !self.capabilities.contains(capability) {
                match remove_capability_from_bounding_set(capability) {
                    // The kernel has no more of them.
                    Err(Errno::INVAL) => break,
                    removed => removed?,
                }
            }
        }
        set_thread_groups(&self.groups)?;
        set_thread_gid(self.gid)?;
        set_thread_uid(self.uid)
    }

    /// Keeps programs from gaining anything, if the manifest says so.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forbid(&self) -> Result<()> {
        if self.no_new_privs { set_no_new_privs(true) } else { Ok(()) }
    }
}

fn capability(name: &str) -> Option<CapabilitySet> {
    let number = CAPABILITIES.iter().position(|known| *known == name)?;
    Some(CapabilitySet::from_bits_retain(1 << number))
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_of_a_manifest_has_its_number() {
        let mut names = CAPABILITIES;
        names.sort_unstable();
        assert_eq!(names, cofferdam_container_manifest::CAPABILITIES);
        for (name, capability_of_rustix) in [
            ("CAP_CHOWN", CapabilitySet::CHOWN),
            ("CAP_SETPCAP", CapabilitySet::SETPCAP),
            ("CAP_SYS_ADMIN", CapabilitySet::SYS_ADMIN),
            ("CAP_SETFCAP", CapabilitySet::SETFCAP),
            ("CAP_CHECKPOINT_RESTORE", CapabilitySet::CHECKPOINT_RESTORE),
        ] {
            assert_eq!(capability(name), Some(capability_of_rustix), "{name}");
        }
    }
}
