//! Why the first stage stops a domain, as a number that every platform can carry
//! (SEV-SNP's termination request has room for 8 bits) and as words.

use core::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $words:literal;)*) => {
        /// Why the first stage does not enter the kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])* $name = $code,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// In words.
            pub const fn words(self) -> &'static str {
                match self {
                    $(Self::$name => $words,)*
                }
            }
        }
    };
}

reasons! {
    /// The launch manifest cannot be read.
    Manifest = 1, "launch manifest not valid";
    /// The parameter page cannot be read.
    Parameters = 2, "parameter page not valid";
    /// The memory size is not between the manifest's bounds, or not a multiple of 1 MiB.
    Memory = 3, "memory map outside policy";
    /// More vCPUs than the manifest allows, or none.
    Vcpus = 4, "vCPU count outside policy";
    /// More virtio-mmio slots than there are.
    Devices = 5, "more devices than slots";
    /// Host data for an image that does not want them.
    HostData = 6, "host data outside policy";
    /// The kernel is not the one that was measured.
    KernelHash = 7, "kernel hash mismatch";
    /// The initrd is not the one that was measured.
    InitrdHash = 8, "initrd hash mismatch";
    /// The command line is not the one that was measured.
    CommandLineHash = 9, "command line hash mismatch";
    /// The kernel is not what the manifest says, or cannot be entered in 64-bit mode.
    KernelFormat = 10, "kernel format not known";
    /// The kernel is not where the RAM is.
    KernelPlace = 11, "kernel outside the memory";
    /// The initrd does not fit between the kernel and the end of the RAM.
    InitrdPlace = 12, "no memory for the initrd";
    /// The command line is longer than the kernel takes, or has a NUL in it.
    CommandLine = 13, "command line not fit for the kernel";
    /// The ACPI tables could not be made.
    AcpiTables = 14, "no ACPI tables";
    /// SEV-SNP: the hypervisor does not speak version 2 of the GHCB protocol, or not SEV-SNP's part of it.
    GhcbProtocol = 15, "GHCB protocol not that of SEV-SNP";
    /// SEV-SNP: the hypervisor does not take the GHCB page.
    GhcbPage = 16, "GHCB page refused";
    /// SEV-SNP: the CPUID table cannot be read.
    CpuidTable = 17, "CPUID table not valid";
    /// SEV-SNP: pages are made private by another bit of their address than in the image's page tables.
    PrivateBit = 18, "another encryption bit than the image's";
    /// SEV-SNP: the hypervisor does not change the state of pages.
    PageState = 19, "page state change refused";
    /// SEV-SNP: the processor does not validate a page.
    PageInvalid = 20, "page cannot be validated";
    /// SEV-SNP: a page that was to be validated is so already: the hypervisor has put it there twice.
    PageValid = 21, "page validated before";
}

impl Reason {
    /// The number that the monitor gets.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The reason with this number.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.code() == code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_and_leads_back() {
        for code in 0..=u8::MAX {
            match Reason::from_code(code) {
                Some(reason) => assert_eq!(reason.code(), code),
                None => assert!(code == 0 || usize::from(code) > Reason::ALL.len(), "{code}"),
            }
        }
    }

    #[test]
    fn words_are_the_documented_ones_and_differ() {
        assert_eq!(Reason::KernelHash.to_string(), "kernel hash mismatch");
        assert_eq!(Reason::Memory.to_string(), "memory map outside policy");
        let mut words: Vec<_> = Reason::ALL.iter().map(|reason| reason.words()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Reason::ALL.len());
    }
}
