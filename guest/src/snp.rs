//! The attestation report of an SEV-SNP guest, for what the launch binds (Linux, include/uapi/linux/sev-guest.h).
//!
//! Guest kernel and secure processor talk encrypted and authenticated, with keys that the host does not have: it can keep a
//! report back, but not change it.
#![allow(unsafe_code)] // an ioctl

use std::fs::File;

use cofferdam_container_protocol::step::Reason;
use rustix::ioctl::{Updater, ioctl, opcode};

use crate::binding::Digest;
use crate::failure::{Failure, Reasoned};

const DEVICE: &str = "/dev/sev-guest";
/// Size of `struct snp_report_req`; zeroes ask for VMPL 0.
const REQUEST: usize = 96;
/// Size of `struct snp_report_resp`: MSG_REPORT_RSP of the SNP firmware ABI (AMD 56860).
const RESPONSE: usize = 4000;
/// Where in it the report begins, and where HOST_DATA are.
const HOST_DATA: usize = 32 + 0xC0;

/// `struct snp_guest_request_ioctl`.
#[repr(C)]
struct Message {
    version: u8,
    request: u64,
    response: u64,
    error: u64,
}

const GET_REPORT: rustix::ioctl::Opcode = opcode::read_write::<Message>(b'S', 0);

/// HOST_DATA of this domain's launch.
///
/// # Errors
/// If there is no report.
pub fn host_data() -> Result<Digest, Failure> {
    let device = File::open(DEVICE).because(Reason::NoReport)?;
    let request = [0_u8; REQUEST];
    let mut response = [0_u8; RESPONSE];
    let mut message = Message {
        version: 1,
        request: request.as_ptr() as u64,
        response: response.as_mut_ptr() as u64,
        error: 0,
    };
    // SAFETY: the request takes such a message, whose addresses are of buffers as large as the kernel expects them, which
    // outlive the call.
    unsafe { ioctl(&device, Updater::<GET_REPORT, Message>::new(&mut message)) }.because(Reason::NoReport)?;
    of_response(&response).ok_or(Failure::new(Reason::NoReport))
}

/// HOST_DATA of a report, if the firmware made one.
fn of_response(response: &[u8; RESPONSE]) -> Option<Digest> {
    let good = response.first_chunk() == Some(&[0_u8; 4]);
    response.get(HOST_DATA..).filter(|_| good)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_data_are_taken_from_where_the_report_has_them() {
        let mut response = [0; RESPONSE];
        response[224..256].copy_from_slice(&[9; 32]);
        assert_eq!(of_response(&response), Some([9; 32]));
        response[0] = 0x16; // invalid parameters
        assert_eq!(of_response(&response), None);
    }
}
