//! What SNP domains are held against: Debian's QEMU, which starts its guests through OVMF. Fetched for the long tests only.

use std::path::PathBuf;
use std::process::Command;

use crate::Error;
use crate::apt::Apt;
use crate::cache::Cache;

/// The release that it is taken from, with all its libraries: those of this machine may be older.
const RELEASE: &str = "trixie";

/// The variable that hands a fetched one on to a process in the rig, which cannot fetch.
pub const ENVIRONMENT: &str = "COFFERDAM_OVMF_PEER";

/// QEMU and OVMF, with the files of their packages as they would lie below `/`.
#[derive(Clone, Debug)]
pub struct Peer {
    root: PathBuf,
}

impl Peer {
    /// Fetches it, if it is not in the cache.
    pub fn fetch() -> Result<Self, Error> {
        let cache = Cache::open()?;
        let packages = ["qemu-system-x86", "ovmf"];
        let root = cache.entry("ovmf-peer", &[b"1", packages.concat().as_bytes()], |directory| {
            Apt::new(&cache, RELEASE, &["deb main trixie"])?.unpack_with_dependencies(&packages, directory)
        })?;
        Ok(Self { root })
    }

    /// The one that whoever started this process fetched, and named in [`ENVIRONMENT`].
    pub fn from_environment() -> Option<Self> {
        std::env::var_os(ENVIRONMENT).map(|root| Self { root: root.into() })
    }

    /// Its directory.
    pub fn root(&self) -> &PathBuf {
        &self.root
    }

    /// QEMU, with its own libraries and data, and OVMF for an SNP guest on the emulated host.
    pub fn snp_guest(&self) -> Command {
        let file = |path: &str| self.root.join(path);
        let libraries = file("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(file("usr/bin/qemu-system-x86_64"));
        command.arg("-L").arg(file("usr/share/qemu")).arg("-L").arg(file("usr/share/seabios"));
        command.arg("-bios").arg(file("usr/share/ovmf/OVMF.fd"));
        command.args(["-accel", "kvm", "-cpu", "EPYC-v4", "-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-machine", "q35,confidential-guest-support=snp,sata=off,smbus=off"]);
        let snp = "sev-snp-guest,id=snp,cbitpos=51,reduced-phys-bits=1,policy=0x30000";
        command.args(["-object", snp]);
        command
    }
}
