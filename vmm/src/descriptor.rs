//! Files and sockets given by path or, as `fd:N`, by an inherited descriptor.
//!
//! A number alone is not to be trusted: a client of the API may name any, at any time, and the monitor has many
//! descriptors of its own. The kernel tells which were inherited: they survived an exec, so they lack `FD_CLOEXEC`, which
//! everything has that the monitor opens itself. (`tests/tests/drive_change.rs` looks at a running one.) So `fd:N` is a
//! descriptor that is open and lacks it, and *taking over* is to set it: that can be done once.
//!
//! What a launch needs it works on by duplicates, and takes over when all is well ([`Inherited`]). A launch that
//! fails leaves every descriptor as it was, for the next one.
#![allow(unsafe_code)] // descriptors by their number

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use cofferdam_api::source::Source;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;

/// Why an inherited descriptor cannot be used.
#[derive(Debug, Error)]
pub enum DescriptorError {
    /// No descriptor has that number.
    #[error("fd:{0}: no such descriptor is open")]
    NotOpen(RawFd),
    /// It is one of the monitor's own.
    #[error("fd:{0}: it was not inherited, or is taken already")]
    NotInherited(RawFd),
    /// The host refused something.
    #[error("fd:{fd}: {call}: {error}")]
    Host {
        /// Its number.
        fd: RawFd,
        /// What was tried.
        call: &'static str,
        /// What the host answered.
        #[source]
        error: io::Error,
    },
    /// A socket is needed to which programs can connect.
    #[error("fd:{0}: it is no Unix stream socket that listens")]
    NotListening(RawFd),
    /// A connection is needed.
    #[error("fd:{0}: it is a socket that listens, and no connection")]
    NotConnected(RawFd),
    /// Something is needed that can be read.
    #[error("fd:{0}: it is not open for reading")]
    NotReadable(RawFd),
    /// Something is needed that can be written.
    #[error("fd:{0}: it is not open for writing")]
    NotWritable(RawFd),
}

/// Opens `source` for reading, or takes its descriptor over.
pub fn open(source: &Source) -> io::Result<File> {
    match source {
        Source::Path(path) => File::open(path),
        Source::Descriptor(fd) => take(*fd).map(File::from).map_err(io::Error::other),
    }
}

/// Opens `source` for appending, or takes its descriptor over; a path is created if need be.
pub fn append(source: &Source) -> io::Result<File> {
    match source {
        Source::Path(path) => OpenOptions::new().append(true).create(true).open(path),
        Source::Descriptor(fd) => take(*fd).map(File::from).map_err(io::Error::other),
    }
}

/// Takes over the listening socket `fd`.
pub fn take_listener(fd: RawFd) -> Result<UnixListener, DescriptorError> {
    listener(fd, take(fd)?)
}

/// Inherited descriptors in use by something that may still fail.
#[derive(Debug, Default)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// A duplicate of descriptor `fd`.
    pub fn duplicate(&mut self, fd: RawFd) -> Result<OwnedFd, DescriptorError> {
        // The duplicate's number is no standard stream's, should one of those be closed.
        let duplicate = fcntl_dupfd_cloexec(inherited(fd)?, 3).map_err(host(fd, "fcntl"))?;
        // Once: by the second time the number may be something else's.
        if !self.0.contains(&fd) {
            self.0.push(fd);
        }
        Ok(duplicate)
    }

    /// A duplicate of descriptor `fd`, which has to be open for reading.
    pub fn readable(&mut self, fd: RawFd) -> Result<File, DescriptorError> {
        let file = self.duplicate(fd)?;
        match access(fd, &file)? {
            OFlags::RDONLY | OFlags::RDWR => Ok(file.into()),
            _ => Err(DescriptorError::NotReadable(fd)),
        }
    }

    /// A duplicate of descriptor `fd`, which has to be open for writing; and whether it is for reading too.
    pub fn writable(&mut self, fd: RawFd) -> Result<(OwnedFd, bool), DescriptorError> {
        let file = self.duplicate(fd)?;
        match access(fd, &file)? {
            OFlags::WRONLY => Ok((file, false)),
            OFlags::RDWR => Ok((file, true)),
            _ => Err(DescriptorError::NotWritable(fd)),
        }
    }

    /// A duplicate of descriptor `fd`, which has to be a listening Unix socket.
    pub fn listener(&mut self, fd: RawFd) -> Result<UnixListener, DescriptorError> {
        let socket = self.duplicate(fd)?;
        listener(fd, socket)
    }

    /// Takes the descriptors over: the duplicates are all that is left of them.
    pub fn take_over(self) {
        for fd in self.0 {
            // It cannot fail: each was inherited, and nobody else takes any meanwhile.
            let _ = take(fd);
        }
    }
}

/// How the file behind `file` may be accessed. Of one that was opened with `O_PATH` nothing can be.
fn access(fd: RawFd, file: &OwnedFd) -> Result<OFlags, DescriptorError> {
    let flags = fcntl_getfl(file).map_err(host(fd, "fcntl"))?;
    Ok(flags & (OFlags::RWMODE | OFlags::PATH))
}

fn listener(fd: RawFd, socket: OwnedFd) -> Result<UnixListener, DescriptorError> {
    let is_unix = socket_domain(&socket) == Ok(AddressFamily::UNIX);
    let is_stream = socket_type(&socket) == Ok(SocketType::STREAM);
    match socket_acceptconn(&socket) {
        Ok(true) if is_unix && is_stream => Ok(socket.into()),
        _ => Err(DescriptorError::NotListening(fd)),
    }
}

/// Takes over inherited descriptor `fd`.
fn take(fd: RawFd) -> Result<OwnedFd, DescriptorError> {
    fcntl_setfd(inherited(fd)?, FdFlags::CLOEXEC).map_err(host(fd, "fcntl"))?;
    // SAFETY: it is open, and nobody owns it: what has an owner in this process is closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Descriptor `fd`, if it was inherited and not taken over. To be used at once.
fn inherited(fd: RawFd) -> Result<BorrowedFd<'static>, DescriptorError> {
    // SAFETY: a number that is no open descriptor makes the calls on it fail; and one that is inherited stays
    // open until it is taken over, which the same thread does.
    let descriptor = unsafe { BorrowedFd::borrow_raw(fd) };
    match fcntl_getfd(descriptor.as_fd()) {
        Ok(flags) if flags.contains(FdFlags::CLOEXEC) => Err(DescriptorError::NotInherited(fd)),
        Ok(_) => Ok(descriptor),
        Err(Errno::BADF) => Err(DescriptorError::NotOpen(fd)),
        Err(error) => Err(host(fd, "fcntl")(error)),
    }
}

fn host(fd: RawFd, call: &'static str) -> impl Fn(Errno) -> DescriptorError {
    move |error| DescriptorError::Host { fd, call, error: error.into() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Seek, Write};
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    /// `file` as it would be if this process had inherited it.
    fn inherit(file: impl Into<OwnedFd>) -> RawFd {
        let file = file.into();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        file.into_raw_fd()
    }

    /// Which file that is, if one is open.
    fn file_of(fd: RawFd) -> Option<(u64, u64)> {
        let file = fs::metadata(format!("/proc/self/fd/{fd}")).ok()?;
        Some((file.dev(), file.ino()))
    }

    #[test]
    fn what_is_not_open_or_the_monitor_s_own_is_refused() {
        let own = tempfile::tempfile().unwrap();
        let fd = own.as_raw_fd();
        for error in [take(fd).err(), Inherited::default().duplicate(fd).err()] {
            assert!(
                matches!(error, Some(DescriptorError::NotInherited(number)) if number == fd),
                "{error:?}"
            );
        }
        for fd in [987_654, RawFd::MAX] {
            let error = open(&Source::Descriptor(fd)).unwrap_err().to_string();
            assert_eq!(error, format!("fd:{fd}: no such descriptor is open"));
            assert!(append(&Source::Descriptor(fd)).is_err());
        }
    }

    #[test]
    fn a_descriptor_is_taken_once_and_closed_on_exec_then() {
        let fd = inherit(tempfile::tempfile().unwrap());
        let file = append(&Source::Descriptor(fd)).unwrap();
        assert_eq!(file.as_raw_fd(), fd);
        assert!(fcntl_getfd(&file).unwrap().contains(FdFlags::CLOEXEC));
        let again = open(&Source::Descriptor(fd)).unwrap_err().to_string();
        assert_eq!(again, format!("fd:{fd}: it was not inherited, or is taken already"));
    }

    #[test]
    fn what_was_only_tried_stays_until_it_is_taken_over() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"text").unwrap();
        file.rewind().unwrap();
        let fd = inherit(file);
        for _ in 0..2 {
            let mut failed = Inherited::default();
            let duplicate = failed.readable(fd).unwrap();
            assert!(
                fcntl_getfd(&duplicate).unwrap().contains(FdFlags::CLOEXEC) && duplicate.as_raw_fd() != fd
            );
        }
        let mut used = Inherited::default();
        let mut duplicate = used.readable(fd).unwrap();
        let taken = file_of(duplicate.as_raw_fd());
        assert_eq!(file_of(fd), taken);
        used.take_over();
        assert_ne!(file_of(fd), taken, "a test beside this one may have that number by now");
        let mut text = String::new();
        duplicate.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }

    #[test]
    fn what_is_used_twice_is_taken_over_once() {
        let fd = inherit(tempfile::tempfile().unwrap());
        let mut inherited = Inherited::default();
        let duplicates = [inherited.duplicate(fd).unwrap(), inherited.duplicate(fd).unwrap()];
        assert_ne!(duplicates[0].as_raw_fd(), duplicates[1].as_raw_fd());
        assert_eq!(inherited.0, [fd]);
        inherited.take_over();
    }

    #[test]
    fn the_wrong_direction_is_refused() {
        let (reader, writer) = io::pipe().unwrap();
        let (reader, writer) = (inherit(reader), inherit(writer));
        let path = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty());
        let path = inherit(path.unwrap());
        let mut inherited = Inherited::default();
        assert!(inherited.readable(reader).is_ok());
        assert!(matches!(inherited.writable(writer), Ok((_, false))));
        for fd in [writer, path] {
            assert!(
                matches!(inherited.readable(fd), Err(DescriptorError::NotReadable(number)) if number == fd)
            );
        }
        for fd in [reader, path] {
            assert!(
                matches!(inherited.writable(fd), Err(DescriptorError::NotWritable(number)) if number == fd)
            );
        }
        let both = inherit(UnixStream::pair().unwrap().0);
        assert!(matches!(inherited.writable(both), Ok((_, true))));
        inherited.take_over();
    }

    #[test]
    fn only_a_listening_unix_stream_socket_listens() {
        let folder = tempfile::tempdir().unwrap();
        let good = inherit(UnixListener::bind(folder.path().join("s")).unwrap());
        let tcp = inherit(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let connected = inherit(UnixStream::pair().unwrap().0);
        let datagram = inherit(UnixDatagram::bind(folder.path().join("d")).unwrap());
        let file = inherit(tempfile::tempfile().unwrap());
        let mut inherited = Inherited::default();
        inherited.listener(good).unwrap();
        for fd in [tcp, connected, datagram, file] {
            let error = inherited.listener(fd).err();
            assert!(
                matches!(error, Some(DescriptorError::NotListening(number)) if number == fd),
                "{error:?}"
            );
        }
        let sequenced = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        let address = rustix::net::SocketAddrUnix::new(folder.path().join("q")).unwrap();
        rustix::net::bind(&sequenced, &address).unwrap();
        rustix::net::listen(&sequenced, 1).unwrap();
        assert!(inherited.listener(inherit(sequenced)).is_err());
        inherited.take_over();
    }
}
