use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::bus::BusDevice;
use crate::platform::testing::{Edges, read_byte};

const DATA: u64 = 0;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;

/// A console and an event loop that turns when told to.
struct Rig {
    console: Arc<Console>,
    manager: EventManager<Arc<Console>>,
}

impl Rig {
    fn new(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        let console = Arc::new(Console::new(Arc::new(Edges::default()), input, output, None).unwrap());
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(console.clone());
        Self { console, manager }
    }

    fn turn(&mut self) {
        self.manager.run_with_timeout(5).unwrap();
    }

    /// Turns the event loop until `done`, but not for ever.
    fn turn_until(&mut self, what: &str, mut done: impl FnMut() -> bool) {
        let end = soon();
        while !done() {
            assert!(Instant::now() < end, "never happened: {what}");
            self.turn();
        }
    }

    /// A vCPU that sends `bytes` and counts how many it got rid of.
    fn guest_sends(&self, bytes: Vec<u8>) -> (Arc<AtomicUsize>, JoinHandle<()>) {
        let (port, sent) = (self.console.port(), Arc::new(AtomicUsize::new(0)));
        let counter = sent.clone();
        let thread = std::thread::spawn(move || {
            for byte in bytes {
                port.write(DATA, &[byte]);
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        (sent, thread)
    }

    /// What the guest reads now.
    fn guest_reads(&self) -> Vec<u8> {
        let port = self.console.port();
        let mut bytes = Vec::new();
        while read_byte(&*port, LINE_STATUS) & 1 != 0 {
            bytes.push(read_byte(&*port, DATA));
        }
        bytes
    }

    /// Everything that the guest reads until it has `count` bytes.
    fn guest_reads_all(&mut self, count: usize) -> Vec<u8> {
        let (mut bytes, end) = (self.guest_reads(), soon());
        while bytes.len() < count && Instant::now() < end {
            self.turn();
            bytes.extend(self.guest_reads());
        }
        bytes
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (reader.into(), writer)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(300)
}

#[test]
fn output_reaches_a_file_byte_by_byte() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut rig = Rig::new(None, Some(file.reopen().unwrap().into()));
    let expected = pattern(200_000);
    let (_, guest) = rig.guest_sends(expected.clone());
    rig.turn_until("all is written", || file.as_file().metadata().unwrap().len() == 200_000);
    guest.join().unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap(), expected);
    assert_eq!(rig.console.flush(Instant::now()), 0);
}

#[test]
fn a_reader_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let (mut reader, writer) = pipe();
    let observer = writer.try_clone().unwrap();
    let mut rig = Rig::new(None, Some(writer));
    let expected = pattern(400_000);
    let (sent, guest) = rig.guest_sends(expected.clone());
    let mut last = 0;
    rig.turn_until("the guest waits", || {
        let now = sent.load(Ordering::SeqCst);
        std::mem::replace(&mut last, now) == now && now > CAPACITY
    });
    assert!(last < 400_000, "pipe and queue are smaller than that");
    rig.turn();
    assert!(!rustix::fs::fcntl_getfl(&observer).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    drop(observer);
    let reader = std::thread::spawn(move || {
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        read
    });
    rig.turn_until("the guest has sent all", || sent.load(Ordering::SeqCst) == 400_000);
    guest.join().unwrap();
    assert_eq!(rig.console.flush(soon()), 0);
    drop(rig);
    assert_eq!(reader.join().unwrap(), expected);
}

#[test]
fn closing_releases_a_vcpu_that_waits() {
    let (_reader, writer) = pipe();
    let rig = Rig::new(None, Some(writer));
    let (sent, guest) = rig.guest_sends(pattern(CAPACITY + 1000));
    while sent.load(Ordering::SeqCst) < CAPACITY {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(sent.load(Ordering::SeqCst), CAPACITY);
    rig.console.close();
    guest.join().unwrap();
}

#[test]
fn flushing_gives_up_at_the_deadline() {
    let (mut reader, writer) = pipe();
    let rig = Rig::new(None, Some(writer));
    // More than any pipe with the default size and the queue hold together.
    let (_, guest) = rig.guest_sends(pattern(CAPACITY));
    guest.join().unwrap();
    rustix::pipe::fcntl_setpipe_size(&reader, 8192).unwrap();
    let lost = rig.console.flush(Instant::now());
    drop(rig);
    let mut read = Vec::new();
    reader.read_to_end(&mut read).unwrap();
    assert_eq!(lost, (CAPACITY - read.len()) as u64);
    assert!(lost > 0);
    assert_eq!(read, pattern(CAPACITY)[..read.len()]);
}

#[test]
fn flushing_needs_no_event_loop_and_no_time_if_the_reader_reads() {
    let (mut reader, writer) = pipe();
    let rig = Rig::new(None, Some(writer));
    let (_, guest) = rig.guest_sends(b"reboot: Power down\n".to_vec());
    guest.join().unwrap();
    assert_eq!(rig.console.flush(Instant::now()), 0);
    drop(rig);
    let mut read = String::new();
    reader.read_to_string(&mut read).unwrap();
    assert_eq!(read, "reboot: Power down\n");
}

#[test]
fn a_sink_that_fails_does_not_stop_the_guest() {
    let (reader, writer) = pipe();
    drop(reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    for output in [writer, full.into()] {
        let mut rig = Rig::new(None, Some(output));
        let (sent, guest) = rig.guest_sends(pattern(300_000));
        rig.turn_until("the guest has sent all", || sent.load(Ordering::SeqCst) == 300_000);
        guest.join().unwrap();
        assert_eq!(rig.console.flush(soon()), 300_000);
    }
}

#[test]
fn a_reader_that_goes_away_while_the_guest_waits_lets_it_go_on() {
    let (reader, writer) = pipe();
    let mut rig = Rig::new(None, Some(writer));
    let (sent, guest) = rig.guest_sends(pattern(400_000));
    let mut last = 0;
    rig.turn_until("the guest waits", || {
        let now = sent.load(Ordering::SeqCst);
        std::mem::replace(&mut last, now) == now && now > CAPACITY
    });
    drop(reader);
    rig.turn_until("the guest has sent all", || sent.load(Ordering::SeqCst) == 400_000);
    guest.join().unwrap();
}

#[test]
fn nowhere_takes_everything() {
    let rig = Rig::new(None, None);
    let (_, guest) = rig.guest_sends(pattern(200_000));
    guest.join().unwrap();
    assert_eq!(rig.console.flush(Instant::now()), 0);
    assert_eq!(rig.guest_reads(), b"");
}

#[test]
fn the_event_loop_rests_when_there_is_nothing_to_do() {
    let (reader, writer) = pipe();
    let (input, closed) = pipe();
    drop(closed);
    let mut rig = Rig::new(Some(input.into()), Some(writer));
    rig.guest_sends(b"x".to_vec()).1.join().unwrap();
    for _ in 0..20 {
        rig.turn();
    }
    drop(reader);
    assert_eq!(rig.manager.run_with_timeout(20).unwrap(), 0);
}

#[test]
fn input_from_a_pipe_arrives_in_full() {
    let (reader, writer) = pipe();
    let mut rig = Rig::new(Some(reader.into()), None);
    let expected = pattern(10_000);
    let mut writer = File::from(writer);
    writer.write_all(&expected).unwrap();
    drop(writer);
    assert_eq!(rig.guest_reads_all(10_000), expected);
    for _ in 0..4 {
        rig.turn();
    }
    assert_eq!(rig.guest_reads(), b"");
    assert_eq!(rig.manager.run_with_timeout(20).unwrap(), 0, "the end of input is no event for ever");
}

#[test]
fn a_guest_that_does_not_read_leaves_input_in_the_pipe() {
    let (reader, writer) = pipe();
    let mut rig = Rig::new(Some(reader.into()), None);
    let mut writer = File::from(writer);
    writer.write_all(&pattern(1000)).unwrap();
    for _ in 0..4 {
        rig.turn();
    }
    assert_eq!(rig.manager.run_with_timeout(20).unwrap(), 0);
    assert_eq!(rig.guest_reads_all(1000), pattern(1000));
    writer.write_all(b"later").unwrap();
    assert_eq!(rig.guest_reads_all(5), b"later");
}

#[test]
fn input_that_epoll_refuses_arrives_in_full() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(5_000)).unwrap();
    file.rewind().unwrap();
    let mut rig = Rig::new(Some(file.into()), None);
    assert_eq!(rig.guest_reads_all(5_000), pattern(5_000));
    assert_eq!(rig.guest_reads(), b"");

    let rig = Rig::new(Some(File::open("/dev/null").unwrap().into()), None);
    assert_eq!(rig.guest_reads(), b"");

    let mut rig = Rig::new(Some(File::open("/dev/zero").unwrap().into()), None);
    assert_eq!(rig.guest_reads_all(1_000)[..1_000], [0; 1_000]);
}

#[test]
fn input_that_cannot_be_read_ends() {
    let mut rig = Rig::new(Some(File::open("/").unwrap().into()), None);
    rig.turn();
    assert_eq!(rig.guest_reads(), b"");
}

#[test]
fn input_during_loopback_is_not_lost() {
    let (reader, writer) = pipe();
    let mut rig = Rig::new(Some(reader.into()), None);
    rig.console.port().write(MODEM_CONTROL, &[0x10]);
    File::from(writer).write_all(b"typed early").unwrap();
    rig.turn();
    assert_eq!(rig.guest_reads(), b"");
    rig.console.port().write(MODEM_CONTROL, &[0]);
    assert_eq!(rig.guest_reads_all(11), b"typed early");
}
