//! A look at the whole host: what it can do, what it cannot and why, and what
//! would change that. Looking changes nothing and needs no privilege.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use kvm_bindings as kvm;
use serde::Serialize;

mod io_uring;
pub mod snp;

use self::snp::SnpStatus;
use super::{CAPABILITIES, HostError, HostFiles, KvmInterface, open};

/// One thing that a host can do or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name; that of a capability begins with `KVM_CAP_`.
    pub name: &'static str,
    /// Whether the host can do it.
    pub ok: bool,
    /// Why, in one line.
    pub reason: String,
    /// What would change it, where something would.
    pub remedy: Option<String>,
}

impl Check {
    fn yes(name: &'static str, reason: impl Into<String>) -> Self {
        Self { name, ok: true, reason: reason.into(), remedy: None }
    }

    fn no(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, ok: false, reason: reason.into(), remedy: Some(remedy.into()) }
    }
}

/// The platforms that the host offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Platforms {
    /// Ordinary virtual machines.
    pub plain: bool,
    /// AMD SEV-SNP.
    pub snp: bool,
    /// Intel TDX.
    pub tdx: bool,
    /// Arm CCA.
    pub cca: bool,
}

/// What a host can do. As JSON it is what `cofferdam host check --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// Everything that was looked at.
    pub checks: Vec<Check>,
    /// What follows for domains.
    pub platforms: Platforms,
}

/// `KVM_X86_TDX_VM` as a bit of `KVM_CAP_VM_TYPES`.
const VM_TYPE_TDX: i32 = 1 << kvm::KVM_X86_TDX_VM;
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE` in `KVM_CAP_MEMORY_ATTRIBUTES`.
const ATTRIBUTE_PRIVATE: i32 = 1 << 3;

/// What a host answers to what its files do not tell.
pub struct Answers {
    /// A ring was made.
    pub io_uring: io::Result<()>,
    /// What the secure processor of an AMD host says, if it was asked.
    pub snp: Option<io::Result<SnpStatus>>,
}

impl Survey {
    /// Looks at the host that this process runs on. The secure processor takes all commands by one call: a monitor that runs a
    /// domain may not make it, and must not want to (`asks_firmware`).
    pub fn of_this_host(asks_firmware: bool) -> Self {
        let files = HostFiles::default();
        let path = files.path("dev/kvm");
        let snp = asks_firmware.then(|| snp::ask(&files));
        let answers = Answers { io_uring: io_uring::ask(), snp };
        match open(&files, &path) {
            Ok(kvm) => Self::new(&files, Ok(&kvm), answers),
            Err(error) => Self::new(&files, Err(error), answers),
        }
    }

    /// Looks at the host whose files are `files`, whose KVM opened as `kvm` and
    /// that gave these answers.
    pub fn new(files: &HostFiles, kvm: Result<&dyn KvmInterface, HostError>, answers: Answers) -> Self {
        let mut checks = vec![hardware(files)];
        let kvm = match kvm.and_then(|kvm| usable(kvm, files).map(|()| kvm)) {
            Ok(kvm) => {
                checks.push(Check::yes("kvm", "/dev/kvm opens, interface version 12"));
                Some(kvm)
            }
            Err(error) => {
                checks.push(Check::no("kvm", reason_of(&error), error.remedy()));
                None
            }
        };
        checks.extend(CAPABILITIES.iter().map(|&needed| {
            let error = HostError::MissingCapability(needed);
            if kvm.is_none() {
                return Check::no(needed.name, NOT_ASKED, NEEDS_KVM);
            }
            match extension(kvm, needed.number) {
                1.. => Check::yes(needed.name, needed.purpose),
                _ => Check::no(needed.name, format!("missing: {}", needed.purpose), error.remedy()),
            }
        }));
        let plain = checks.iter().skip(1).all(|check| check.ok);
        let private_memory = [guest_memfd(kvm), memory_attributes(kvm)];
        let private = plain && private_memory.iter().all(|check| check.ok);
        let (snp, tdx, cca) = (snp::snp(files, kvm), tdx(files, kvm), cca());
        let platforms = Platforms { plain, snp: private && snp.ok, tdx: private && tdx.ok, cca: cca.ok };
        checks.push(tsc_scaling(kvm));
        checks.extend(private_memory);
        let details = snp::details(files, kvm, &snp, answers.snp);
        checks.push(snp);
        checks.extend(details);
        checks.extend([tdx, cca, vhost(files), huge_pages(files), io_uring_check(answers.io_uring)]);
        Self { checks, platforms }
    }
}

const NEEDS_KVM: &str = "KVM itself first";
const NOT_ASKED: &str = "unknown, as KVM cannot be asked";

/// The value of a capability, and 0 without KVM.
fn extension(kvm: Option<&dyn KvmInterface>, capability: u32) -> i32 {
    kvm.map_or(0, |kvm| kvm.extension(capability))
}

/// Whether it is KVM at all; the capabilities are listed one by one.
fn usable(kvm: &dyn KvmInterface, files: &HostFiles) -> Result<(), HostError> {
    match super::check(kvm, &files.path("dev/kvm"), files) {
        Err(HostError::MissingCapability(_)) => Ok(()),
        other => other,
    }
}

/// The message without the remedy, which is shown beside it.
fn reason_of(error: &HostError) -> String {
    let message = error.to_string();
    message.strip_suffix(&error.remedy()).unwrap_or(&message).trim_end_matches("; ").to_owned()
}

fn hardware(files: &HostFiles) -> Check {
    let name = "cpu_virtualisation";
    match ["svm", "vmx"].into_iter().find(|flag| files.cpu_has(flag)) {
        Some(flag) => Check::yes(name, format!("the CPU shows {flag}")),
        None => Check::no(
            name,
            "the CPU shows neither vmx nor svm; a KVM without them is slow",
            "enable it in the firmware set-up, or nested virtualisation of the virtual machine this is",
        ),
    }
}

/// Not needed: without it the guest's time stamp counter runs at the host's frequency.
fn tsc_scaling(kvm: Option<&dyn KvmInterface>) -> Check {
    let name = "tsc_scaling";
    if extension(kvm, kvm::KVM_CAP_TSC_CONTROL) > 0 {
        return Check::yes(name, "the frequency of a guest's time stamp counter can be chosen");
    }
    Check::no(name, "guests get the host's frequency; domains run all the same", "a CPU with TSC scaling")
}

fn guest_memfd(kvm: Option<&dyn KvmInterface>) -> Check {
    let name = "guest_memfd";
    if extension(kvm, kvm::KVM_CAP_GUEST_MEMFD) > 0 {
        return Check::yes(name, "memory that only a guest can map");
    }
    if kvm.is_none() {
        return Check::no(name, NOT_ASKED, NEEDS_KVM);
    }
    Check::no(
        name,
        "KVM lacks KVM_CAP_GUEST_MEMFD (confidential domains need it)",
        super::newer_kernel("6.8"),
    )
}

fn memory_attributes(kvm: Option<&dyn KvmInterface>) -> Check {
    let name = "memory_attributes";
    if extension(kvm, kvm::KVM_CAP_MEMORY_ATTRIBUTES) & ATTRIBUTE_PRIVATE != 0 {
        return Check::yes(name, "pages can be made private");
    }
    if kvm.is_none() {
        return Check::no(name, NOT_ASKED, NEEDS_KVM);
    }
    Check::no(
        name,
        "KVM makes no page private (confidential domains need it)",
        "Linux 6.8 or newer on a host with SEV-SNP or TDX",
    )
}

fn tdx(files: &HostFiles, kvm: Option<&dyn KvmInterface>) -> Check {
    let name = "tdx";
    if extension(kvm, kvm::KVM_CAP_VM_TYPES) & VM_TYPE_TDX != 0 {
        return Check::yes(name, "KVM makes trust domains");
    }
    if !files.cpu_has("tdx_host_platform") {
        return Check::no(
            name,
            "the CPU shows no tdx_host_platform",
            "a Xeon with TDX, enabled in the firmware set-up, and Linux 6.16 or newer",
        );
    }
    let parameter = files.text("sys/module/kvm_intel/parameters/tdx");
    let reason = match parameter.as_str() {
        "Y" => "kvm_intel has tdx=Y, and KVM makes no trust domains".to_owned(),
        "" => "kvm_intel is not loaded, or was built without TDX".to_owned(),
        other => format!("kvm_intel has tdx={other}"),
    };
    let reload = "`sudo modprobe -r kvm_intel && sudo modprobe kvm_intel tdx=1`; if that does not help, \
                  `dmesg | grep -i tdx` tells why";
    Check::no(name, reason, reload)
}

/// Mainline KVM has no interface for realms yet, whose capability number could be asked for.
fn cca() -> Check {
    if cfg!(target_arch = "aarch64") {
        return Check::no(
            "cca",
            "Linux has no interface for realms yet",
            "a kernel with Arm CCA host support",
        );
    }
    Check::no("cca", "only on arm64", "an arm64 host with the Realm Management Extension")
}

/// Not needed: the monitor has a vsock device of its own.
fn vhost(files: &HostFiles) -> Check {
    let name = "vhost_vsock";
    let path = files.path("dev/vhost-vsock");
    match opens(&path) {
        Ok(()) => Check::yes(name, "/dev/vhost-vsock opens (not needed: vsock is served by the monitor)"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::no(
            name,
            "/dev/vhost-vsock is missing (not needed: vsock is served by the monitor)",
            "load its module: `sudo modprobe vhost_vsock`",
        ),
        Err(error) => Check::no(name, format!("/dev/vhost-vsock: {error}"), files.permission_remedy(&path)),
    }
}

/// Not needed: guest memory is of ordinary pages.
fn huge_pages(files: &HostFiles) -> Check {
    let count = |file: &str| -> u64 {
        files.text(&format!("sys/kernel/mm/hugepages/hugepages-2048kB/{file}")).parse().unwrap_or(0)
    };
    let (free, all) = (count("free_hugepages"), count("nr_hugepages"));
    let reason = format!("{free} of {all} pages of 2 MiB are free");
    if free > 0 {
        return Check::yes("huge_pages", reason);
    }
    Check::no("huge_pages", reason, "reserve some, 256 MiB here: `sudo sysctl vm.nr_hugepages=128`")
}

/// Not needed: disks fall back to `preadv` and `pwritev`.
fn io_uring_check(result: io::Result<()>) -> Check {
    let name = "io_uring";
    let error = match result {
        Ok(()) => return Check::yes(name, "a ring can be made"),
        Err(error) => error,
    };
    let reason = format!("no ring can be made: {error} (disks fall back to preadv and pwritev)");
    let remedy = match error.kind() {
        io::ErrorKind::Unsupported => super::newer_kernel("5.6"),
        io::ErrorKind::PermissionDenied => {
            "`sudo sysctl kernel.io_uring_disabled=0`, or a container whose seccomp profile allows it"
                .to_owned()
        }
        io::ErrorKind::OutOfMemory => "more locked memory: `ulimit -l unlimited`".to_owned(),
        _ => "`ulimit -n` and `dmesg` may tell why".to_owned(),
    };
    Check::no(name, reason, remedy)
}

fn opens(path: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{FakeKvm, host};
    use super::super::{SevAttribute, open_error};
    use super::*;

    /// Of a host without a secure processor.
    fn answers(io_uring: io::Result<()>) -> Answers {
        Answers { io_uring, snp: Some(Err(io::ErrorKind::NotFound.into())) }
    }

    fn survey(files: &HostFiles, kvm: &FakeKvm) -> Survey {
        Survey::new(files, Ok(kvm), answers(Ok(())))
    }

    fn find<'a>(survey: &'a Survey, name: &str) -> &'a Check {
        survey.checks.iter().find(|check| check.name == name).unwrap()
    }

    fn write(files: &HostFiles, name: &str, text: &str) {
        let path = files.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn every_no_says_what_would_change_it() {
        let (_root, files) = host("");
        let error = open_error(&files, Path::new("/dev/kvm"), io::ErrorKind::NotFound.into());
        let survey = Survey::new(&files, Err(error), answers(Err(io::ErrorKind::Unsupported.into())));
        assert_eq!(survey.platforms, Platforms::default());
        for check in &survey.checks {
            assert!(!check.ok, "{check:?}");
            assert!(
                !check.reason.is_empty() && check.remedy.as_ref().is_some_and(|r| !r.is_empty()),
                "{check:?}"
            );
        }
        assert_eq!(find(&survey, "kvm").reason, "/dev/kvm: there is no such device");
        for unknown in ["KVM_CAP_IOEVENTFD", "guest_memfd", "memory_attributes"] {
            assert_eq!(find(&survey, unknown).reason, "unknown, as KVM cannot be asked");
        }
    }

    #[test]
    fn a_plain_host() {
        let (_root, files) = host("vmx");
        let survey = survey(&files, &FakeKvm::default());
        assert_eq!(survey.platforms, Platforms { plain: true, ..Platforms::default() });
        assert!(
            find(&survey, "kvm").ok && find(&survey, "cpu_virtualisation").ok && find(&survey, "io_uring").ok
        );
        assert!(!find(&survey, "snp").ok && !find(&survey, "tdx").ok && !find(&survey, "cca").ok);
    }

    #[test]
    fn one_missing_capability_means_no_plain_domain() {
        let (_root, files) = host("svm");
        let kvm = FakeKvm { missing: vec![kvm::KVM_CAP_SPLIT_IRQCHIP], ..FakeKvm::default() };
        let survey = survey(&files, &kvm);
        assert!(!survey.platforms.plain);
        assert!(find(&survey, "kvm").ok);
        let split = find(&survey, "KVM_CAP_SPLIT_IRQCHIP");
        assert!(!split.ok && split.remedy.as_ref().is_some_and(|remedy| remedy.contains("Linux 4.11")));
        assert!(find(&survey, "KVM_CAP_IOEVENTFD").ok);
    }

    #[test]
    fn something_else_at_dev_kvm() {
        let (_root, files) = host("svm");
        let survey = survey(&files, &FakeKvm { version: -1, ..FakeKvm::default() });
        assert!(!survey.platforms.plain);
        assert!(find(&survey, "kvm").reason.ends_with("is not KVM's device"), "{:?}", find(&survey, "kvm"));
    }

    /// Private memory needs `KVM_CAP_MEMORY_ATTRIBUTES` with bit 3, which the fake's 1 is not.
    struct Private(FakeKvm);

    impl KvmInterface for Private {
        fn api_version(&self) -> i32 {
            self.0.api_version()
        }

        fn extension(&self, capability: u32) -> i32 {
            if capability == kvm::KVM_CAP_MEMORY_ATTRIBUTES { 8 } else { self.0.extension(capability) }
        }

        fn sev_attribute(&self, attribute: SevAttribute) -> Option<u64> {
            self.0.sev_attribute(attribute)
        }
    }

    #[test]
    fn a_host_with_snp() {
        let (_root, files) = host("svm sev_snp");
        let kvm = Private(FakeKvm { vm_types: 1 | snp::VM_TYPE, ..FakeKvm::default() });
        let look = || Survey::new(&files, Ok(&kvm), answers(Ok(())));
        assert_eq!(find(&look(), "snp").reason, "/dev/sev is missing");
        write(&files, "dev/sev", "");
        assert!(find(&look(), "snp").ok);
        assert_eq!(look().platforms, Platforms { plain: true, snp: true, ..Platforms::default() });

        let without = survey(&files, &FakeKvm { vm_types: 1 | snp::VM_TYPE, ..FakeKvm::default() });
        assert!(!without.platforms.snp && !find(&without, "memory_attributes").ok);
    }

    #[test]
    fn parameters_of_the_modules_are_read() {
        let (_root, files) = host("svm sev_snp tdx_host_platform");
        let look = || survey(&files, &FakeKvm::default());
        assert_eq!(find(&look(), "snp").reason, "kvm_amd is not loaded");
        write(&files, "sys/module/kvm_amd/parameters/sev_snp", "N\n");
        assert_eq!(find(&look(), "snp").reason, "kvm_amd has sev_snp=N");
        write(&files, "sys/module/kvm_intel/parameters/tdx", "N\n");
        assert_eq!(find(&look(), "tdx").reason, "kvm_intel has tdx=N");
        let tdx = FakeKvm { vm_types: 1 | VM_TYPE_TDX, ..FakeKvm::default() };
        assert!(find(&survey(&files, &tdx), "tdx").ok);
    }

    #[test]
    fn huge_pages_and_vhost() {
        let (_root, files) = host("svm");
        let look = || survey(&files, &FakeKvm::default());
        assert_eq!(find(&look(), "huge_pages").reason, "0 of 0 pages of 2 MiB are free");
        write(&files, "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        write(&files, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4\n");
        assert!(find(&look(), "huge_pages").ok);
        assert_eq!(find(&look(), "huge_pages").reason, "3 of 4 pages of 2 MiB are free");
        assert!(!find(&look(), "vhost_vsock").ok);
        write(&files, "dev/vhost-vsock", "");
        assert!(find(&look(), "vhost_vsock").ok);
    }

    #[test]
    fn a_refused_ring_says_how_to_allow_it() {
        let (_root, files) = host("svm");
        let denied = answers(Err(io::Error::from_raw_os_error(1)));
        let survey = Survey::new(&files, Ok(&FakeKvm::default()), denied);
        let check = find(&survey, "io_uring");
        assert!(!check.ok && check.remedy.as_ref().is_some_and(|r| r.contains("kernel.io_uring_disabled=0")));
        assert!(survey.platforms.plain);
    }
}
