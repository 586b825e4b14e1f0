//! The GHCB MSR protocol (SEV-ES Guest-Hypervisor Communication Block Standardization, revision 2.03, section 2.3.1): one number to
//! the hypervisor, and one back. Bits 0 to 11 say what it is.

use crate::reason::Reason;

/// Number of the MSR.
pub const GHCB: u32 = 0xC001_0130;

/// Asks for the versions of the protocol.
pub const INFORMATION: u64 = 0x002;
const INFORMATION_ANSWER: u64 = 0x001;
/// Asks what the hypervisor can do.
pub const FEATURES: u64 = 0x080;
const FEATURES_ANSWER: u64 = 0x081;
const REGISTER: u64 = 0x012;
const REGISTER_ANSWER: u64 = 0x013;
const PAGE_STATE: u64 = 0x014;
const PAGE_STATE_ANSWER: u64 = 0x015;
const TERMINATE: u64 = 0x100;

const CODE: u64 = 0xfff;
/// The version of the protocol that brings SEV-SNP.
const VERSION: u64 = 2;
/// "SEV-SNP is supported".
const FEATURE_SNP: u64 = 1 << 0;

/// The set of our reasons in a termination request; 0 is the specification's, 1 is Linux's.
pub const REASON_SET: u8 = 0xC;

/// Checks the answer to [`INFORMATION`].
///
/// # Errors
/// [`Reason::GhcbProtocol`]
pub fn check_information(answer: u64) -> Result<(), Reason> {
    let (min, max) = (answer >> 32 & 0xffff, answer >> 48);
    let speaks = answer & CODE == INFORMATION_ANSWER && (min..=max).contains(&VERSION);
    speaks.then_some(()).ok_or(Reason::GhcbProtocol)
}

/// Checks the answer to [`FEATURES`].
///
/// # Errors
/// [`Reason::GhcbProtocol`]
pub fn check_features(answer: u64) -> Result<(), Reason> {
    let can = answer & CODE == FEATURES_ANSWER && answer >> 12 & FEATURE_SNP != 0;
    can.then_some(()).ok_or(Reason::GhcbProtocol)
}

/// Asks the hypervisor to take the page at `address` for the GHCB.
pub const fn register(address: u64) -> u64 {
    address | REGISTER
}

/// Checks the answer to [`register`].
///
/// # Errors
/// [`Reason::GhcbPage`]
pub fn check_registered(address: u64, answer: u64) -> Result<(), Reason> {
    (answer == address | REGISTER_ANSWER).then_some(()).ok_or(Reason::GhcbPage)
}

/// Asks for the page at `address` to be made private or shared.
pub const fn change_page_state(address: u64, state: super::page_state::State) -> u64 {
    (state as u64) << 52 | address | PAGE_STATE
}

/// Checks the answer to [`change_page_state`].
///
/// # Errors
/// [`Reason::PageState`]
pub fn check_page_state(answer: u64) -> Result<(), Reason> {
    (answer == PAGE_STATE_ANSWER).then_some(()).ok_or(Reason::PageState)
}

/// Asks for the end of the domain.
pub const fn terminate(reason: Reason) -> u64 {
    TERMINATE | (REASON_SET as u64) << 12 | (reason.code() as u64) << 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snp::page_state::State;

    /// What KVM answers, as seen on the emulated platform.
    const KVM_INFORMATION: u64 = 0x0002_0001_3300_0001;
    const KVM_FEATURES: u64 = 0x308_1081;

    #[test]
    fn version_2_must_be_spoken() {
        assert_eq!(check_information(KVM_INFORMATION), Ok(()));
        for bad in [
            0,
            KVM_INFORMATION + 1,
            0x0001_0001_3300_0001, // up to version 1
            0x0004_0003_3300_0001, // from version 3
        ] {
            assert_eq!(check_information(bad), Err(Reason::GhcbProtocol), "{bad:#x}");
        }
    }

    #[test]
    fn snp_must_be_there() {
        assert_eq!(check_features(0x1081), Ok(()));
        assert_eq!(check_features(KVM_FEATURES & !0xfff | 0x3081), Ok(()));
        for bad in [0, 0x81, 0x2081, 0x1080] {
            assert_eq!(check_features(bad), Err(Reason::GhcbProtocol), "{bad:#x}");
        }
    }

    #[test]
    fn the_very_page_must_be_registered() {
        assert_eq!(register(0x9_0000), 0x9_0012);
        assert_eq!(check_registered(0x9_0000, 0x9_0013), Ok(()));
        for bad in [0x9_1013, 0x9_0012, u64::MAX << 12 | 0x013, 0] {
            assert_eq!(check_registered(0x9_0000, bad), Err(Reason::GhcbPage), "{bad:#x}");
        }
    }

    #[test]
    fn page_states_of_one_page() {
        assert_eq!(change_page_state(0x9_0000, State::Private), 0x0010_0000_0009_0014);
        assert_eq!(change_page_state(0x9_0000, State::Shared), 0x0020_0000_0009_0014);
        assert_eq!(check_page_state(0x015), Ok(()));
        for bad in [1 << 32 | 0x015, 0x014, 0] {
            assert_eq!(check_page_state(bad), Err(Reason::PageState), "{bad:#x}");
        }
    }

    #[test]
    fn a_termination_request_has_set_and_code() {
        assert_eq!(terminate(Reason::KernelHash), 0x7_c100);
        assert_eq!(terminate(Reason::PageValid), 0x15_c100);
    }
}
