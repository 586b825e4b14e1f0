//! The two monitors, and what each is told to run the same guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use xtask::peer::Peer;

use crate::Result;

/// Memory of a guest, MiB. It has one vCPU.
const MEMORY: u64 = 256;
/// Context id of a guest.
const GUEST_CID: u32 = 42;

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// An ELF kernel, entered by PVH.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// Its command line.
    pub command_line: String,
    /// A raw disk image, and with it a vsock device.
    pub disk: Option<PathBuf>,
}

/// Whose guest it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// `cofferdam-vmm`.
    Cofferdam,
    /// QEMU's `microvm` machine.
    Microvm,
}

/// Where the monitors are, and a directory for what they leave.
#[derive(Clone, Debug)]
pub struct Machines {
    /// `cofferdam-vmm`.
    pub cofferdam: PathBuf,
    /// QEMU.
    pub peer: Peer,
    /// A directory in memory.
    pub directory: PathBuf,
}

impl Machines {
    /// The Unix socket of Cofferdam's vsock device.
    pub fn vsock(&self) -> PathBuf {
        self.directory.join("vsock")
    }

    /// The command that runs `guest` with its console on stdout.
    pub fn command(&self, monitor: Monitor, guest: &Guest) -> Result<Command> {
        match monitor {
            Monitor::Cofferdam => self.cofferdam(guest),
            Monitor::Microvm => Ok(self.microvm(guest)),
        }
    }

    fn cofferdam(&self, guest: &Guest) -> Result<Command> {
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": guest.kernel,
                "initrd_path": guest.initrd,
                "boot_args": guest.command_line,
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY},
        });
        if let (Some(disk), Value::Object(config)) = (&guest.disk, &mut config) {
            let drive = json!({
                "drive_id": "disk",
                "path_on_host": disk,
                "cache_type": "Writeback",
                "io_engine": "Auto",
            });
            config.insert("drives".into(), json!([drive]));
            config.insert("vsock".into(), json!({"guest_cid": GUEST_CID, "uds_path": self.vsock()}));
        }
        let path = self.directory.join("config.json");
        fs::write(&path, config.to_string())?;
        let mut command = Command::new(&self.cofferdam);
        command.arg("--config-file").arg(path);
        Ok(command)
    }

    /// As quick as QEMU's documentation of `microvm` makes it: without the devices of a PC, with the small firmware
    /// qboot and no option ROMs, with modern virtio; the disk on a thread of its own through io_uring.
    /// A guest without a disk gets Debian's build for microVMs, which starts quicker.
    fn microvm(&self, guest: &Guest) -> Command {
        let program = if guest.disk.is_some() { Peer::FULL } else { Peer::SMALL };
        let mut command = self.peer.command(program);
        command
            .args(["-machine", "microvm,pit=off,pic=off,rtc=off,x-option-roms=off", "-bios", "qboot.rom"])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &MEMORY.to_string()])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initrd)
            .args(["-append", &guest.command_line]);
        if let Some(disk) = &guest.disk {
            command.args(["-object", "iothread,id=io"]).args(drive(disk)).args([
                "-device",
                "virtio-blk-device,drive=disk,iothread=io",
                "-device",
                &format!("vhost-vsock-device,guest-cid={GUEST_CID}"),
            ]);
        }
        command
    }
}

/// The same caching as Cofferdam's disk above: the page cache, and flushes of the guest are flushes of the host.
fn drive(disk: &Path) -> [String; 2] {
    let options = "if=none,id=disk,format=raw,aio=io_uring,cache=writeback";
    ["-drive".into(), format!("{options},file={}", disk.display())]
}
