//! vsock addresses, which rustix does not have (Linux, include/uapi/linux/vm_sockets.h).
#![allow(unsafe_code)] // addresses of sockets

use rustix::fd::OwnedFd;
use rustix::io::{Errno, Result};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};
use rustix::net::{acceptfrom_with, bind, connect, listen as listen_on, socket_with};

/// Context identifier of the host.
const HOST: u32 = 2;
/// Any context identifier of this domain.
const ANY: u32 = u32::MAX;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    context: u32,
    flags: u8,
    zero: [u8; 3],
}

impl Address {
    fn new(context: u32, port: u32) -> Self {
        Self { family: AddressFamily::VSOCK.as_raw(), reserved: 0, port, context, flags: 0, zero: [0; 3] }
    }
}

// SAFETY: the pointer is to a whole address of the system's form, which lives until `f` returns.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(std::ptr::from_ref(self).cast(), size_of::<Self>() as SocketAddrLen)
    }
}

fn stream() -> Result<OwnedFd> {
    socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

/// A connection to a port of the host.
///
/// # Errors
/// If nobody listens there, or the domain has no vsock.
pub fn connected(port: u32) -> Result<OwnedFd> {
    let socket = stream()?;
    connect(&socket, &Address::new(HOST, port))?;
    Ok(socket)
}

/// A socket that listens on a port.
///
/// # Errors
/// If the domain has no vsock.
pub fn listen(port: u32, backlog: i32) -> Result<OwnedFd> {
    let socket = stream()?;
    bind(&socket, &Address::new(ANY, port))?;
    listen_on(&socket, backlog)?;
    Ok(socket)
}

/// The next connection that the host makes. Those of the container's own processes are closed.
///
/// # Errors
/// If there is no memory for one, or it ended before it was accepted.
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd> {
    let (socket, peer) = acceptfrom_with(listener, SocketFlags::CLOEXEC)?;
    if peer.is_some_and(|peer| is_host(&peer)) { Ok(socket) } else { Err(Errno::ACCESS) }
}

fn is_host(address: &SocketAddrAny) -> bool {
    context(address) == Some(HOST)
}

/// The context identifier in an address.
fn context(address: &SocketAddrAny) -> Option<u32> {
    if address.address_family() != AddressFamily::VSOCK
        || (address.addr_len() as usize) < size_of::<Address>()
    {
        return None;
    }
    // SAFETY: there are as many bytes as the type has, and all bytes are good ones.
    Some(unsafe { address.as_ptr().cast::<Address>().read_unaligned() }.context)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn only_the_host_is_the_host() {
        // The hypervisor, this domain by its loopback, other domains, anybody.
        for other in [0, 1, 3, u32::MAX - 1, ANY] {
            assert!(!is_host(&Address::new(other, 1024).as_any()), "{other}");
        }
        assert!(is_host(&Address::new(HOST, 1024).as_any()));
        let mut address = Address::new(HOST, 1024);
        address.family = AddressFamily::UNIX.as_raw();
        assert!(!is_host(&address.as_any()));
    }

    #[test]
    fn who_is_not_the_host_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let mut other = UnixStream::connect(&path).unwrap();
        assert_eq!(accept(&listener).unwrap_err(), Errno::ACCESS);
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
    }
}
