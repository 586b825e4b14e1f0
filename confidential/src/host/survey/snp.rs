//! SEV-SNP: what a host needs to run such guests, and what it offers them.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use kvm_bindings as kvm;

use super::{Check, extension, opens};
use crate::host::{HostFiles, KvmInterface, SevAttribute, newer_kernel};
use crate::sys;
pub use crate::sys::SnpStatus;

/// `KVM_X86_SNP_VM` as a bit of `KVM_CAP_VM_TYPES`.
pub(crate) const VM_TYPE: i32 = 1 << kvm::KVM_X86_SNP_VM;
/// What names the others' checks have in front, and what all of them need first.
pub const DETAILS: &str = "snp_";
const NEEDS_SNP: &str = "SEV-SNP itself first";
const NOT_ASKED: &str = "unknown, as there is no SEV-SNP";
/// The oldest interface of the firmware that Linux uses (`drivers/crypto/ccp/sev-dev.c`, SNP_MIN_API_MAJOR and _MINOR).
const OLDEST_API: (u8, u8) = (1, 51);

/// Bits of a guest policy (SNP firmware ABI, 4.3) by which its owner decides something.
const POLICY_BITS: [(u32, &str); 9] = [
    (16, "SMT"),
    (18, "MIGRATE_MA"),
    (19, "DEBUG"),
    (20, "SINGLE_SOCKET"),
    (21, "CXL_ALLOW"),
    (22, "MEM_AES_256_XTS"),
    (23, "RAPL_DIS"),
    (24, "CIPHERTEXT_HIDING_DRAM"),
    (25, "PAGE_SWAP_DISABLE"),
];
/// Bits of SEV_FEATURES (AMD64 Architecture Programmer's Manual, volume 2, table B-4) that KVM offers.
const VMSA_FEATURES: [(u32, &str); 4] =
    [(3, "restricted injection"), (4, "alternate injection"), (5, "debug swap"), (9, "secure TSC")];

/// Whether there are SEV-SNP guests at all.
pub(crate) fn snp(files: &HostFiles, kvm: Option<&dyn KvmInterface>) -> Check {
    let name = "snp";
    if extension(kvm, kvm::KVM_CAP_VM_TYPES) & VM_TYPE != 0 {
        return match opens(&files.path("dev/sev")) {
            Ok(()) => Check::yes(name, "KVM makes SEV-SNP guests, and /dev/sev is there"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Check::no(name, "/dev/sev is missing", "load its module: `sudo modprobe ccp`")
            }
            Err(error) => {
                Check::no(name, format!("/dev/sev: {error}"), files.permission_remedy(&files.path("dev/sev")))
            }
        };
    }
    if !files.cpu_has("sev_snp") {
        return Check::no(
            name,
            "the CPU shows no sev_snp",
            "an EPYC 7003 or newer, with SEV-SNP enabled in the firmware set-up and Linux 6.11 or newer",
        );
    }
    let parameter = files.text("sys/module/kvm_amd/parameters/sev_snp");
    let reason = match parameter.as_str() {
        "Y" => "kvm_amd has sev_snp=Y, and KVM makes no SEV-SNP guests".to_owned(),
        "" => "kvm_amd is not loaded".to_owned(),
        other => format!("kvm_amd has sev_snp={other}"),
    };
    let reload = "`sudo modprobe -r kvm_amd && sudo modprobe kvm_amd sev=1 sev_es=1 sev_snp=1`; if that does not \
                  help, `dmesg | grep -i sev` tells why";
    Check::no(name, reason, reload)
}

/// Asks the secure processor behind `/dev/sev`.
pub(super) fn ask(files: &HostFiles) -> io::Result<SnpStatus> {
    sys::snp_status(&OpenOptions::new().read(true).open(files.path("dev/sev"))?)
}

/// What is worth knowing of SEV-SNP beyond `snp`, which says whether there is any. `status` is what the secure processor says.
pub(super) fn details(
    files: &HostFiles,
    kvm: Option<&dyn KvmInterface>,
    snp: &Check,
    status: Option<io::Result<SnpStatus>>,
) -> [Check; 5] {
    let names = ["snp_firmware", "snp_asids", "snp_policy_bits", "snp_features", "snp_certificates"];
    let (Some(kvm), true) = (kvm, snp.ok) else {
        return names.map(|name| Check::no(name, NOT_ASKED, NEEDS_SNP));
    };
    let [firmware_name, asids_name, policy_name, features_name, certificates_name] = names;
    [
        firmware(firmware_name, status),
        asids(asids_name, files),
        policy_bits(policy_name, kvm),
        features(features_name, kvm),
        certificates(certificates_name, kvm),
    ]
}

fn firmware(name: &'static str, status: Option<io::Result<SnpStatus>>) -> Check {
    let newer = "a newer firmware of the secure processor: a newer BIOS, or `sudo apt install amd64-microcode`, then reboot";
    match status {
        None => Check::no(
            name,
            "unknown, as a monitor that runs a domain may not ask the secure processor",
            "`cofferdam host check`",
        ),
        Some(Ok(status)) => {
            let SnpStatus { api_major, api_minor, build, guests, flags, .. } = status;
            let hiding =
                if flags & SnpStatus::CIPHERTEXT_HIDING == 0 { "" } else { ", ciphertext is hidden" };
            let reason =
                format!("interface {api_major}.{api_minor}, build {build}, guests: {guests}{hiding}");
            if (api_major, api_minor) >= OLDEST_API {
                Check::yes(name, reason)
            } else {
                let (major, minor) = OLDEST_API;
                Check::no(name, format!("{reason}; it takes {major}.{minor}"), newer)
            }
        }
        Some(Err(error)) => Check::no(name, format!("the secure processor does not say: {error}"), newer),
    }
}

/// Each guest has an address space identifier of the processor's; the kernel counts them among the resources of control
/// groups (Linux `Documentation/admin-guide/cgroup-v2.rst`, "Misc").
fn asids(name: &'static str, files: &HostFiles) -> Check {
    let capacity = resource(&files.text("sys/fs/cgroup/misc.capacity"));
    let own = files.text("proc/self/cgroup");
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let own = Path::new(own).ancestors().map(|group| Path::new("sys/fs/cgroup").join(group));
    let limits = own.filter_map(|group| {
        let file = |name: &str| files.text(&group.join(name).to_string_lossy());
        let used = resource(&file("misc.current"))?;
        let most = resource(&file("misc.max")).or(capacity)?;
        Some((most.min(capacity.unwrap_or(u64::MAX)).saturating_sub(used), most))
    });
    match limits.min() {
        Some((0, most)) => Check::no(
            name,
            format!("none of {most} is left for another guest"),
            "end other guests, raise `misc.max` of this control group, or \"SEV-ES ASID Space Limit\" in the firmware set-up",
        ),
        Some((left, most)) => Check::yes(name, format!("{left} of {most} are left for guests")),
        None => Check::no(
            name,
            "unknown, as the kernel counts them in no control group that is seen here",
            "a kernel with CONFIG_CGROUP_MISC, and cgroup2 at /sys/fs/cgroup",
        ),
    }
}

/// The number in the line of SEV-ES and SEV-SNP guests; `max` is no number.
fn resource(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("sev_es ")?.trim().parse().ok())
}

fn policy_bits(name: &'static str, kvm: &dyn KvmInterface) -> Check {
    match kvm.sev_attribute(SevAttribute::PolicyBits) {
        Some(bits) => Check::yes(name, format!("{bits:#x}: {}", named(bits, &POLICY_BITS))),
        None => Check::no(name, "KVM does not say which a guest policy may have", newer_kernel("7.2")),
    }
}

fn features(name: &'static str, kvm: &dyn KvmInterface) -> Check {
    match kvm.sev_attribute(SevAttribute::VmsaFeatures) {
        Some(bits) => {
            Check::yes(name, format!("{bits:#x}: {} (domains use none)", named(bits, &VMSA_FEATURES)))
        }
        None => Check::no(name, "KVM does not say which it has (domains use none)", newer_kernel("6.10")),
    }
}

fn certificates(name: &'static str, kvm: &dyn KvmInterface) -> Check {
    match kvm.sev_attribute(SevAttribute::CertificateRequests) {
        Some(1..) => Check::yes(name, "guests can be given certificates with their reports (`--snp-certs`)"),
        _ => Check::no(name, "KVM gives guests no certificates (`--snp-certs`)", newer_kernel("7.2")),
    }
}

/// The names of the bits that are set.
fn named(bits: u64, names: &[(u32, &str)]) -> String {
    let set: Vec<&str> =
        names.iter().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, name)| *name).collect();
    if set.is_empty() { "none".to_owned() } else { set.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::tests::{FakeKvm, host};

    fn write(files: &HostFiles, name: &str, text: &str) {
        let path = files.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A host whose KVM makes SEV-SNP guests.
    fn there(files: &HostFiles, sev: [Option<u64>; 3], status: Option<io::Result<SnpStatus>>) -> [Check; 5] {
        let kvm = FakeKvm { vm_types: 1 | VM_TYPE, sev, ..FakeKvm::default() };
        write(files, "dev/sev", "");
        let snp = snp(files, Some(&kvm));
        details(files, Some(&kvm), &snp, status)
    }

    const STATUS: SnpStatus = SnpStatus {
        api_major: 1,
        api_minor: 55,
        state: 1,
        rmp: 1,
        build: 32,
        flags: 8,
        guests: 2,
        current_tcb: 0,
        reported_tcb: 0,
    };

    #[test]
    fn what_the_firmware_says_is_compared_with_what_linux_takes() {
        let (_root, files) = host("svm sev_snp");
        let firmware = |status| there(&files, [None; 3], status)[0].clone();
        let good = firmware(Some(Ok(STATUS)));
        assert!(good.ok);
        assert_eq!(good.reason, "interface 1.55, build 32, guests: 2");
        let hiding = firmware(Some(Ok(SnpStatus { flags: 8 | SnpStatus::CIPHERTEXT_HIDING, ..STATUS })));
        assert!(hiding.reason.ends_with(", ciphertext is hidden"), "{hiding:?}");
        let old = firmware(Some(Ok(SnpStatus { api_minor: 50, ..STATUS })));
        assert!(!old.ok && old.reason.ends_with("; it takes 1.51"), "{old:?}");
        let silent = firmware(Some(Err(io::ErrorKind::Unsupported.into())));
        assert!(!silent.ok && silent.remedy.unwrap().contains("amd64-microcode"));
        let not_asked = firmware(None);
        assert!(!not_asked.ok && not_asked.remedy.unwrap() == "`cofferdam host check`");
    }

    #[test]
    fn asids_are_counted_where_control_groups_count_them() {
        let (_root, files) = host("svm sev_snp");
        let asids = || {
            let check = there(&files, [None; 3], Some(Ok(STATUS)))[1].clone();
            (check.ok, check.reason)
        };
        assert!(!asids().0 && asids().1.starts_with("unknown"), "{:?}", asids());
        write(&files, "sys/fs/cgroup/misc.capacity", "sev 50\nsev_es 49\n");
        write(&files, "sys/fs/cgroup/misc.current", "sev 0\nsev_es 2\n");
        assert_eq!(asids(), (true, "47 of 49 are left for guests".to_owned()));
        write(&files, "proc/self/cgroup", "0::/a/b\n");
        assert_eq!(asids().1, "47 of 49 are left for guests");
        write(&files, "sys/fs/cgroup/a/misc.current", "sev 0\nsev_es 2\n");
        write(&files, "sys/fs/cgroup/a/misc.max", "sev max\nsev_es 3\n");
        write(&files, "sys/fs/cgroup/a/b/misc.current", "sev 0\nsev_es 1\n");
        write(&files, "sys/fs/cgroup/a/b/misc.max", "sev max\nsev_es max\n");
        assert_eq!(asids(), (true, "1 of 3 are left for guests".to_owned()));
        write(&files, "sys/fs/cgroup/misc.current", "sev_es 49\n");
        assert_eq!(asids(), (false, "none of 49 is left for another guest".to_owned()));
    }

    #[test]
    fn bits_have_their_names() {
        let (_root, files) = host("svm sev_snp");
        let [_, _, policy, features, certificates] =
            there(&files, [Some(0x220), Some(0x1b_ffff), Some(1)], Some(Ok(STATUS)));
        assert_eq!(policy.reason, "0x1bffff: SMT, DEBUG, SINGLE_SOCKET");
        assert_eq!(features.reason, "0x220: debug swap, secure TSC (domains use none)");
        assert!(policy.ok && features.ok && certificates.ok);
        let [_, _, policy, features, certificates] =
            there(&files, [Some(0), None, Some(0)], Some(Ok(STATUS)));
        assert_eq!(features.reason, "0x0: none (domains use none)");
        assert!(!policy.ok && policy.remedy.unwrap().contains("Linux 7.2"));
        assert!(!certificates.ok && certificates.remedy.unwrap().contains("Linux 7.2"));
    }

    #[test]
    fn without_snp_nothing_is_asked() {
        let (_root, files) = host("svm");
        let kvm = FakeKvm { sev: [Some(0x220), Some(0x1b_ffff), Some(1)], ..FakeKvm::default() };
        let snp = snp(&files, Some(&kvm));
        for kvm in [None, Some(&kvm as &dyn KvmInterface)] {
            for check in details(&files, kvm, &snp, Some(Ok(STATUS))) {
                assert!(!check.ok && check.name.starts_with(DETAILS), "{check:?}");
                assert_eq!((check.reason.as_str(), check.remedy.as_deref()), (NOT_ASKED, Some(NEEDS_SNP)));
            }
        }
    }
}
