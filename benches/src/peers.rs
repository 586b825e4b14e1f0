//! The host's side of the vsock measurements: a service per port that takes
//! bytes, gives bytes, or sends back what comes, behind either monitor.
//!
//! Cofferdam connects a guest to the Unix socket `PATH_PORT`, vhost-vsock to an
//! `AF_VSOCK` socket on the port.
#![allow(unsafe_code)] // an accepted socket comes as a number

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

/// First of the three ports (see `bench-guest`).
pub const PORT: u32 = 5000;
/// `VMADDR_CID_ANY`.
const ANY: u32 = u32::MAX;

/// What is done on the connections to a port.
type Service = fn(File) -> io::Result<()>;
const SERVICES: [(u32, Service); 3] = [(PORT, take), (PORT + 1, give), (PORT + 2, send_back)];

/// Serves guests of Cofferdam whose vsock device has the socket `path`, as long as this process lives.
pub fn serve_unix(path: &Path) -> io::Result<()> {
    for (port, service) in SERVICES {
        let socket = PathBuf::from(format!("{}_{port}", path.display()));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(socket)?;
        serve(move || Ok(OwnedFd::from(listener.accept()?.0).into()), service);
    }
    Ok(())
}

/// Serves guests of vhost-vsock, as long as this process lives.
pub fn serve_vhost() -> io::Result<()> {
    for (port, service) in SERVICES {
        let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &VsockAddr::new(ANY, port))?;
        listen(&listener, Backlog::new(1)?)?;
        serve(
            move || {
                let fd = accept(listener.as_raw_fd())?;
                // SAFETY: the descriptor is new and nobody else's.
                Ok(unsafe { File::from_raw_fd(fd) })
            },
            service,
        );
    }
    Ok(())
}

/// Accepts connections one after another. That one breaks is how some measurements end.
fn serve(next: impl Fn() -> io::Result<File> + Send + 'static, service: Service) {
    thread::spawn(move || {
        while let Ok(stream) = next() {
            let _ = service(stream);
        }
    });
}

fn take(mut stream: File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let mut bytes = 0_u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&bytes.to_le_bytes()),
            length => bytes += length as u64,
        }
    }
}

fn give(mut stream: File) -> io::Result<()> {
    let buffer = vec![0x3C; 1 << 18];
    loop {
        stream.write_all(&buffer)?;
    }
}

fn send_back(mut stream: File) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(buffer.get(..length).unwrap_or_default())?,
        }
    }
}
