//! The muxer without queues: its bounds, turns, and a host that runs out of descriptors.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::driver::{GUEST_CID, Socket};
use crate::virtio::Memory;
use crate::virtio::chain::Segment;
use crate::virtio::testing::memory;
use crate::virtio::vsock::host::{Host, HostStream, SocketFile, UnixHost, bind};
use crate::virtio::vsock::muxer::{Limits, Muxer};
use crate::virtio::vsock::packet::{Header, Op};
use crate::virtio::vsock::payload::GuestBytes;

/// A host whose descriptors can run out.
struct Scarce {
    host: UnixHost,
    exhausted: Arc<AtomicBool>,
}

impl Scarce {
    fn check(&self) -> io::Result<()> {
        // EMFILE
        if self.exhausted.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(24)) } else { Ok(()) }
    }
}

impl Host for Scarce {
    type Stream = HostStream;

    fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.host.listener()
    }

    fn accept(&mut self) -> io::Result<HostStream> {
        self.check()?;
        self.host.accept()
    }

    fn connect(&mut self, port: u32) -> io::Result<HostStream> {
        self.check()?;
        self.host.connect(port)
    }
}

/// A muxer of its own, without queues.
struct Bench {
    muxer: Muxer<Scarce>,
    exhausted: Arc<AtomicBool>,
    memory: Memory,
    directory: TempDir,
    _file: SocketFile,
}

const FEW: Limits = Limits { connections: 10, handshakes: 4, refusals: 5 };

impl Bench {
    fn new() -> Self {
        Self::with(Some)
    }

    fn without_listener() -> Self {
        Self::with(|_| None)
    }

    fn with(listener: impl FnOnce(UnixListener) -> Option<UnixListener>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (socket, file) = bind(&path).unwrap();
        let exhausted = Arc::new(AtomicBool::new(false));
        let host = UnixHost::new(listener(socket), Some(path)).unwrap();
        let host = Scarce { host, exhausted: exhausted.clone() };
        let mut muxer = Muxer::new(u64::from(GUEST_CID), host, FEW).unwrap();
        muxer.open();
        Self { muxer, exhausted, memory: memory(&[(0, 0x4_0000)]), directory, _file: file }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("s")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// A program that listens for the guest.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("s_{port}"))).unwrap()
    }

    fn packet(&mut self, header: &Header, payload: u32) {
        let segments = [Segment { address: GuestAddress(0), length: payload }];
        self.muxer.packet(header, GuestBytes::new(&self.memory, &segments));
    }

    fn fill(&mut self) -> Option<Header> {
        let segments = [Segment { address: GuestAddress(0x2_0000), length: 4096 }];
        self.muxer.fill(&GuestBytes::new(&self.memory, &segments))
    }

    fn fill_all(&mut self) -> Vec<Header> {
        std::iter::from_fn(|| self.fill()).collect()
    }

    /// Lets the muxer deal with all that is ready.
    fn poll(&mut self) {
        for _ in 0..10 {
            self.muxer.poll().unwrap();
        }
    }

    /// Whether nothing is ready once all was dealt with, but for a tick that may come at any time.
    fn comes_to_rest(&mut self) -> bool {
        (0..10).any(|_| {
            self.poll();
            !self.is_ready()
        })
    }

    fn is_ready(&self) -> bool {
        let descriptor = self.muxer.descriptor();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&now)).unwrap() > 0
    }
}

#[test]
fn without_descriptors_programs_wait_and_the_guest_is_refused() {
    let mut bench = Bench::new();
    let _listener = bench.listen(7);
    bench.exhausted.store(true, Ordering::SeqCst);
    let mut program = bench.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert!(bench.comes_to_rest(), "the event loop would spin");
    bench.packet(&Socket::new(1, 7).header(Op::Request), 0);
    assert_eq!(bench.fill().unwrap().op, Op::Reset as u16);
    bench.muxer.force_tick();
    bench.poll();
    assert_eq!(bench.muxer.counts(), (0, 0, 0, 0));
    bench.exhausted.store(false, Ordering::SeqCst);
    bench.muxer.force_tick();
    bench.poll();
    assert_eq!(bench.fill().unwrap().dst_port, 52);
    bench.packet(&Socket::new(1, 7).header(Op::Request), 0);
    assert_eq!(bench.fill().unwrap().op, Op::Response as u16);
}

#[test]
fn programs_that_waited_for_descriptors_are_taken_by_the_next_driver() {
    let mut bench = Bench::new();
    bench.exhausted.store(true, Ordering::SeqCst);
    let mut program = bench.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    bench.poll();
    // The driver goes before time has passed, and with it the ticks.
    bench.muxer.close();
    bench.exhausted.store(false, Ordering::SeqCst);
    bench.muxer.open();
    bench.poll();
    assert_eq!(bench.fill().unwrap().dst_port, 52);
}

#[test]
fn a_listener_that_its_owner_shuts_down_keeps_nobody_busy() {
    let mut bench = Bench::new();
    // It may have been inherited (`fd:N`), and be shut down by whoever else has it.
    rustix::net::shutdown(bench.muxer.host_listener().unwrap(), rustix::net::Shutdown::Both).unwrap();
    for _ in 0..3 {
        assert!(bench.comes_to_rest(), "the event loop would spin");
        bench.muxer.force_tick();
    }
    bench.muxer.close();
    assert!(bench.comes_to_rest(), "the event loop would spin without a driver");
}

#[test]
fn programs_that_say_nothing_hold_up_others_for_a_while_only() {
    let mut bench = Bench::new();
    let silent: Vec<UnixStream> = (0..FEW.handshakes).map(|_| bench.connect()).collect();
    bench.poll();
    assert_eq!(bench.muxer.counts(), (0, FEW.handshakes, 0, 0));
    let mut program = bench.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert!(bench.comes_to_rest());
    assert_eq!(bench.muxer.counts(), (0, FEW.handshakes, 0, 0));
    drop(silent.into_iter().next());
    bench.poll();
    assert_eq!(bench.fill().unwrap().dst_port, 52, "one has gone");
    let silent: Vec<UnixStream> = (0..FEW.handshakes).map(|_| bench.connect()).collect();
    bench.poll();
    assert_eq!(bench.muxer.counts().1, FEW.handshakes);
    for _ in 0..20 {
        bench.muxer.force_tick();
    }
    assert_eq!(bench.muxer.counts().1, 0);
    assert_eq!((&silent[0]).read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn connections_are_bounded_on_both_sides() {
    let mut bench = Bench::new();
    let listener = bench.listen(7);
    for port in 0..FEW.connections as u32 + 2 {
        bench.packet(&Socket::new(port, 7).header(Op::Request), 0);
    }
    let answers = bench.fill_all();
    let count = |op: Op| answers.iter().filter(|header| header.op == op as u16).count();
    assert_eq!((count(Op::Response), count(Op::Reset)), (FEW.connections, 2));
    let mut program = bench.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert!(bench.comes_to_rest());
    assert_eq!(bench.muxer.counts(), (FEW.connections, 0, 0, 0));
    bench.packet(&Socket::new(0, 7).header(Op::Reset), 0);
    bench.poll();
    assert_eq!(bench.fill().unwrap().dst_port, 52, "there is room again");
    drop(listener);
}

#[test]
fn a_socket_of_the_monitor_s_own_is_a_program_s() {
    // Nobody else can connect here.
    let mut bench = Bench::without_listener();
    let adopt = |bench: &mut Bench| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        bench.muxer.adopt(HostStream(theirs.into())).map(|()| ours).map_err(|error| error.to_string())
    };
    let mut ours = adopt(&mut bench).unwrap();
    ours.write_all(b"CONNECT 1024\nrequest").unwrap();
    bench.poll();
    let request = bench.fill().unwrap();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1024));
    let accepted = Header {
        src_cid: u64::from(GUEST_CID),
        dst_cid: request.src_cid,
        src_port: request.dst_port,
        dst_port: request.src_port,
        buf_alloc: 4096,
        ..Header::to_guest(0, request.ports(), Op::Response)
    };
    bench.packet(&accepted, 0);
    bench.poll();
    assert_eq!(bench.fill().unwrap().len, 7);
    let mut line = [0; 14];
    ours.read_exact(&mut line).unwrap();
    assert_eq!(line.as_slice(), format!("OK {}\n", request.src_port).as_bytes());
    // One that says nothing counts as a handshake.
    let _idle: Vec<_> = (0..FEW.handshakes).map(|_| adopt(&mut bench).unwrap()).collect();
    assert_eq!(adopt(&mut bench).unwrap_err(), "the guest has too many vsock connections");
    bench.muxer.close();
    assert_eq!(adopt(&mut bench).unwrap_err(), "the guest has no driver for vsock");
    assert_eq!(bench.muxer.counts(), (0, 0, 0, 0));
}

#[test]
fn refusals_are_bounded_and_packets_are_taken_all_the_same() {
    let mut bench = Bench::new();
    let listener = bench.listen(7);
    let waiting = FEW.refusals as u32;
    for port in 0..waiting + 2 {
        bench.packet(&Socket::new(port, 9).header(Op::CreditUpdate), 0);
    }
    bench.packet(&Socket::new(1, 7).header(Op::Request), 0);
    listener.accept().unwrap();
    let ports: Vec<u32> = bench.fill_all().iter().map(|header| header.dst_port).collect();
    assert_eq!(ports, (0..waiting).chain([1]).collect::<Vec<_>>());
    let metrics = bench.muxer.metrics();
    let counts = (metrics.refused_packets_count.total(), metrics.unsent_refusals_count.total());
    assert_eq!(counts, (u64::from(waiting), 2));
    bench.packet(&Socket::new(1, 9).header(Op::CreditUpdate), 0);
    assert_eq!(bench.fill().unwrap().op, Op::Reset as u16);
}

#[test]
fn connections_that_are_opened_and_reset_without_end_leave_nothing() {
    let mut bench = Bench::new();
    let listener = bench.listen(7);
    for _ in 0..1000 {
        let socket = Socket::new(1, 7);
        bench.packet(&socket.header(Op::Request), 0);
        assert_eq!(bench.muxer.counts(), (1, 0, 0, 1), "its RESPONSE has a turn, once");
        bench.packet(&socket.header(Op::Reset), 0);
        assert_eq!(bench.muxer.counts(), (0, 0, 0, 0));
        assert_eq!(listener.accept().unwrap().0.read(&mut [0; 1]).unwrap(), 0);
    }
    assert_eq!(bench.muxer.reserved(), 0);
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let listener = bench.listen(7);
    let mut programs = Vec::new();
    for port in 0..3 {
        bench.packet(&Socket::new(port, 7).header(Op::Request), 0);
        programs.push(listener.accept().unwrap().0);
    }
    bench.fill_all();
    for program in &mut programs {
        program.write_all(&[0; 12_000]).unwrap();
    }
    bench.poll();
    let mut turns: Vec<u32> = bench.fill_all().iter().map(|header| header.dst_port).collect();
    assert_eq!(turns.len(), 9);
    for round in turns.chunks_mut(3) {
        round.sort_unstable();
        assert_eq!(round, [0, 1, 2]);
    }
}

#[test]
fn ports_of_the_host_side_are_not_used_twice() {
    let mut bench = Bench::new();
    let listener = bench.listen(1 << 30);
    bench.packet(&Socket::new(52, 1 << 30).header(Op::Request), 0);
    assert_eq!(bench.fill().unwrap().op, Op::Response as u16);
    let mut program = bench.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    bench.poll();
    let header = bench.fill().unwrap();
    assert_eq!((header.op, header.src_port), (Op::Request as u16, (1 << 30) + 1));
    drop(listener);
}

fn any_header() -> impl Strategy<Value = Header> {
    // Mostly plausible, so that sequences get somewhere.
    let mostly = |usual: u32| prop_oneof![9 => Just(usual), 1 => any::<u32>()];
    (
        (prop_oneof![9 => Just(3_u64), 1 => any::<u64>()], prop_oneof![9 => Just(2_u64), 1 => any::<u64>()]),
        (0..4_u32, prop_oneof![8 => Just(7_u32), 4 => (1 << 30)..(1_u32 << 30) + 4, 1 => any::<u32>()]),
        (
            prop_oneof![2 => Just(0_u32), 6 => 0..9000_u32, 1 => any::<u32>()],
            prop_oneof![9 => Just(1_u16), 1 => any::<u16>()],
        ),
        (prop_oneof![9 => 1..8_u16, 1 => any::<u16>()], prop_oneof![3 => 0..4_u32, 1 => any::<u32>()]),
        (mostly(0x1_0000), prop_oneof![4 => 0..20_000_u32, 1 => any::<u32>()]),
    )
        .prop_map(|(cids, ports, (len, kind), (op, flags), (buf_alloc, fwd_cnt))| Header {
            src_cid: cids.0,
            dst_cid: cids.1,
            src_port: ports.0,
            dst_port: ports.1,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Header, u32),
    Fill,
    Poll,
    Tick,
    Program(u32),
    Write(usize),
    Read(usize),
    Drop(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any_header(), prop_oneof![Just(0_u32), 1..9000_u32]).prop_map(|(header, payload)| Step::Packet(header, payload)),
        6 => Just(Step::Fill),
        4 => Just(Step::Poll),
        1 => Just(Step::Tick),
        1 => (0..4_u32).prop_map(Step::Program),
        2 => any::<usize>().prop_map(Step::Write),
        2 => any::<usize>().prop_map(Step::Read),
        1 => any::<usize>().prop_map(Step::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever guest and programs do in whatever order: no panic, and every bound holds.
    #[test]
    fn any_sequence_keeps_the_bounds(steps in prop::collection::vec(any_step(), 0..300)) {
        let mut bench = Bench::new();
        let listener = bench.listen(7);
        listener.set_nonblocking(true).unwrap();
        let mut programs: Vec<UnixStream> = Vec::new();
        for step in steps {
            let some = |index: usize| index.checked_rem(programs.len());
            match step {
                Step::Packet(header, payload) => bench.packet(&header, payload),
                Step::Fill => { bench.fill(); }
                Step::Poll => bench.muxer.poll().unwrap(),
                Step::Tick => bench.muxer.force_tick(),
                Step::Program(port) if programs.len() < 20 => {
                    programs.push(bench.connect());
                    writeln!(programs.last().unwrap(), "CONNECT {port}").unwrap();
                }
                Step::Program(_) => {}
                Step::Write(index) => if let Some(index) = some(index) {
                    let _ = programs[index].write(&[0; 9000]);
                },
                Step::Read(index) => if let Some(index) = some(index) {
                    let _ = programs[index].read(&mut [0; 9000]);
                },
                Step::Drop(index) => if let Some(index) = some(index) {
                    programs.swap_remove(index);
                },
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true).unwrap();
                    programs.push(stream);
                }
                Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            let (connections, handshakes, refusals, pending) = bench.muxer.counts();
            prop_assert!(connections + handshakes <= FEW.connections && handshakes <= FEW.handshakes);
            prop_assert!(refusals <= FEW.refusals && pending <= connections);
            prop_assert_eq!(bench.muxer.reserved() == 0, connections == 0);
        }
        // Once everybody has gone, nothing is left.
        drop(programs);
        for _ in 0..30 {
            bench.poll();
            bench.fill_all();
            bench.muxer.force_tick();
        }
        // Nobody can tell a guest without credit that its program has gone.
        for ports in bench.muxer.all_ports() {
            bench.packet(&Socket::new(ports.guest, ports.host).header(Op::Reset), 0);
        }
        bench.poll();
        prop_assert_eq!(bench.muxer.counts(), (0, 0, 0, 0));
        prop_assert_eq!(bench.muxer.reserved(), 0);
    }
}
