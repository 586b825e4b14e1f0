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
nix::ioctl_readwrite!(snp_get_ext_report, b'S', 2, Message);

/// `struct snp_ext_report_req`.
#[repr(C)]
struct ExtendedRequest {
    request: [u8; REQUEST],
    /// Where certificates go, and for how many bytes of them there is room: whole pages.
    certificates: u64,
    length: u32,
}

/// What the VMM says where there is no room for all certificates (GHCB specification, "SNP Extended Guest Request").
const TOO_SMALL: u64 = 1 << 32;

/// The report of this guest, in hexadecimal digits, that confirms `data`, up to 64 bytes in hexadecimal digits.
pub fn report(data: &str) -> io::Result<String> {
    let request = request(data)?;
    let mut response = [0; RESPONSE];
    // SAFETY: both addresses are of buffers as large as the kernel expects them, which outlive the call.
    ask(request.as_ptr() as u64, &mut response, |fd, message| unsafe { snp_get_report(fd, message) })
        .map_err(Refused::into_error)?;
    in_response(&response)
}

/// The same, and the certificates that come with it. `tell` hears how many bytes they take, as the VMM says it to a guest that has
/// too little room.
pub fn extended_report(data: &str, tell: impl Fn(u32)) -> io::Result<(String, String)> {
    let mut extended = ExtendedRequest { request: request(data)?, certificates: 0, length: 0 };
    let mut certificates = Vec::<u8>::new();
    let mut response = [0; RESPONSE];
    loop {
        extended.certificates = certificates.as_mut_ptr() as u64;
        extended.length = u32::try_from(certificates.len()).map_err(io::Error::other)?;
        let request = std::ptr::from_mut(&mut extended) as u64;
        // SAFETY: all three addresses are of buffers as large as the kernel is told, which outlive the call.
        let asked = ask(request, &mut response, |fd, message| unsafe { snp_get_ext_report(fd, message) });
        match asked {
            Ok(()) => return Ok((in_response(&response)?, digits(&certificates))),
            Err(refused) if refused.said == TOO_SMALL && extended.length as usize > certificates.len() => {
                tell(extended.length);
                // First one page less than it takes, if that is some, then all of them.
                let is_first = certificates.is_empty() && extended.length > PAGE;
                let next = if is_first { extended.length - PAGE } else { extended.length };
                certificates.resize(next as usize, 0);
            }
            Err(refused) => return Err(refused.into_error()),
        }
    }
}

/// Size of a page, bytes.
const PAGE: u32 = 4096;

/// A request that was refused.
struct Refused {
    error: nix::Error,
    /// What VMM and firmware say.
    said: u64,
}

impl Refused {
    fn into_error(self) -> io::Error {
        io::Error::other(format!("{}, VMM and firmware say {:#x}", self.error, self.said))
    }
}

fn request(data: &str) -> io::Result<[u8; REQUEST]> {
    let mut request = [0; REQUEST];
    let odd = || io::Error::new(io::ErrorKind::InvalidInput, "not up to 64 bytes in hexadecimal digits");
    if !data.len().is_multiple_of(2) || data.len() > 128 {
        return Err(odd());
    }
    for (byte, at) in request.iter_mut().zip((0..data.len()).step_by(2)) {
        *byte =
            data.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or_else(odd)?;
    }
    Ok(request)
}

/// Asks the kernel by `call`, with the address of a request.
fn ask(
    request: u64,
    response: &mut [u8; RESPONSE],
    call: impl Fn(std::os::fd::RawFd, *mut Message) -> nix::Result<i32>,
) -> Result<(), Refused> {
    let mut message = Message { version: 1, request, response: response.as_mut_ptr() as u64, error: 0 };
    let opened = File::open("/dev/sev-guest");
    let device = opened.map_err(|error| Refused {
        error: nix::Error::from_raw(error.raw_os_error().unwrap_or(0)),
        said: 0,
    })?;
    match call(device.as_raw_fd(), &mut message) {
        Ok(_) => Ok(()),
        Err(error) => Err(Refused { error, said: message.error }),
    }
}

fn in_response(response: &[u8; RESPONSE]) -> io::Result<String> {
    let status = u32::from_le_bytes([response[0], response[1], response[2], response[3]]);
    if status != 0 {
        return Err(io::Error::other(format!("the firmware's status is {status:#x}")));
    }
    Ok(digits(&response[32..32 + REPORT]))
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte: &u8| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
