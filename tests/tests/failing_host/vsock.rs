//! Many connections, much data, and programs of the host that are gone, go away or do not read.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use cofferdam_tests::Finished;
use cofferdam_tests::host::raise_descriptor_limit;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::payload;

/// Port of the host that the guest connects to.
const PORT: u32 = 5000;
/// Port of the guest that the host connects to.
const GUEST_PORT: u32 = 7000;
const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// A folder with a program that listens on [`PORT`].
struct Program {
    folder: TempDir,
    listener: UnixListener,
}

impl Program {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(format!("v.sock_{PORT}"))).unwrap();
        Self { folder, listener }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("v.sock")
    }
}

/// A program that sends back whatever comes, on all its connections. It ends with the process.
pub struct Echo(TempDir);

impl Echo {
    /// Starts it.
    pub fn start() -> Self {
        let Program { folder, listener } = Program::new();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        Self(folder)
    }

    /// The domain's socket.
    pub fn socket(&self) -> PathBuf {
        self.0.path().join("v.sock")
    }
}

/// What the guest printed: how many connections were answered and refused, line by line.
pub fn answers(done: &Finished) -> Vec<(u32, u32)> {
    let console = done.console();
    let numbers = |line: &str| {
        let (answered, refused) = line.strip_suffix(" refused")?.split_once(" answered, ")?;
        Some((answered.parse().ok()?, refused.parse().ok()?))
    };
    console.lines().filter_map(numbers).collect()
}

/// Asks for `port` of the guest, sends a word, and expects it back.
pub fn talk(mut program: UnixStream, port: u32) {
    writeln!(program, "CONNECT {port}").unwrap();
    let mut reader = BufReader::new(program.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line:?}");
    program.write_all(b"eight by").unwrap();
    let mut word = [0; 8];
    reader.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"eight by");
}

#[test]
fn a_thousand_connections_of_the_guest_at_once() {
    raise_descriptor_limit();
    let echo = Echo::start();
    let run = payload("streams").with("vsock", echo.socket()).with("cmdline", "mode=together count=1000");
    let done = run.finish();
    assert_eq!((done.code(), answers(&done)), (0, vec![(1000, 0)]), "{done}");
}

#[test]
fn a_thousand_connections_of_the_guest_one_after_another() {
    let echo = Echo::start();
    let run = payload("streams").with("vsock", echo.socket()).with("cmdline", "mode=each count=1000");
    let done = run.finish();
    assert_eq!((done.code(), answers(&done)), (0, vec![(1000, 0)]), "{done}");
}

#[test]
fn a_thousand_connections_of_the_host_at_once_and_one_after_another() {
    raise_descriptor_limit();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v.sock");
    let run = payload("streams").with("vsock", &socket).with("cmdline", "mode=serve count=2000");
    let running = run.start();
    running.wait_for("ready");
    let programs: Vec<_> = (0..1000).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let talking: Vec<_> =
        programs.into_iter().map(|program| thread::spawn(move || talk(program, GUEST_PORT))).collect();
    talking.into_iter().for_each(|program| program.join().unwrap());
    (0..1000).for_each(|_| talk(UnixStream::connect(&socket).unwrap(), GUEST_PORT));
    let done = running.finish();
    assert_eq!((done.code(), answers(&done)), (0, vec![(2000, 0)]), "{done}");
}

/// The part of a stream at `offset`: each page begins with its own offset.
fn part(offset: u64) -> Vec<u8> {
    let mut part = vec![0; MIB];
    for (page, at) in part.chunks_mut(PAGE).zip((offset..).step_by(PAGE)) {
        page[..8].copy_from_slice(&at.to_le_bytes());
    }
    part
}

fn stream_of(mib: u64, mode: &str, program: impl FnOnce(UnixStream) + Send + 'static) {
    let Program { folder, listener } = Program::new();
    let program: JoinHandle<()> = thread::spawn(move || program(listener.accept().unwrap().0));
    let line = format!("mode={mode} mib={mib}");
    let run = payload("streams").with("vsock", folder.path().join("v.sock")).with("cmdline", line);
    let done = run.finish();
    assert_eq!(done.code(), 0, "{done}");
    assert!(done.console().starts_with(&format!("{} bytes", mib << 20)), "{done}");
    program.join().unwrap();
}

fn from_guest(mib: u64) {
    stream_of(mib, "send", move |mut stream| {
        let mut got = vec![0; MIB];
        for offset in (0..mib << 20).step_by(MIB) {
            stream.read_exact(&mut got).unwrap();
            for (page, at) in got.chunks(PAGE).zip((offset..).step_by(PAGE)) {
                assert_eq!(page[..8], at.to_le_bytes(), "page at {at}");
            }
        }
        assert_eq!(stream.read(&mut got).unwrap(), 0, "nothing follows");
    });
}

fn to_guest(mib: u64) {
    stream_of(mib, "receive", move |mut stream| {
        (0..mib << 20).step_by(MIB).for_each(|offset| stream.write_all(&part(offset)).unwrap());
        stream.shutdown(Shutdown::Write).unwrap();
    });
}

#[test]
fn a_stream_from_the_guest() {
    from_guest(32);
}

#[test]
fn a_stream_to_the_guest() {
    to_guest(32);
}

#[test]
#[ignore = "long: make test-all"]
fn a_gib_from_the_guest() {
    from_guest(1024);
}

#[test]
#[ignore = "long: make test-all"]
fn a_gib_to_the_guest() {
    to_guest(1024);
}

#[test]
fn connections_to_a_program_that_is_not_there_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = payload("streams").with("vsock", folder.path().join("v.sock"));
    let done = run.with("cmdline", "mode=together count=100").finish();
    assert_eq!((done.code(), answers(&done)), (0, vec![(0, 100)]), "{done}");
    assert_eq!(done.messages().lines().count(), 1, "more than that it started: {done}");
}

#[test]
fn a_program_that_goes_away_resets_the_connection() {
    let program = Program::new();
    let running =
        payload("streams").with("vsock", program.socket()).with("cmdline", "mode=send mib=64").start();
    let mut stream = program.listener.accept().unwrap().0;
    stream.read_exact(&mut vec![0; MIB]).unwrap();
    drop(stream);
    let done = running.finish();
    assert_eq!(done.code(), 1, "{done}");
    assert!(done.console().starts_with("reset after "), "{done}");
}

/// The guest runs out of credit, the monitor holds no more than a window, and the domain stops as ever.
#[test]
fn a_program_that_does_not_read_holds_up_its_own_connection_only() {
    let program = Program::new();
    let run = payload("streams").with("vsock", program.socket()).with("cmdline", "mode=send mib=64 stall=1");
    let running = run.with("stop-timeout", "0s").start();
    let stream = program.listener.accept().unwrap().0;
    running.wait_for("no credit after ");
    let held =
        std::fs::read_to_string(format!("/proc/{}/status", running.monitor_pid().as_raw_nonzero())).unwrap();
    let anonymous = held.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib: u32 = anonymous.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(kib < 16 << 10, "{anonymous}");
    running.signal(Signal::TERM);
    assert_eq!(running.finish().code(), 143);
    drop(stream);
}
