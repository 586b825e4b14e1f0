//! What the host must offer before a domain can be made on it, and what to do
//! where it does not.
//!
//! [`require`] is the monitor's first step: it opens KVM and checks everything
//! that [`CAPABILITIES`] lists, so that a host that cannot run a domain is
//! refused before anything is built, with the command that mends it. [`survey`]
//! looks at the whole host for `cofferdam host check`.
//!
//! Both take the host through two small doors, so that tests can put a broken
//! one behind them: [`HostFiles`], a root directory for `/dev`, `/proc` and
//! `/sys`, and [`KvmInterface`], the answers of `/dev/kvm`.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;

use crate::sys;

pub mod survey;

/// The one version of the KVM interface that there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// A capability of KVM that the monitor needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number for `KVM_CHECK_EXTENSION`.
    pub number: u32,
    /// Its name in the kernel's headers.
    pub name: &'static str,
    /// What the monitor does with it.
    pub purpose: &'static str,
}

const fn needs(number: u32, name: &'static str, purpose: &'static str) -> Capability {
    Capability { number, name, purpose }
}

/// Everything that a plain domain needs of KVM.
pub const CAPABILITIES: [Capability; 8] = [
    needs(kvm::KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "guest memory from user space"),
    needs(kvm::KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", "room for KVM's task state segment"),
    needs(kvm::KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "room for KVM's identity map"),
    needs(kvm::KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", "the CPUID that a guest sees"),
    needs(kvm::KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP", "local APICs in KVM, the I/O APIC outside"),
    needs(kvm::KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI", "interrupts as messages"),
    needs(kvm::KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD", "notifications without leaving the kernel"),
    needs(kvm::KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "kicks that cannot be lost"),
];

/// The first Linux that has them all; the last to come was `KVM_CAP_IMMEDIATE_EXIT`.
const OLDEST_LINUX: &str = "4.11";

/// Why no domain can run on this host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no such device.
    #[error("{}: there is no such device; {remedy}", path.display())]
    NoDevice {
        /// The device.
        path: PathBuf,
        /// What would mend it.
        remedy: String,
    },
    /// This user may not open it.
    #[error("{}: permission denied; {remedy}", path.display())]
    NoPermission {
        /// The device.
        path: PathBuf,
        /// What would mend it.
        remedy: String,
    },
    /// It cannot be opened for another reason.
    #[error("{}: cannot be opened: {error}; {remedy}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// What the kernel says.
        error: io::Error,
        /// What would mend it.
        remedy: String,
    },
    /// Something that opens, but answers no KVM call.
    #[error("{}: is not KVM's device; {remedy}", path.display())]
    NotKvm {
        /// The device.
        path: PathBuf,
        /// What would mend it.
        remedy: String,
    },
    /// An interface that this monitor does not know.
    #[error("KVM's interface has version {found}, and the monitor knows {API_VERSION}; run a mainline Linux")]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// KVM lacks a capability.
    #[error("KVM lacks {} ({}); {}", .0.name, .0.purpose, newer_kernel(OLDEST_LINUX))]
    MissingCapability(
        /// What is missing.
        Capability,
    ),
}

impl HostError {
    /// What would mend it, with the command where there is one.
    pub fn remedy(&self) -> String {
        match self {
            Self::NoDevice { remedy, .. }
            | Self::NoPermission { remedy, .. }
            | Self::Open { remedy, .. }
            | Self::NotKvm { remedy, .. } => remedy.clone(),
            Self::ApiVersion { .. } => "run a mainline Linux".to_owned(),
            Self::MissingCapability(_) => newer_kernel(OLDEST_LINUX),
        }
    }
}

fn newer_kernel(since: &str) -> String {
    format!("it needs Linux {since} or newer (Debian: `sudo apt install linux-image-amd64`, then reboot)")
}

/// Where the files are by which a host is known.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
}

impl Default for HostFiles {
    fn default() -> Self {
        Self::below("/")
    }
}

impl HostFiles {
    /// The host whose `/dev`, `/proc`, `/sys` and `/etc` lie below `root`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The path of `name`, which is relative to the root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The text of a small file, without the white space around it; empty if it cannot be read.
    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default().trim().to_owned()
    }

    /// Whether the CPU shows a feature in `/proc/cpuinfo`.
    fn cpu_has(&self, flag: &str) -> bool {
        let text = self.text("proc/cpuinfo");
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        flags.split_whitespace().any(|word| word == flag)
    }

    /// What brings `/dev/kvm` into being.
    fn kvm_module_remedy(&self) -> String {
        if self.cpu_has("svm") {
            "load its module: `sudo modprobe kvm_amd`".to_owned()
        } else if self.cpu_has("vmx") {
            "load its module: `sudo modprobe kvm_intel`".to_owned()
        } else {
            "the CPU shows neither vmx nor svm: enable virtualisation in the firmware set-up, or nested \
             virtualisation of the virtual machine this is, then `sudo modprobe -a kvm_intel kvm_amd`"
                .to_owned()
        }
    }

    /// What lets this user open a device: joining its group where the group
    /// may write, else an entry for the user alone.
    fn permission_remedy(&self, path: &Path) -> String {
        let group = fs::metadata(path).ok().filter(|meta| meta.mode() & 0o060 == 0o060 && meta.gid() != 0);
        match group.and_then(|meta| self.group_name(meta.gid())) {
            Some(name) => format!("join its group: `sudo usermod -aG {name} $USER`, then log in again"),
            None => format!("allow it: `sudo setfacl -m u:$USER:rw {}`", path.display()),
        }
    }

    /// Name of a group in `/etc/group` (group(5): name:password:id:members).
    fn group_name(&self, id: u32) -> Option<String> {
        let text = self.text("etc/group");
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
        })
    }
}

/// The answers of `/dev/kvm`.
pub trait KvmInterface {
    /// `KVM_GET_API_VERSION`; negative if the call is not known.
    fn api_version(&self) -> i32;
    /// `KVM_CHECK_EXTENSION`: positive if there is such a capability.
    fn extension(&self, capability: u32) -> i32;
    /// `KVM_GET_DEVICE_ATTR` of `KVM_X86_GRP_SEV`: nothing if KVM knows no such attribute.
    fn sev_attribute(&self, attribute: SevAttribute) -> Option<u64>;
}

/// What KVM says of SEV guests (Linux `arch/x86/include/uapi/asm/kvm.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SevAttribute {
    /// `KVM_X86_SEV_VMSA_FEATURES`: bits of SEV_FEATURES that a guest may have.
    VmsaFeatures = 0,
    /// `KVM_X86_SNP_POLICY_BITS`: bits that a guest policy may have.
    PolicyBits = 1,
    /// `KVM_X86_SEV_SNP_REQ_CERTS`: 1 if the monitor may give certificates to guests that ask for reports.
    CertificateRequests = 2,
}

impl KvmInterface for Kvm {
    fn api_version(&self) -> i32 {
        self.get_api_version()
    }

    fn extension(&self, capability: u32) -> i32 {
        self.check_extension_raw(capability.into())
    }

    fn sev_attribute(&self, attribute: SevAttribute) -> Option<u64> {
        sys::sev_attribute(self, attribute as u64).ok()
    }
}

/// Opens KVM at `path` (normally `/dev/kvm`) and checks that it has everything
/// a domain needs. Nothing is created.
pub fn require(path: &Path) -> Result<Kvm, HostError> {
    let files = HostFiles::default();
    let kvm = open(&files, path)?;
    check(&kvm, path, &files)?;
    Ok(kvm)
}

fn open(files: &HostFiles, path: &Path) -> Result<Kvm, HostError> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| open_error(files, path, io::ErrorKind::InvalidInput.into()))?;
    Kvm::new_with_path(name)
        .map_err(|error| open_error(files, path, io::Error::from_raw_os_error(error.errno())))
}

fn open_error(files: &HostFiles, path: &Path, error: io::Error) -> HostError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => HostError::NoDevice { path, remedy: files.kvm_module_remedy() },
        io::ErrorKind::PermissionDenied => {
            let remedy = files.permission_remedy(&path);
            HostError::NoPermission { path, remedy }
        }
        // A node without a driver behind it answers ENODEV or ENXIO.
        _ => HostError::Open { path, error, remedy: files.kvm_module_remedy() },
    }
}

fn check(kvm: &dyn KvmInterface, path: &Path, files: &HostFiles) -> Result<(), HostError> {
    match kvm.api_version() {
        API_VERSION => {}
        found if found < 0 => {
            return Err(HostError::NotKvm { path: path.to_owned(), remedy: files.kvm_module_remedy() });
        }
        found => return Err(HostError::ApiVersion { found }),
    }
    match CAPABILITIES.iter().find(|capability| kvm.extension(capability.number) <= 0) {
        Some(&missing) => Err(HostError::MissingCapability(missing)),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A KVM that has everything but `missing`.
    pub(crate) struct FakeKvm {
        pub version: i32,
        pub missing: Vec<u32>,
        pub vm_types: i32,
        /// Values of `SevAttribute`s, by their numbers.
        pub sev: [Option<u64>; 3],
    }

    impl Default for FakeKvm {
        fn default() -> Self {
            Self { version: API_VERSION, missing: Vec::new(), vm_types: 1, sev: [None; 3] }
        }
    }

    impl KvmInterface for FakeKvm {
        fn api_version(&self) -> i32 {
            self.version
        }

        fn extension(&self, capability: u32) -> i32 {
            match capability {
                _ if self.missing.contains(&capability) => 0,
                kvm::KVM_CAP_VM_TYPES => self.vm_types,
                _ => 1,
            }
        }

        fn sev_attribute(&self, attribute: SevAttribute) -> Option<u64> {
            self.sev[attribute as usize]
        }
    }

    /// A host below a temporary directory, with a CPU that has `flags`.
    pub(crate) fn host(flags: &str) -> (tempfile::TempDir, HostFiles) {
        let root = tempfile::tempdir().unwrap();
        for folder in ["dev", "etc", "proc", "sys"] {
            fs::create_dir(root.path().join(folder)).unwrap();
        }
        let cpuinfo = format!("processor\t: 0\nflags\t\t: fpu {flags} nx\n\nprocessor\t: 1\n");
        fs::write(root.path().join("proc/cpuinfo"), cpuinfo).unwrap();
        let files = HostFiles::below(root.path());
        (root, files)
    }

    fn check_with(kvm: FakeKvm) -> Result<(), HostError> {
        check(&kvm, Path::new("/dev/kvm"), &HostFiles::default())
    }

    #[test]
    fn no_device_names_the_module_of_the_cpu() {
        for (flags, command) in [
            ("svm", "`sudo modprobe kvm_amd`"),
            ("vmx", "`sudo modprobe kvm_intel`"),
            ("lm", "enable virtualisation in the firmware set-up"),
        ] {
            let (_root, files) = host(flags);
            let path = files.path("dev/kvm");
            let error = open(&files, &path).unwrap_err();
            assert!(matches!(error, HostError::NoDevice { .. }), "{error}");
            let message = error.to_string();
            assert!(message.starts_with(path.to_str().unwrap()) && message.contains(command), "{message}");
        }
        let error = require(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/kvm: there is no such device; "), "{error}");
    }

    #[test]
    fn no_permission_names_the_group_or_the_user() {
        use std::os::unix::fs::PermissionsExt;
        let (_root, files) = host("svm");
        let path = files.path("dev/kvm");
        fs::write(&path, "").unwrap();
        let denied = || open_error(&files, &path, io::ErrorKind::PermissionDenied.into()).to_string();

        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let alone = format!("`sudo setfacl -m u:$USER:rw {}`", path.display());
        assert!(denied().contains(": permission denied; ") && denied().contains(&alone), "{}", denied());

        let id = fs::metadata(&path).unwrap().gid();
        fs::write(files.path("etc/group"), format!("other:x:{}:\nkvm:x:{id}:me\n", id + 1)).unwrap();
        assert_eq!(files.group_name(id).as_deref(), Some("kvm"));
        assert_eq!(files.group_name(id + 2), None);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        if std::os::unix::fs::chown(&path, None, Some(id + 1)).is_ok() {
            assert!(denied().contains("`sudo usermod -aG other $USER`"), "{}", denied());
        }
    }

    #[test]
    fn what_is_not_kvm_is_told_apart() {
        let error = require(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, HostError::NotKvm { .. }), "{error}");
        let error = require(Path::new("/dev")).unwrap_err();
        assert!(matches!(error, HostError::Open { .. }), "{error}");
        let error = require(Path::new("/dev/kvm\0")).unwrap_err();
        assert!(matches!(error, HostError::Open { .. }), "{error}");
    }

    #[test]
    fn another_interface_version_is_refused() {
        let error = check_with(FakeKvm { version: 13, ..FakeKvm::default() }).unwrap_err();
        assert!(error.to_string().contains("version 13"), "{error}");
    }

    #[test]
    fn each_missing_capability_is_named() {
        assert!(check_with(FakeKvm::default()).is_ok());
        for capability in CAPABILITIES {
            let error =
                check_with(FakeKvm { missing: vec![capability.number], ..FakeKvm::default() }).unwrap_err();
            let message = error.to_string();
            assert!(message.starts_with(&format!("KVM lacks {} (", capability.name)), "{message}");
            assert!(message.contains("sudo apt install linux-image-amd64"), "{message}");
        }
    }
}
