//! The ground that Cofferdam is tested on, for `cargo xtask` and for test
//! harnesses that link this crate.
//!
//! - [`assets`] fetches Debian kernels, busybox and the emulator into a cache
//!   and builds the initial RAM disks, without installing anything for good.
//! - [`rig`] runs one command inside an emulated machine that has hardware
//!   virtualisation, so that KVM guests run where the CPU offers none.
//! - [`linux`] runs the domain tier and `make run`, there or on hardware KVM.
//! - [`seccomp`] finds system calls that the policies allow and no test needs.
//! - [`initramfs`] writes the initial RAM disks; domain tests use it for their
//!   own.
//!
//! Nothing here opens a network connection of its own: Debian packages come
//! through `apt-get`, with a private state (see [`apt`]).

pub mod agent;
pub mod apt;
pub mod assets;
pub mod cache;
pub mod certificates;
pub mod debian;
pub mod emulator;
pub mod error;
pub mod frame;
pub mod initramfs;
pub mod kernel;
pub mod linux;
pub mod machine;
pub mod modules;
pub mod ovmf;
pub mod peer;
pub mod rig;
pub mod seccomp;
pub mod small_kernel;
pub mod tool;

pub use error::Error;

/// Whether guests run on this machine's own CPU: it has VMX or SVM, and this
/// process may use `/dev/kvm`.
///
/// A `/dev/kvm` without either flag exists, too: a KVM that keeps page tables
/// in software and interprets guest kernels. It is good for tiny guests only,
/// so tests that boot Linux take the rig there.
pub fn hardware_kvm() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    has_virtualisation(&flags) && std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Whether this machine is a host with SEV-SNP whose kernel runs guests with it, and this process may start them.
pub fn hardware_snp() -> bool {
    let parameter = std::fs::read_to_string("/sys/module/kvm_amd/parameters/sev_snp").unwrap_or_default();
    let may_open = |path| std::fs::File::options().read(true).write(true).open(path).is_ok();
    parameter.trim() == "Y" && may_open("/dev/sev") && may_open("/dev/kvm")
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| name.trim() == "flags")
        .any(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualisation_is_a_whole_word_of_the_flags_line() {
        assert!(has_virtualisation("processor\t: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualisation("flags : vmx\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock\n"));
        assert!(!has_virtualisation("vmx flags\t: vnmi\nmodel name : vmx\n"));
        assert!(!has_virtualisation(""));
    }
}
