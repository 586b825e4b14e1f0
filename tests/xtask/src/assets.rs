//! What the tests boot, and where it lies.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::apt::Apt;
use crate::cache::Cache;
use crate::initramfs::InitramfsBuilder;
use crate::kernel::{self, Flavour, Kernel};
use crate::modules::ModuleTree;
use crate::{Error, emulator};

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

const GUEST_INIT: &[u8] = include_bytes!("guest-init");
const GUEST_APPLETS: [&str; 9] =
    ["sh", "mount", "dd", "printf", "cat", "insmod", "uname", "echo", "poweroff"];

/// Modules of the outer machine, in the order of their need.
const RIG_MODULES: [&str; 12] = [
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
];
const RIG_INIT: &[u8] = include_bytes!("rig-init");
const RIG_APPLETS: [&str; 15] = [
    "sh", "mount", "mkdir", "chmod", "cat", "insmod", "uname", "cut", "echo", "ip", "sleep", "chroot",
    "poweroff", "dmesg", "ls",
];

/// Paths of everything that tests need and the repository does not hold.
#[derive(Clone, Debug, Serialize)]
pub struct Assets {
    /// Debian's cloud kernel, a bzImage.
    pub guest_kernel: PathBuf,
    /// The same as an uncompressed ELF file.
    pub guest_vmlinux: PathBuf,
    /// Its module tree.
    pub guest_modules: PathBuf,
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
}

impl Assets {
    /// Fetches or builds whatever is not in the cache yet.
    pub fn fetch() -> Result<Self, Error> {
        let cache = Cache::open()?;
        let busybox = busybox(&cache)?;
        let guest = kernel::fetch(&cache, Flavour::Cloud)?;
        let rig = kernel::fetch(&cache, Flavour::Full)?;
        Ok(Self {
            guest_initrd: guest_initrd(&cache, &busybox, &guest)?,
            rig_initrd: rig_initrd(&cache, &busybox, &rig)?,
            guest_kernel: guest.image,
            guest_vmlinux: guest.elf,
            guest_modules: guest.modules,
            rig_kernel: rig.image,
            qemu: emulator::fetch(&cache)?,
            firmware: emulator::firmware(&cache)?,
            busybox,
        })
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

fn busybox(cache: &Cache) -> Result<PathBuf, Error> {
    let entry = cache.entry("busybox", &[b"1"], |directory| {
        Apt::new(cache, "bookworm", &["deb main bookworm"])?.unpack("busybox-static", directory)
    })?;
    Ok(entry.join("bin/busybox"))
}

fn guest_initrd(cache: &Cache, busybox: &Path, kernel: &Kernel) -> Result<PathBuf, Error> {
    initrd(cache, "guest-initrd", busybox, kernel, GUEST_INIT, &GUEST_APPLETS, &GUEST_MODULES)
}

fn rig_initrd(cache: &Cache, busybox: &Path, kernel: &Kernel) -> Result<PathBuf, Error> {
    initrd(cache, "rig-initrd", busybox, kernel, RIG_INIT, &RIG_APPLETS, &RIG_MODULES)
}

fn initrd(
    cache: &Cache,
    name: &str,
    busybox: &Path,
    kernel: &Kernel,
    init: &[u8],
    applets: &[&str],
    modules: &[&str],
) -> Result<PathBuf, Error> {
    let (applet_list, module_list) = (applets.join(" "), modules.join(" "));
    let origin = [kernel.modules.as_os_str().as_encoded_bytes(), busybox.as_os_str().as_encoded_bytes()];
    let recipe = [b"1", init, applet_list.as_bytes(), module_list.as_bytes(), origin[0], origin[1]];
    let entry = cache.entry(name, &recipe, |directory| {
        let tree = ModuleTree::open(&kernel.modules)?;
        let mut image = InitramfsBuilder::new();
        image.busybox(busybox, applets)?.file("init", 0o755, init).modules(&tree.resolve(modules)?);
        let path = directory.join("initrd");
        fs::write(&path, image.build()).map_err(Error::file("write", path))
    })?;
    Ok(entry.join("initrd"))
}
