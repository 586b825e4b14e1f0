//! What an SNP guest says when it wants to be ended: a reason set and a code (GHCB specification 2.03, 2.3.1
//! "Termination Request").

use cofferdam_firmware::reason::Reason;
use cofferdam_firmware::snp::msr::REASON_SET as FIRST_STAGE;

/// The specification's set.
const GHCB: u8 = 0;
/// Linux' set (`arch/x86/include/asm/sev-common.h`).
const LINUX: u8 = 1;

const GHCB_REASONS: [&str; 3] =
    ["no reason given", "the GHCB protocol is of a version that it does not know", "the host lacks features"];
const LINUX_REASONS: [&str; 13] = [
    "its GHCB page was refused",
    "a page state change was refused",
    "a page could not be validated, or was valid before",
    "it is not at VMPL 0",
    "the CPUID table is bad",
    "the CPUID table lacks the hypervisor's functions",
    "the secrets page is bad",
    "there is no SVSM",
    "the SVSM is at VMPL 0",
    "the SVSM's calling area is bad",
    "the secure time stamp counter is bad",
    "the SVSM's calling area could not be mapped",
    "secure AVIC failed",
];

/// A termination request, which is what the guest wrote to the GHCB MSR, in words.
pub fn words(request: u64) -> String {
    let (set, code) = ((request >> 12 & 0xF) as u8, (request >> 16) as u8);
    let named = |reasons: &[&'static str]| reasons.get(usize::from(code)).copied();
    let (who, what) = match set {
        FIRST_STAGE => ("the first stage", Reason::from_code(code).map(Reason::words)),
        GHCB => ("the guest", named(&GHCB_REASONS)),
        LINUX => ("the guest's kernel", named(&LINUX_REASONS)),
        _ => ("the guest", None),
    };
    match what {
        Some(what) => format!("{who} stopped the domain: {what}"),
        None => format!("{who} stopped the domain, for the unknown reason {code} of set {set}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_and_why() {
        for (request, text) in [
            (0x7_C100, "the first stage stopped the domain: kernel hash mismatch"),
            (0x2_0100, "the guest stopped the domain: the host lacks features"),
            (
                0x2_1100,
                "the guest's kernel stopped the domain: a page could not be validated, or was valid before",
            ),
            (0xFF_1100, "the guest's kernel stopped the domain, for the unknown reason 255 of set 1"),
            (0xFF_C100, "the first stage stopped the domain, for the unknown reason 255 of set 12"),
            (0x1_5100, "the guest stopped the domain, for the unknown reason 1 of set 5"),
        ] {
            assert_eq!(words(request), text);
        }
    }
}
