//! The digest that the launch binds, and the platform that says so.
//!
//! | platform | source of the digest |
//! |---|---|
//! | SEV-SNP | HOST_DATA of the attestation report, which comes from the secure processor |
//! | none | `cofferdam.host_data=` on the kernel's command line: as good as the host |
//!
//! The command line of a protected domain is measured, and nothing of the host's is on it; it is not asked there. Nor is it on
//! a protected platform that this program does not know.

use std::path::Path;

use cofferdam_container_protocol::modules::Need;
use cofferdam_container_protocol::step::Reason;

use crate::failure::Failure;
use crate::snp;

/// A SHA-256.
pub type Digest = [u8; 32];

/// The kernel has this device in an SEV-SNP guest only, whatever the host says.
const SNP_DEVICE: &str = "/sys/bus/platform/devices/sev-guest";
/// CPUID leaf that names the TDX module, and the name (Intel TDX Module ABI).
const TDX_LEAF: u32 = 0x21;
const TDX_NAME: &[u8; 12] = b"IntelTDX    ";
const WORD: &str = "cofferdam.host_data=";

/// What keeps the domain from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// Nothing.
    Plain,
    /// AMD SEV-SNP.
    Snp,
    /// Something that this program cannot get a report from.
    Unknown,
}

impl Platform {
    /// The one that this is.
    pub fn detect() -> Self {
        if Path::new(SNP_DEVICE).exists() {
            Self::Snp
        } else if is_tdx() {
            Self::Unknown
        } else {
            Self::Plain
        }
    }

    /// What its modules are needed for.
    pub fn need(self) -> Option<Need> {
        match self {
            Self::Plain => None,
            Self::Snp => Some(Need::Snp),
            Self::Unknown => Some(Need::Tdx),
        }
    }

    /// The digest that the launch binds; `command_line` is the kernel's.
    ///
    /// # Errors
    /// If the platform says nothing.
    pub fn bound_digest(self, command_line: &str) -> Result<Digest, Failure> {
        match self {
            Self::Plain => of_command_line(command_line).ok_or(Failure::new(Reason::NoDigest)),
            Self::Snp => snp::host_data(),
            Self::Unknown => Err(Failure::new(Reason::NoReport)),
        }
    }

    /// Whether keys can be made here. On a protected platform they must not come of what the host sees or does.
    ///
    /// # Errors
    /// On a protected platform whose CPUs have no random source.
    pub fn check_random_source(self) -> Result<(), Failure> {
        let hardware = is_x86_feature_detected!("rdrand") && is_x86_feature_detected!("rdseed");
        self.check_random(hardware)
    }

    fn check_random(self, hardware: bool) -> Result<(), Failure> {
        if self == Self::Plain || hardware { Ok(()) } else { Err(Failure::new(Reason::NoRandomSource)) }
    }
}

fn is_tdx() -> bool {
    use std::arch::x86_64::__cpuid;
    if __cpuid(0).eax < TDX_LEAF {
        return false;
    }
    let leaf = __cpuid(TDX_LEAF);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == TDX_NAME
}

/// The digest on the kernel's command line, if there is exactly one.
fn of_command_line(line: &str) -> Option<Digest> {
    let mut words = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(WORD));
    let (digits, None) = (words.next()?, words.next()) else { return None };
    // As long as a root hash, and written like one.
    digits.parse::<cofferdam_container_manifest::RootHash>().ok().map(|hash| hash.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_one_digest_or_none() {
        let digits = "0f".repeat(32);
        let word = format!("{WORD}{digits}");
        assert_eq!(of_command_line(&format!("console=ttyS0 {word}\n")), Some([0x0F; 32]));
        for bad in [
            "",
            "quiet",
            WORD,
            &format!("{word} {word}"),
            &format!("{word}0"),
            &format!("x{word}"),
            &word.to_uppercase(),
        ] {
            assert_eq!(of_command_line(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_protected_platform_is_never_asked_for_the_command_line() {
        let line = format!("{WORD}{}", "0f".repeat(32));
        assert_eq!(Platform::Plain.bound_digest(&line), Ok([0x0F; 32]));
        // There is no secure processor where this test runs.
        for platform in [Platform::Snp, Platform::Unknown] {
            assert_eq!(platform.bound_digest(&line).unwrap_err().reason, Reason::NoReport);
        }
    }

    #[test]
    fn a_protected_platform_must_have_a_random_source() {
        assert_eq!(Platform::Plain.check_random(false), Ok(()));
        for platform in [Platform::Snp, Platform::Unknown] {
            assert_eq!(platform.check_random(true), Ok(()));
            assert_eq!(platform.check_random(false).unwrap_err().reason, Reason::NoRandomSource);
        }
    }
}
