//! The outer machine of the rig: all options of the emulator, in one place.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use crate::agent::PORT_NAME;

/// Arguments of the outer kernel. On a busy machine the emulator's timers come
/// late, which must not count as broken hardware: `no_timer_check` keeps the
/// kernel from giving up at boot, `nowatchdog` from reporting hung CPUs.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check nowatchdog";

/// What differs from one outer machine to the next.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// Directory of the emulator's firmware.
    pub firmware: PathBuf,
    /// Memory, MiB.
    pub memory: u32,
    /// Number of CPUs.
    pub cpus: u8,
    /// Directories that are passed through read-write, by 9p tag.
    pub shares: Vec<(String, PathBuf)>,
    /// Makes it a host with SEV-SNP.
    pub secure_processor: Option<SecureProcessor>,
}

/// The emulated secure processor of a host with SEV-SNP.
#[derive(Clone, Debug)]
pub struct SecureProcessor {
    /// The key that signs its reports, a PEM file.
    pub key: PathBuf,
    /// How much the emulator tells on stderr: 1 launches and failures, 2 pages, 3 page states, 4 exits of guests.
    pub trace: u8,
}

/// An AMD CPU with nested paging.
const CPU: &str = "EPYC-v2,+svm,+npt";
/// The same with SEV-SNP, as Linux wants it: family 0x19, no hypervisor below, and room for the C-bit above the address.
const SNP_CPU: &str =
    "EPYC-v2,family=25,model=17,stepping=1,+svm,+npt,-hypervisor,phys-bits=48,x-sev-snp-host=on";
/// An IOMMU that reports support of SEV-SNP, without which Linux does not use it.
const SNP_IOMMU: &str = "amd-iommu,snp=on,intremap=off";

impl Machine {
    /// The emulator's options. It must be started with the agent's connection,
    /// a stream socket, as its stdin, and with the console's file as its stdout.
    pub fn options(&self) -> Vec<OsString> {
        let mut options: Vec<OsString> = Vec::new();
        let mut add = |words: &[&OsStr]| options.extend(words.iter().map(OsString::from));
        let text = OsStr::new;
        add(&[text("-L"), self.firmware.as_os_str()]);
        for words in ["-nodefaults -no-user-config -no-reboot", "-display none -vga none -nic none"] {
            words.split(' ').for_each(|word| add(&[text(word)]));
        }
        // sata=off: the firmware would wait for disks.
        add(&[text("-machine"), text("q35,kernel-irqchip=off,sata=off")]);
        add(&[text("-accel"), text("tcg,thread=multi")]);
        match &self.secure_processor {
            None => add(&[text("-cpu"), text(CPU)]),
            Some(processor) => {
                add(&[text("-cpu"), text(SNP_CPU), text("-device"), text(SNP_IOMMU)]);
                let mut device = OsString::from(format!("amd-psp,trace={},vcek-key=", processor.trace));
                device.push(escape_commas(processor.key.as_os_str()));
                add(&[text("-device"), &device]);
            }
        }
        add(&[text("-smp"), text(&self.cpus.to_string())]);
        add(&[text("-m"), text(&self.memory.to_string())]);
        add(&[text("-kernel"), self.kernel.as_os_str()]);
        add(&[text("-initrd"), self.initrd.as_os_str()]);
        add(&[text("-append"), text(KERNEL_ARGUMENTS)]);
        add(&[text("-chardev"), text("file,id=console,path=/proc/self/fd/1")]);
        add(&[text("-serial"), text("chardev:console")]);
        add(&[text("-chardev"), text("socket,id=agent,fd=0")]);
        add(&[text("-device"), text("virtio-serial-pci")]);
        add(&[text("-device"), text(&format!("virtserialport,nr=1,chardev=agent,name={PORT_NAME}"))]);
        let root = ("host".to_owned(), PathBuf::from("/"));
        for (index, (tag, path)) in std::iter::once(&root).chain(&self.shares).enumerate() {
            let mut share =
                OsString::from(format!("local,id=share{index},security_model=none,multidevs=remap,"));
            share.push(if index == 0 { "readonly=on,path=" } else { "path=" });
            share.push(escape_commas(path.as_os_str()));
            add(&[text("-fsdev"), &share]);
            add(&[text("-device"), text(&format!("virtio-9p-pci,fsdev=share{index},mount_tag={tag}"))]);
        }
        options
    }
}

/// `value` as part of an option of the emulator, where commas separate.
fn escape_commas(value: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = value.as_bytes().iter();
    OsString::from_vec(
        bytes.flat_map(|byte| std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 })).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            kernel: "/k".into(),
            initrd: "/i".into(),
            firmware: "/f".into(),
            memory: 1024,
            cpus: 3,
            shares: vec![("share1".into(), "/tmp/a,b c".into())],
            secure_processor: None,
        }
    }

    fn values<'a>(options: &'a [OsString], flag: &str) -> Vec<&'a str> {
        let follows = |pair: &&[OsString]| pair[0] == flag;
        options.windows(2).filter(follows).map(|pair| pair[1].to_str().unwrap()).collect()
    }

    #[test]
    fn shares_are_writable_and_the_root_is_not() {
        let options = machine().options();
        let after = |flag| values(&options, flag);
        let shares = after("-fsdev");
        assert!(shares[0].contains("readonly=on") && shares[0].ends_with("path=/"));
        assert!(!shares[1].contains("readonly") && shares[1].ends_with("path=/tmp/a,,b c"));
        assert_eq!((after("-m"), after("-smp")), (vec!["1024"], vec!["3"]));
    }
    #[test]
    fn a_secure_processor_changes_the_cpu_too() {
        let processor = SecureProcessor { key: "/a,b/key".into(), trace: 2 };
        let snp = Machine { secure_processor: Some(processor), ..machine() }.options();
        assert!(values(&snp, "-cpu")[0].contains("x-sev-snp-host=on"));
        let devices = values(&snp, "-device");
        assert!(devices.contains(&SNP_IOMMU) && devices.contains(&"amd-psp,trace=2,vcek-key=/a,,b/key"));
        let plain = machine().options();
        assert!(plain.iter().all(|option| !option.to_str().unwrap().contains("snp")));
    }
}
