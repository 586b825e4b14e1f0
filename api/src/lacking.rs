//! What to use instead of what Firecracker has and this monitor has not: of paths of the API, and of fields of the
//! configuration.

pub(crate) const NETWORK: &str = "use the vsock device, `PUT /vsock`";
pub(crate) const BALLOON: &str = "give the domain the memory it needs, `PUT /machine-config`";
pub(crate) const MMDS: &str = "pass data on a drive or over the vsock device";
pub(crate) const SNAPSHOT: &str = "start a new domain, `PUT /vm?start=true`";
pub(crate) const PMEM: &str = "use a drive, `PUT /drives/{drive_id}`";
pub(crate) const HOTPLUG: &str = "configure everything before the start";
pub(crate) const CPU_CONFIG: &str = "leave it out, guests see the host's CPU";
pub(crate) const ENTROPY: &str = "leave it out, guests have the CPU's RDRAND";
pub(crate) const HUGE_PAGES: &str = "leave it out, or say \"None\"";
pub(crate) const SMT: &str = "leave it out, each vCPU is a core of its own";
pub(crate) const DIRTY_PAGES: &str = "leave it out, there are no snapshots";
pub(crate) const PARTUUID: &str = "say root=PARTUUID=… in boot_args, with is_root_device false";
pub(crate) const VHOST_USER: &str = "give a file or block device, path_on_host";

/// The refusal of `what`, and what to use `instead`.
pub(crate) fn refusal(what: &str, instead: &str) -> String {
    format!("{what}: not supported by this monitor; {instead}")
}
