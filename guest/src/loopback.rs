//! The loopback interface, which is down until somebody wants it. There is no other.
#![allow(unsafe_code)] // an ioctl

use std::ffi::c_void;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// SIOCSIFFLAGS of Linux, include/uapi/linux/sockios.h.
const SET_FLAGS: Opcode = 0x8914;
/// IFF_UP and IFF_RUNNING of include/uapi/linux/if.h.
const UP_AND_RUNNING: u16 = 0x41;

/// `struct ifreq`, of which the request takes name and flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Brings it up.
///
/// # Errors
/// If the kernel has no such interface.
pub fn up() -> Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut request = Request { name: [0; 16], flags: UP_AND_RUNNING, rest: [0; 22] };
    request.name.iter_mut().zip(b"lo").for_each(|(to, from)| *to = *from);
    // SAFETY: the request takes such a structure, and writes nothing to it.
    unsafe { ioctl(&socket, request) }
}

// SAFETY: the pointer is to a structure of the size and form that the request takes.
unsafe impl Ioctl for Request {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        SET_FLAGS
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> Result<()> {
        Ok(())
    }
}
