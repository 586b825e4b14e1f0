//! Standard streams of a process in a guest, as it sees them: byte for byte, with their ends.
//!
//! The guest connects *out* for each stream, to a socket of ours: `<vsock socket>_<port>`. So nothing is polled for, and
//! the flow control is that of vsock. Each socket takes one connection, from the monitor, and is gone then.
//!
//! | what ends | what becomes of it |
//! |---|---|
//! | our standard input | the guest reads to the end of its own |
//! | the guest's standard input (it closed it, or exited) | ours is not read any more |
//! | the guest's standard output | it is written to the end, like everything before it |
//! | our standard output (`\| head -1`) | the connection is closed, and the process gets SIGPIPE, as in a pipeline |
//!
//! With a terminal there is one connection for both directions.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::PollFlags;
use rustix::io::{Errno, read, write};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{Shutdown, shutdown};
use rustix::stdio::stdin;

use crate::console::{Screen, Target};
use crate::kept::LogWriter;

/// Most that is taken from standard input at once, bytes.
const CHUNK: usize = 64 * 1024;

/// Which streams there are, and on which ports the guest connects for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Standard input; with a terminal both ways.
    pub stdin: Option<u32>,
    /// Standard output.
    pub stdout: Option<u32>,
    /// Standard error.
    pub stderr: Option<u32>,
}

/// What is done with the streams on this side.
pub struct Ends {
    /// Whether standard input is read. If not, the guest's is at its end at once.
    pub reads: bool,
    /// Whether standard output and error are written.
    pub shows: bool,
    /// Whether the first port is that of a terminal.
    pub terminal: bool,
    /// Where standard output is kept too.
    pub stdout_log: Option<LogWriter>,
    /// Where standard error is kept too.
    pub stderr_log: Option<LogWriter>,
}

/// What has happened, for [`Streams::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The guest connects.
    Called(Which),
    /// There is something on standard input.
    Typed,
    /// The guest takes input, or none any more.
    ToGuest,
    /// There is output, or its end.
    FromGuest(Which),
    /// Output can be written.
    Shown(Which),
}

/// One of the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Standard input; with a terminal both ways.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What whoever serves the streams should know.
#[derive(Debug)]
pub enum Note {
    /// The first connection has come: the process is about to start.
    Connected,
    /// Output cannot be written any more, for another reason than that nobody reads it.
    Unwritable(Which, io::Error),
    /// Output is not kept any more.
    NotKept(io::Error),
}

/// The streams.
pub struct Streams {
    sockets: Vec<(Which, Socket)>,
    /// Process id of the monitor, which alone may connect.
    monitor: u32,
    reads: bool,
    terminal: bool,
    feed: Option<Feed>,
    stdout: Screen,
    stderr: Screen,
    connected: bool,
}

impl Streams {
    /// Listens for the streams with `ports` beside the vsock socket `socket`.
    pub fn listen(socket: &Path, ports: Ports, ends: Ends) -> io::Result<Self> {
        let wanted =
            [(Which::Stdin, ports.stdin), (Which::Stdout, ports.stdout), (Which::Stderr, ports.stderr)];
        let sockets = wanted
            .into_iter()
            .filter_map(|(which, port)| Some((which, port?)))
            .map(|(which, port)| Ok((which, Socket::bind(socket, port)?)))
            .collect::<io::Result<_>>()?;
        let target = |target| if ends.shows { Some(target) } else { None };
        Ok(Self {
            sockets,
            monitor: 0,
            reads: ends.reads,
            terminal: ends.terminal,
            feed: None,
            stdout: Screen::new(None, ends.stdout_log, target(Target::Stdout)),
            stderr: Screen::new(None, ends.stderr_log, target(Target::Stderr)),
            connected: false,
        })
    }

    /// Takes connections of this process only.
    pub fn expect(&mut self, monitor: u32) {
        self.monitor = monitor;
    }

    /// Whether the process has got its streams, as far as it has any.
    pub fn connected(&self) -> bool {
        self.connected || self.sockets.is_empty()
    }

    /// Whether all output has come to its end, and is shown.
    pub fn are_done(&self) -> bool {
        self.sockets.is_empty() && self.stdout.is_done() && self.stderr.is_done()
    }

    /// Whether the last byte shown on standard output leaves a line open.
    pub fn line_is_open(&self) -> bool {
        self.stdout.line_is_open()
    }

    /// What is to be waited for.
    pub fn waits(&self) -> Vec<(Happened, BorrowedFd<'_>, PollFlags)> {
        let mut waits = self.pending();
        for (which, socket) in &self.sockets {
            waits.push((Happened::Called(*which), socket.listener.as_fd(), PollFlags::IN));
        }
        if let Some(feed) = &self.feed {
            if feed.listens() {
                waits.push((Happened::Typed, stdin(), PollFlags::IN));
            }
            // That nobody takes it any more is told without being asked for.
            let flags = if feed.is_pending() { PollFlags::OUT } else { PollFlags::empty() };
            waits.push((Happened::ToGuest, feed.connection.as_fd(), flags));
        }
        for (which, screen) in [(Which::Stdout, &self.stdout), (Which::Stderr, &self.stderr)] {
            if let Some(connection) = screen.waits_for() {
                waits.push((Happened::FromGuest(which), connection, PollFlags::IN));
            }
        }
        waits
    }

    /// Where something waits to be shown.
    pub fn pending(&self) -> Vec<(Happened, BorrowedFd<'static>, PollFlags)> {
        [(Which::Stdout, &self.stdout), (Which::Stderr, &self.stderr)]
            .into_iter()
            .filter_map(|(which, screen)| Some((Happened::Shown(which), screen.shows_on()?, PollFlags::OUT)))
            .collect()
    }

    /// Does what has become possible.
    pub fn serve(&mut self, happened: Happened) -> Option<Note> {
        match happened {
            Happened::Called(which) => return self.accept(which),
            Happened::Typed => self.feed.as_mut().map(Feed::read).unwrap_or_default(),
            Happened::ToGuest => {
                if self.feed.as_mut().is_some_and(|feed| feed.write().is_err()) {
                    self.feed = None;
                }
            }
            Happened::FromGuest(which) => return self.screen(which).read().err().map(Note::NotKept),
            Happened::Shown(which) => return self.show(which),
        }
        None
    }

    /// Takes what a monitor that has ended has left.
    pub fn take_the_rest(&mut self) -> Vec<Note> {
        self.feed = None;
        let mut notes = Vec::new();
        for which in [Which::Stdin, Which::Stdout, Which::Stderr] {
            notes.extend(self.accept(which));
        }
        for screen in [&mut self.stdout, &mut self.stderr] {
            // The second call goes on where an error of the log ended the first.
            for _ in 0..2 {
                notes.extend(screen.read_rest().err().map(Note::NotKept));
            }
        }
        notes
    }

    fn screen(&mut self, which: Which) -> &mut Screen {
        match which {
            Which::Stdin | Which::Stdout => &mut self.stdout,
            Which::Stderr => &mut self.stderr,
        }
    }

    fn accept(&mut self, which: Which) -> Option<Note> {
        let at = self.sockets.iter().position(|(one, _)| *one == which)?;
        let (_, socket) = self.sockets.get(at)?;
        let connection = socket.accept(self.monitor)?;
        self.sockets.swap_remove(at);
        if let Err(error) = self.connect(which, connection.into()) {
            return Some(Note::Unwritable(which, error));
        }
        if std::mem::replace(&mut self.connected, true) { None } else { Some(Note::Connected) }
    }

    fn connect(&mut self, which: Which, connection: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&connection, true)?;
        if which != Which::Stdin {
            self.screen(which).connect(connection);
            return Ok(());
        }
        if self.terminal {
            self.stdout.connect(connection.try_clone()?);
        }
        let mut feed = Feed::new(connection);
        if !self.reads {
            feed.end();
        }
        self.feed = Some(feed);
        Ok(())
    }

    /// Shows a piece. Who does not read it does not get it, and the process is to see that.
    fn show(&mut self, which: Which) -> Option<Note> {
        let error = self.screen(which).write().err()?;
        self.screen(which).close();
        if self.terminal {
            self.feed = None;
        }
        if error.kind() == ErrorKind::BrokenPipe { None } else { Some(Note::Unwritable(which, error)) }
    }
}

/// A socket that waits for its connection. It is gone when this is dropped.
struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    fn bind(socket: &Path, port: u32) -> io::Result<Self> {
        let mut path = OsString::from(socket);
        path.push(format!("_{port}"));
        let listener = UnixListener::bind(&path)?;
        let socket = Self { path: path.into(), listener };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// A connection of process `peer`, if one waits. Others are closed.
    fn accept(&self, peer: u32) -> Option<UnixStream> {
        loop {
            match self.listener.accept() {
                Ok((connection, _)) => {
                    let from = socket_peercred(&connection).map(|peer| peer.pid.as_raw_pid());
                    if from.is_ok_and(|pid| u32::try_from(pid) == Ok(peer)) {
                        return Some(connection);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // None waits, or there is no descriptor for it now.
                Err(_) => return None,
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // With its folder it may be gone already.
        let _ = fs::remove_file(&self.path);
    }
}

/// Standard input on its way to the guest.
struct Feed {
    connection: OwnedFd,
    bytes: Vec<u8>,
    sent: usize,
    at_end: bool,
}

impl Feed {
    fn new(connection: OwnedFd) -> Self {
        Self { connection, bytes: Vec::new(), sent: 0, at_end: false }
    }

    fn is_pending(&self) -> bool {
        self.sent < self.bytes.len()
    }

    /// No more is read than the guest takes: the rest belongs to whoever reads next.
    fn listens(&self) -> bool {
        !self.at_end && !self.is_pending()
    }

    fn read(&mut self) {
        self.sent = 0;
        self.bytes.resize(CHUNK, 0);
        let result = read(stdin(), &mut self.bytes);
        self.bytes.truncate(result.unwrap_or(0));
        match result {
            Ok(1..) | Err(Errno::INTR | Errno::AGAIN) => {}
            // Its end, or there is none.
            Ok(0) | Err(_) => self.end(),
        }
    }

    /// Hands on what the guest takes. An error says that it takes no more.
    fn write(&mut self) -> Result<(), Errno> {
        if !self.is_pending() {
            return Err(Errno::PIPE);
        }
        match write(&self.connection, self.bytes.get(self.sent..).unwrap_or_default()) {
            Ok(count) => self.sent = self.sent.saturating_add(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// All that was read is with the guest: it is read only then.
    fn end(&mut self) {
        self.at_end = true;
        // One that is closed has its end already.
        let _ = shutdown(&self.connection, Shutdown::Write);
    }
}
