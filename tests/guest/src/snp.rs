//! Attestation reports of SEV-SNP, as a guest's kernel fetches them (Linux, include/uapi/linux/sev-guest.h).

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Size of `struct snp_report_req`, whose first 64 bytes are what is to be confirmed; the rest asks for VMPL 0.
const REQUEST: usize = 96;
/// Size of `struct snp_report_resp`: MSG_REPORT_RSP of the SNP firmware ABI (AMD 56860), which is a status (u32), the size
/// of the report (u32), and the report at byte 32.
const RESPONSE: usize = 4000;
/// Size of an ATTESTATION_REPORT, bytes.
const REPORT: usize = 1184;

/// `struct snp_guest_request_ioctl`.
#[repr(C)]
pub struct Message {
    version: u8,
    request: u64,
    response: u64,
    /// The VMM's error in the upper half, the firmware's in the lower.
    error: u64,
}

nix::ioctl_readwrite!(snp_get_report, b'S', 0, Message);

/// The report of this guest, in hexadecimal digits, that confirms `data`, up to 64 bytes in hexadecimal digits.
pub fn report(data: &str) -> io::Result<String> {
    let mut request = [0; REQUEST];
    let odd = || io::Error::new(io::ErrorKind::InvalidInput, "not up to 64 bytes in hexadecimal digits");
    if !data.len().is_multiple_of(2) || data.len() > 128 {
        return Err(odd());
    }
    for (byte, at) in request.iter_mut().zip((0..data.len()).step_by(2)) {
        *byte =
            data.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or_else(odd)?;
    }
    let mut response = [0; RESPONSE];
    let mut message = Message {
        version: 1,
        request: request.as_ptr() as u64,
        response: response.as_mut_ptr() as u64,
        error: 0,
    };
    let device = File::open("/dev/sev-guest")?;
    // SAFETY: both addresses are of buffers as large as the kernel expects them, which outlive the call.
    if let Err(error) = unsafe { snp_get_report(device.as_raw_fd(), &mut message) } {
        return Err(io::Error::other(format!("{error}, VMM and firmware say {:#x}", message.error)));
    }
    let status = u32::from_le_bytes([response[0], response[1], response[2], response[3]]);
    if status != 0 {
        return Err(io::Error::other(format!("the firmware's status is {status:#x}")));
    }
    let digits = response[32..32 + REPORT].iter().fold(String::new(), |mut text, byte: &u8| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    Ok(digits)
}
