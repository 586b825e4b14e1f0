//! The host's side of the device: Unix sockets.
//!
//! Programs that want to reach the guest connect to one listening socket; programs that the guest is to reach listen on
//! that socket's path followed by `_` and the port.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect,
    listen, send, shutdown, socket_with,
};
use thiserror::Error;
use tracing::warn;

use super::connection::{Direction, Stream};
use super::payload::GuestBytes;

/// Connections that wait to be accepted; the host's limit (`somaxconn`) may be lower.
const BACKLOG: i32 = 4096;
const NON_BLOCKING: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// Why the socket that programs connect to could not be made.
#[derive(Debug, Error)]
pub enum BindError {
    /// Something exists at the path, and it is not a socket that was left behind.
    #[error(
        "socket {}: {} (EADDRINUSE)", path.display(),
        if *.is_socket { "another domain or program listens on it" } else { "a file that is no socket is there" }
    )]
    InUse {
        /// The path.
        path: PathBuf,
        /// Whether it is a socket.
        is_socket: bool,
    },
    /// The host refused it.
    #[error("socket {}: cannot be made: {source}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes the socket at `path` and listens on it. A socket that nobody listens on any more is replaced; anything
/// else that exists there is an error. The file is removed when the [`SocketFile`] is dropped.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |source: io::Error| match source.kind() {
        ErrorKind::AddrInUse => BindError::InUse { path: path.into(), is_socket: is_socket(path) },
        _ => BindError::Socket { path: path.into(), source },
    };
    if is_left_behind(path) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile { path: path.into(), device: metadata.dev(), inode: metadata.ino() };
    listener.set_nonblocking(true).map_err(failed)?;
    listen(&listener, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok((listener, file))
}

/// Whether `path` is a socket that refuses connections because nobody listens.
fn is_left_behind(path: &Path) -> bool {
    is_socket(path) && connect_to(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Connects without waiting.
fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, NON_BLOCKING, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// The file of a listening socket; dropping it removes the file, if it is still the same one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (self.device, self.inode));
        if is_ours && let Err(error) = std::fs::remove_file(&self.path) {
            warn!("socket {} is left behind: {error}", self.path.display());
        }
    }
}

/// Where connections of the host come from.
pub trait Host: Send {
    /// A connected socket.
    type Stream: Stream + AsFd + Send;
    /// The socket that is readable when `accept` has a connection, if programs can connect.
    fn listener(&self) -> Option<BorrowedFd<'_>>;
    /// Takes a connection of a host's program.
    fn accept(&mut self) -> io::Result<Self::Stream>;
    /// Connects to the host's program that serves `port`. Never waits: a program whose queue of connections is full
    /// refuses.
    fn connect(&mut self, port: u32) -> io::Result<Self::Stream>;
}

/// Unix sockets of the host.
pub struct UnixHost {
    listener: Option<UnixListener>,
    prefix: Option<PathBuf>,
}

impl UnixHost {
    /// Programs connect to `listener`, if there is one, and listen on `prefix` followed by `_` and the port. Without
    /// `prefix` the guest can connect to none.
    pub fn new(listener: Option<UnixListener>, prefix: Option<PathBuf>) -> io::Result<Self> {
        listener.as_ref().map_or(Ok(()), |listener| listener.set_nonblocking(true))?;
        Ok(Self { listener, prefix })
    }
}

impl Host for UnixHost {
    type Stream = HostStream;

    fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    fn accept(&mut self) -> io::Result<HostStream> {
        let listener = self.listener.as_ref().ok_or(ErrorKind::WouldBlock)?;
        Ok(HostStream(accept_with(listener, NON_BLOCKING)?))
    }

    fn connect(&mut self, port: u32) -> io::Result<HostStream> {
        let prefix = self.prefix.as_ref().ok_or(ErrorKind::ConnectionRefused)?;
        let mut path = OsString::from(prefix);
        path.push(format!("_{port}"));
        connect_to(Path::new(&path)).map(HostStream)
    }
}

/// A connected Unix socket, non-blocking.
pub struct HostStream(pub OwnedFd);

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for HostStream {
    fn receive(&mut self, into: &GuestBytes<'_>) -> io::Result<usize> {
        into.receive(self.0.as_fd())
    }

    fn send(&mut self, from: &GuestBytes<'_>) -> io::Result<usize> {
        from.send(self.0.as_fd())
    }

    fn send_slice(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(send(&self.0, from, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
    }

    fn shut_down(&mut self, direction: Direction) {
        let how = match direction {
            Direction::FromHost => Shutdown::Read,
            Direction::ToHost => Shutdown::Write,
        };
        // Fails only if the program has gone; its end says so itself.
        let _ = shutdown(&self.0, how);
    }
}
