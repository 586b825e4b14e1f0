//! What the tests boot, and where it lies.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::Apt;
use crate::cache::Cache;
use crate::initramfs::InitramfsBuilder;
use crate::kernel::{self, Kernel};
use crate::modules::ModuleTree;
use crate::{Error, certificates, debian, emulator};

/// The variable that hands fetched assets on to a process in the rig, which cannot fetch.
pub const ENVIRONMENT: &str = "COFFERDAM_ASSETS";

/// Modules that guests may want, as far as they are not built in.
pub const GUEST_MODULES: [&str; 8] = [
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "pvpanic_mmio",
    "button",
    "evdev",
    // ext4 asks for it by the name of the algorithm, which depends= does not say.
    "crc32c_generic",
    "ext4",
];

/// What goes into an initial RAM disk besides busybox.
struct Contents {
    name: &'static str,
    init: &'static [u8],
    applets: &'static [&'static str],
    modules: &'static [&'static str],
}

const GUEST: Contents = Contents {
    name: "guest-initrd",
    init: include_bytes!("guest-init"),
    applets: &["sh", "mount", "devmem", "cat", "insmod", "uname", "echo", "poweroff"],
    modules: &GUEST_MODULES,
};

const RIG: Contents = Contents {
    name: "rig-initrd",
    init: include_bytes!("rig-init"),
    applets: &[
        "sh", "mount", "mkdir", "chmod", "cat", "insmod", "uname", "cut", "echo", "ip", "sleep", "chroot",
        "poweroff",
    ],
    // In the order of their need.
    modules: &[
        "virtio_pci",
        "virtio_console",
        "9pnet_virtio",
        "9p",
        "overlay",
        "ccp",
        "kvm_amd",
        "vhost_vsock",
        "vhost_net",
        "tun",
        "tap",
        "loop",
    ],
};

/// Paths of everything that tests need and the repository does not hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Assets {
    /// Debian's cloud kernel, a bzImage.
    pub guest_kernel: PathBuf,
    /// The same as an uncompressed ELF file.
    pub guest_vmlinux: PathBuf,
    /// Its module tree.
    pub guest_modules: PathBuf,
    /// The kernel of containers' domains, a bzImage: Debian's, or the small one.
    pub container_kernel: PathBuf,
    /// Its module tree; the small one has its lists beside it.
    pub container_modules: Option<PathBuf>,
    /// A RAM disk that prints `uname -r`, marks user space and powers off with code 0.
    pub guest_initrd: PathBuf,
    /// Debian's full kernel, a bzImage.
    pub rig_kernel: PathBuf,
    /// RAM disk of the rig's outer machine.
    pub rig_initrd: PathBuf,
    /// The emulator.
    pub qemu: PathBuf,
    /// Directory of the emulator's firmware.
    pub firmware: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// An OCI image layout: Debian, Python, and a program. It is large, and only a long test's ([`Self::fetch_for_long_tests`]).
    pub debian_python: Option<PathBuf>,
}

impl Assets {
    /// Fetches or builds whatever is not in the cache yet.
    pub fn fetch() -> Result<Self, Error> {
        let cache = Cache::open()?;
        let busybox = busybox(&cache)?;
        let guest = kernel::fetch(&cache, kernel::GUEST)?;
        let rig = kernel::fetch(&cache, kernel::OUTER)?;
        Ok(Self {
            guest_initrd: initrd(&cache, &GUEST, &busybox, &guest)?,
            rig_initrd: initrd(&cache, &RIG, &busybox, &rig)?,
            container_kernel: guest.image.clone(),
            container_modules: Some(guest.modules.clone()),
            guest_kernel: guest.image,
            guest_vmlinux: guest.elf,
            guest_modules: guest.modules,
            rig_kernel: rig.image,
            qemu: emulator::fetch(&cache)?,
            firmware: emulator::firmware(&cache)?,
            debian_python: None,
            busybox,
        })
    }

    /// Adds what only the long tests of the domain tier use.
    pub fn fetch_for_long_tests(&mut self) -> Result<(), Error> {
        self.debian_python = Some(debian::fetch(&Cache::open()?)?);
        Ok(())
    }

    /// What whoever started this process fetched, and named as JSON in [`ENVIRONMENT`].
    pub fn from_environment() -> Option<Self> {
        serde_json::from_str(&std::env::var(ENVIRONMENT).ok()?).ok()
    }

    /// Names and paths, for a listing.
    pub fn list(&self) -> [(&'static str, &PathBuf); 9] {
        [
            ("guest_kernel", &self.guest_kernel),
            ("guest_vmlinux", &self.guest_vmlinux),
            ("guest_modules", &self.guest_modules),
            ("guest_initrd", &self.guest_initrd),
            ("rig_kernel", &self.rig_kernel),
            ("rig_initrd", &self.rig_initrd),
            ("qemu", &self.qemu),
            ("firmware", &self.firmware),
            ("busybox", &self.busybox),
        ]
    }
}

/// What an outer machine with SEV-SNP has in place of the plain one's.
#[derive(Clone, Debug)]
pub struct SnpAssets {
    /// Debian's full kernel, a newer one.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// The key and certificates of the secure processor ([`certificates::fetch`]).
    pub certificates: PathBuf,
}

impl SnpAssets {
    /// Fetches or makes whatever is not in the cache yet.
    pub fn fetch() -> Result<Self, Error> {
        let cache = Cache::open()?;
        let kernel = kernel::fetch(&cache, kernel::SNP_OUTER)?;
        Ok(Self {
            initrd: initrd(&cache, &RIG, &busybox(&cache)?, &kernel)?,
            certificates: certificates::fetch(&cache)?,
            kernel: kernel.image,
        })
    }
}

fn busybox(cache: &Cache) -> Result<PathBuf, Error> {
    let entry = cache.entry("busybox", &[b"1"], |directory| {
        Apt::new(cache, "bookworm", &["deb main bookworm"])?.unpack("busybox-static", directory)
    })?;
    Ok(entry.join("bin/busybox"))
}

fn initrd(cache: &Cache, contents: &Contents, busybox: &Path, kernel: &Kernel) -> Result<PathBuf, Error> {
    let (applets, modules) = (contents.applets.join(" "), contents.modules.join(" "));
    let origin = [kernel.modules.as_os_str().as_encoded_bytes(), busybox.as_os_str().as_encoded_bytes()];
    let recipe = [b"1", contents.init, applets.as_bytes(), modules.as_bytes(), origin[0], origin[1]];
    let entry = cache.entry(contents.name, &recipe, |directory| {
        let modules = ModuleTree::open(&kernel.modules)?.resolve(contents.modules)?;
        let mut image = InitramfsBuilder::new();
        image.busybox(busybox, contents.applets)?.file("init", 0o755, contents.init).modules(&modules);
        let path = directory.join("initrd");
        fs::write(&path, image.build()).map_err(Error::file("write", path))
    })?;
    Ok(entry.join("initrd"))
}
