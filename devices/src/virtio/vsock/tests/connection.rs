//! The state machine on a scripted socket.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::rc::Rc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::chain::Segment;
use crate::virtio::vsock::connection::{Connection, Direction, PATIENCE, Readiness, Stream};
use crate::virtio::vsock::packet::{
    Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::virtio::vsock::payload::GuestBytes;

const WINDOW: u32 = 1000;
const PORTS: Ports = Ports { host: 1 << 30, guest: 52 };
const DATA: Readiness = Readiness { data: true, room: false, hung_up: false };
const ROOM: Readiness = Readiness { data: false, room: true, hung_up: false };
const HUNG_UP: Readiness = Readiness { data: true, room: false, hung_up: true };

/// What the host's program does, and what it sees.
#[derive(Default)]
struct Script {
    to_send: VecDeque<u8>,
    has_sent_all: bool,
    room: usize,
    received: Vec<u8>,
    shut: Vec<Direction>,
    send_error: Option<ErrorKind>,
    receive_error: Option<ErrorKind>,
    closed: bool,
}

struct Fake(Rc<RefCell<Script>>);

impl Drop for Fake {
    fn drop(&mut self) {
        self.0.borrow_mut().closed = true;
    }
}

impl Stream for Fake {
    fn receive(&mut self, into: &GuestBytes<'_>) -> io::Result<usize> {
        let mut script = self.0.borrow_mut();
        if let Some(error) = script.receive_error {
            return Err(error.into());
        }
        assert_ne!(into.len(), 0, "a receive of nothing looks like an end");
        if script.to_send.is_empty() {
            return if script.has_sent_all { Ok(0) } else { Err(ErrorKind::WouldBlock.into()) };
        }
        let count = script.to_send.len().min(into.len() as usize);
        let bytes: Vec<u8> = script.to_send.drain(..count).collect();
        Ok(into.write(&bytes))
    }

    fn send(&mut self, from: &GuestBytes<'_>) -> io::Result<usize> {
        let mut bytes = vec![0; from.len() as usize];
        from.read(&mut bytes);
        self.send_slice(&bytes)
    }

    fn send_slice(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut script = self.0.borrow_mut();
        if let Some(error) = script.send_error {
            return Err(error.into());
        }
        let count = from.len().min(script.room);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        script.room -= count;
        script.received.extend_from_slice(&from[..count]);
        Ok(count)
    }

    fn shut_down(&mut self, direction: Direction) {
        self.0.borrow_mut().shut.push(direction);
    }
}

/// A connection with both its sides.
struct Bench {
    connection: Connection<Fake>,
    host: Rc<RefCell<Script>>,
    memory: GuestMemoryMmap,
    /// The guest's buffer and count.
    credit: (u32, u32),
}

impl Bench {
    fn new(make: impl FnOnce(Fake) -> Connection<Fake>) -> Self {
        let host = Rc::new(RefCell::new(Script { room: usize::MAX, ..Script::default() }));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40000)]).unwrap();
        Self { connection: make(Fake(host.clone())), host, memory, credit: (10_000, 0) }
    }

    fn requested_unsent() -> Self {
        Self::new(|stream| Connection::from_host(stream, WINDOW, PORTS))
    }

    fn requested() -> Self {
        let mut bench = Self::requested_unsent();
        assert_eq!(bench.fill(), [Op::Request]);
        bench
    }

    fn established() -> Self {
        let request = Header {
            src_port: PORTS.guest,
            dst_port: PORTS.host,
            buf_alloc: 10_000,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        let mut bench = Self::new(|stream| Connection::from_guest(stream, WINDOW, &request));
        assert_eq!(bench.fill(), [Op::Response]);
        bench
    }

    fn closing() -> Self {
        let mut bench = Self::established();
        bench.host.borrow_mut().has_sent_all = true;
        bench.connection.host_ready(HUNG_UP);
        assert_eq!(bench.fill(), [Op::Shutdown]);
        assert!(bench.host.borrow().closed);
        bench
    }

    fn reset() -> Self {
        let mut bench = Self::established();
        bench.connection.reset();
        bench
    }

    fn draining() -> Self {
        let mut bench = Self::established();
        bench.host.borrow_mut().room = 3;
        bench.data(b"abcdef");
        bench.packet(Op::Shutdown, SHUTDOWN_BOTH);
        assert_eq!(bench.fill(), []);
        bench
    }

    fn packet(&mut self, op: Op, flags: u32) {
        self.packet_with(op, flags, b"");
    }

    fn data(&mut self, bytes: &[u8]) {
        self.packet_with(Op::ReadWrite, 0, bytes);
    }

    fn packet_with(&mut self, op: Op, flags: u32, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(0)).unwrap();
        let segments = [Segment { address: GuestAddress(0), length: bytes.len() as u32 }];
        let (buf_alloc, fwd_cnt) = self.credit;
        let header =
            Header { len: bytes.len() as u32, op: op as u16, flags, buf_alloc, fwd_cnt, ..Header::default() };
        self.connection.packet(&header, op, &GuestBytes::new(&self.memory, &segments));
    }

    /// The next packet for the guest, with its payload, in a buffer of 4,000 bytes.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        let segments = [Segment { address: GuestAddress(0x20000), length: 4000 }];
        let header = self.connection.fill(&GuestBytes::new(&self.memory, &segments))?;
        let mut payload = vec![0; header.len as usize];
        self.memory.read_slice(&mut payload, GuestAddress(0x20000)).unwrap();
        Some((header, payload))
    }

    /// Operations of all packets that the guest is sent now.
    fn fill(&mut self) -> Vec<Op> {
        std::iter::from_fn(|| self.next())
            .take(20)
            .map(|(header, _)| Op::from_field(header.op).unwrap())
            .collect()
    }
}

/// What each packet does in each state: packets in answer, whether the connection is over then, and whether the
/// host's socket is closed.
#[test]
fn every_packet_in_every_state() {
    use Op::*;
    type Make = fn() -> Bench;
    type Row = (Op, u32, &'static [Op], bool, bool);
    let table: &[(&str, Make, &[Row])] = &[
        (
            "requested, but not told",
            Bench::requested_unsent,
            &[
                (Request, 0, &[], true, true),
                (Response, 0, &[], true, true),
                (Reset, 0, &[], true, true),
                (Shutdown, SHUTDOWN_BOTH, &[], true, true),
                (ReadWrite, 0, &[], true, true),
                (CreditUpdate, 0, &[Request], false, false),
                (CreditRequest, 0, &[], true, true),
            ],
        ),
        (
            "requested",
            Bench::requested,
            &[
                (Request, 0, &[Reset], true, true),
                (Response, 0, &[], false, false),
                (Reset, 0, &[], true, true),
                (Shutdown, SHUTDOWN_BOTH, &[Reset], true, true),
                (ReadWrite, 0, &[Reset], true, true),
                (CreditUpdate, 0, &[], false, false),
                (CreditRequest, 0, &[Reset], true, true),
            ],
        ),
        (
            "established",
            Bench::established,
            &[
                (Request, 0, &[Reset], true, true),
                (Response, 0, &[Reset], true, true),
                (Reset, 0, &[], true, true),
                (Shutdown, 0, &[], false, false),
                (Shutdown, SHUTDOWN_RECEIVE, &[], false, false),
                (Shutdown, SHUTDOWN_SEND, &[], false, false),
                (Shutdown, SHUTDOWN_BOTH, &[Reset], true, true),
                (Shutdown, u32::MAX, &[Reset], true, true),
                (ReadWrite, 0, &[], false, false),
                (CreditUpdate, 0, &[], false, false),
                (CreditRequest, 0, &[CreditUpdate], false, false),
            ],
        ),
        (
            "closing",
            Bench::closing,
            &[
                (Request, 0, &[Reset], true, true),
                (Response, 0, &[Reset], true, true),
                (Reset, 0, &[], true, true),
                (Shutdown, SHUTDOWN_RECEIVE, &[], false, true),
                (Shutdown, SHUTDOWN_BOTH, &[Reset], true, true),
                (ReadWrite, 0, &[], false, true),
                (CreditUpdate, 0, &[], false, true),
                (CreditRequest, 0, &[CreditUpdate], false, true),
            ],
        ),
        (
            "reset",
            Bench::reset,
            &[
                (Request, 0, &[Reset], true, true),
                (Response, 0, &[Reset], true, true),
                (Reset, 0, &[], true, true),
                (Shutdown, SHUTDOWN_BOTH, &[Reset], true, true),
                (ReadWrite, 0, &[Reset], true, true),
                (CreditUpdate, 0, &[Reset], true, true),
                (CreditRequest, 0, &[Reset], true, true),
            ],
        ),
        (
            "the guest has ended, the host has not taken all",
            Bench::draining,
            &[
                (Request, 0, &[Reset], true, true),
                (Response, 0, &[Reset], true, true),
                (Reset, 0, &[], false, false),
                (Shutdown, SHUTDOWN_BOTH, &[], false, false),
                (ReadWrite, 0, &[Reset], true, true),
                (CreditUpdate, 0, &[], false, false),
                (CreditRequest, 0, &[CreditUpdate], false, false),
            ],
        ),
    ];
    for (state, make, rows) in table {
        for op in Op::ALL {
            assert!(rows.iter().any(|row| row.0 == op), "{state}: {op:?} is missing");
        }
        for (op, flags, answer, over, closed) in *rows {
            let mut bench = make();
            bench.packet(*op, *flags);
            assert_eq!(bench.fill(), *answer, "{state}, {op:?} {flags}");
            assert_eq!(bench.connection.is_over(), *over, "{state}, {op:?} {flags}: over");
            assert_eq!(bench.host.borrow().closed, *closed, "{state}, {op:?} {flags}: closed");
            assert!(!bench.connection.wants_to_send(), "{state}, {op:?} {flags}: wants to send nothing");
        }
    }
}

#[test]
fn the_host_is_told_its_port_once_the_guest_has_accepted() {
    let mut bench = Bench::requested();
    assert_eq!(bench.host.borrow().received, b"");
    bench.packet(Op::Response, 0);
    assert_eq!(bench.host.borrow().received, b"OK 1073741824\n");
    bench.data(b"x");
    assert_eq!(bench.host.borrow().received, b"OK 1073741824\nx");
}

#[test]
fn a_host_that_leaves_before_the_answer_resets() {
    let mut bench = Bench::requested_unsent();
    bench.connection.host_ready(HUNG_UP);
    assert!(bench.connection.is_over(), "the guest never knew");
    let mut bench = Bench::requested();
    bench.connection.host_ready(HUNG_UP);
    assert_eq!(bench.fill(), [Op::Reset]);
    let mut bench = Bench::requested();
    bench.host.borrow_mut().send_error = Some(ErrorKind::BrokenPipe);
    bench.packet(Op::Response, 0);
    assert_eq!(bench.fill(), [Op::Reset]);
}

#[test]
fn data_goes_both_ways() {
    let mut bench = Bench::established();
    bench.data(b"to the host");
    assert_eq!(bench.host.borrow().received, b"to the host");
    bench.host.borrow_mut().to_send.extend(b"to the guest");
    assert_eq!(bench.fill(), [], "nobody said that there is data");
    bench.connection.host_ready(DATA);
    let (header, payload) = bench.next().unwrap();
    assert_eq!((header.op, header.len, payload), (Op::ReadWrite as u16, 12, b"to the guest".to_vec()));
    assert_eq!(
        (header.src_port, header.dst_port, header.buf_alloc, header.fwd_cnt),
        (1 << 30, 52, WINDOW, 11)
    );
    assert_eq!(bench.fill(), []);
}

#[test]
fn the_guest_hears_of_room_when_it_may_have_used_half() {
    let mut bench = Bench::established();
    bench.data(&[1; 499]);
    assert_eq!(bench.fill(), []);
    bench.data(&[1; 1]);
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (Op::CreditUpdate as u16, 500));
    assert_eq!(bench.fill(), []);
}

#[test]
fn what_the_host_does_not_take_is_kept_up_to_the_window() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().room = 100;
    let bytes: Vec<u8> = (0..=255).cycle().take(1100).collect();
    bench.data(&bytes[..600]);
    assert!(bench.connection.wants_room());
    bench.data(&bytes[600..1100]);
    assert_eq!(bench.fill(), [], "the guest has used its window");
    bench.host.borrow_mut().room = 700;
    bench.connection.host_ready(ROOM);
    assert!(bench.connection.wants_room());
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (Op::CreditUpdate as u16, 800));
    // The ring buffer wraps around now.
    let more: Vec<u8> = (7..=255).cycle().take(700).collect();
    bench.data(&more);
    bench.host.borrow_mut().room = usize::MAX;
    bench.connection.host_ready(ROOM);
    assert!(!bench.connection.wants_room());
    assert!(bench.host.borrow().received == [bytes, more].concat());
}

#[test]
fn a_guest_beyond_its_window_is_reset() {
    for (first, second, reset) in [(1000, 0, false), (1001, 0, true), (600, 400, false), (600, 401, true)] {
        let mut bench = Bench::established();
        bench.host.borrow_mut().room = 0;
        bench.data(&vec![0; first]);
        bench.data(&vec![0; second]);
        assert_eq!(bench.fill().contains(&Op::Reset), reset, "{first} + {second}");
    }
    // Even if the host would take it all.
    let mut bench = Bench::established();
    bench.data(&[0; 1001]);
    assert_eq!(bench.fill(), [Op::Reset]);
}

#[test]
fn the_guest_is_sent_no_more_than_its_credit() {
    let mut bench = Bench::established();
    bench.credit = (5000, 0);
    bench.packet(Op::CreditUpdate, 0);
    bench.host.borrow_mut().to_send.extend([7; 6000]);
    bench.connection.host_ready(DATA);
    let lengths = |bench: &mut Bench| -> Vec<(u16, u32)> {
        std::iter::from_fn(|| bench.next()).take(9).map(|(header, _)| (header.op, header.len)).collect()
    };
    assert_eq!(lengths(&mut bench), [(5, 4000), (5, 1000), (Op::CreditRequest as u16, 0)]);
    bench.packet(Op::CreditUpdate, 0);
    assert_eq!(lengths(&mut bench), [], "asking again would only be answered the same");
    bench.credit = (5000, 300);
    bench.packet(Op::CreditUpdate, 0);
    assert_eq!(lengths(&mut bench), [(5, 300), (Op::CreditRequest as u16, 0)]);
    bench.credit = (u32::MAX, 5300);
    bench.packet(Op::CreditUpdate, 0);
    assert_eq!(lengths(&mut bench), [(5, 700)]);
}

#[test]
fn impossible_credit_sends_nothing() {
    for credit in [(0, 0), (100, 1), (u32::MAX - 1, 1), (1 << 31, 1 << 31), (5000, u32::MAX - 5000)] {
        let mut bench = Bench::established();
        bench.credit = credit;
        bench.packet(Op::CreditUpdate, 0);
        bench.host.borrow_mut().to_send.extend([7; 6000]);
        bench.connection.host_ready(DATA);
        assert_eq!(bench.fill(), [], "{credit:?}");
    }
}

#[test]
fn the_hosts_end_of_sending_is_passed_on_after_its_data() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().to_send.extend(b"last");
    bench.host.borrow_mut().has_sent_all = true;
    bench.connection.host_ready(DATA);
    assert_eq!(bench.next().unwrap().1, b"last");
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_SEND));
    bench.data(b"still heard");
    assert_eq!(bench.host.borrow().received, b"still heard");
    bench.packet(Op::Shutdown, SHUTDOWN_SEND);
    // Both directions have ended, but the guest may not know that the host has closed.
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    assert!(bench.host.borrow().closed);
    bench.packet(Op::Reset, 0);
    assert!(bench.connection.is_over());
}

#[test]
fn the_guests_end_of_sending_is_passed_on_after_its_data() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().room = 2;
    bench.data(b"last");
    bench.packet(Op::Shutdown, SHUTDOWN_SEND);
    assert!(bench.host.borrow().shut.is_empty());
    bench.host.borrow_mut().room = 2;
    bench.connection.host_ready(ROOM);
    assert_eq!(
        (&bench.host.borrow().received[..], &bench.host.borrow().shut[..]),
        (&b"last"[..], &[Direction::ToHost][..])
    );
    bench.host.borrow_mut().to_send.extend(b"answer");
    bench.connection.host_ready(DATA);
    assert_eq!(bench.next().unwrap().1, b"answer");
    bench.data(b"x");
    assert_eq!(bench.fill(), [Op::Reset], "data after its end breaks the rules");
}

#[test]
fn a_guest_that_receives_no_more_stops_the_host() {
    let mut bench = Bench::established();
    bench.packet(Op::Shutdown, SHUTDOWN_RECEIVE);
    assert_eq!(bench.host.borrow().shut, [Direction::FromHost]);
    bench.host.borrow_mut().to_send.extend(b"unwanted");
    bench.connection.host_ready(DATA);
    assert_eq!(bench.fill(), []);
    bench.data(b"still heard");
    assert_eq!(bench.host.borrow().received, b"still heard");
    bench.packet(Op::Shutdown, SHUTDOWN_SEND);
    assert_eq!(bench.fill(), [Op::Reset], "ends may come one by one");
}

#[test]
fn a_host_that_takes_no_more_is_told_to_the_guest_and_costs_no_credit() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().room = 0;
    bench.data(&[1; 600]);
    bench.host.borrow_mut().send_error = Some(ErrorKind::BrokenPipe);
    bench.connection.host_ready(ROOM);
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.flags, header.fwd_cnt), (Op::Shutdown as u16, SHUTDOWN_RECEIVE, 600));
    bench.data(&[1; 600]);
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (Op::CreditUpdate as u16, 1200));
    bench.host.borrow_mut().to_send.extend(b"but it still sends");
    bench.connection.host_ready(DATA);
    assert_eq!(bench.next().unwrap().1, b"but it still sends");
}

#[test]
fn a_guest_hears_that_the_host_takes_no_more_before_more_of_its_data() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().to_send.extend([7; 9000]);
    bench.connection.host_ready(DATA);
    bench.host.borrow_mut().send_error = Some(ErrorKind::BrokenPipe);
    bench.data(b"unwanted");
    assert_eq!(bench.fill(), [Op::Shutdown, Op::ReadWrite, Op::ReadWrite, Op::ReadWrite]);
}

#[test]
fn a_host_that_hangs_up_is_heard_to_the_end() {
    let mut bench = Bench::established();
    bench.credit = (3, 0);
    bench.packet(Op::CreditUpdate, 0);
    bench.host.borrow_mut().to_send.extend(b"last");
    bench.host.borrow_mut().has_sent_all = true;
    bench.connection.host_ready(HUNG_UP);
    assert_eq!(bench.next().unwrap().1, b"las");
    assert_eq!(bench.fill(), [Op::CreditRequest]);
    bench.credit = (3, 3);
    bench.packet(Op::CreditUpdate, 0);
    assert_eq!(bench.next().unwrap().1, b"t");
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    assert!(bench.host.borrow().closed && bench.connection.awaits_guest());
}

#[test]
fn a_host_that_breaks_off_resets() {
    let mut bench = Bench::established();
    bench.host.borrow_mut().receive_error = Some(ErrorKind::ConnectionReset);
    bench.connection.host_ready(DATA);
    assert_eq!(bench.fill(), [Op::Reset]);
    assert!(bench.connection.is_over());
}

#[test]
fn data_outlives_a_guest_that_has_ended_in_order() {
    let mut bench = Bench::draining();
    bench.packet(Op::Reset, 0);
    assert!(bench.connection.is_abandoned());
    bench.host.borrow_mut().room = 10;
    bench.connection.host_ready(ROOM);
    assert_eq!(bench.host.borrow().received, b"abcdef");
    assert!(bench.connection.is_over() && bench.host.borrow().closed);
    // ...and ends with the host.
    let mut bench = Bench::draining();
    bench.packet(Op::Reset, 0);
    bench.connection.host_ready(HUNG_UP);
    assert!(bench.connection.is_over());
    // A guest that waits is answered when all is written.
    let mut bench = Bench::draining();
    bench.host.borrow_mut().room = 10;
    bench.connection.host_ready(ROOM);
    assert_eq!(bench.fill(), [Op::Reset]);
}

#[test]
fn a_guest_that_owes_an_answer_is_given_up() {
    for make in [Bench::requested, Bench::closing] {
        let mut bench = make();
        for _ in 1..PATIENCE {
            bench.connection.tick();
        }
        assert_eq!(bench.fill(), []);
        bench.connection.tick();
        assert_eq!(bench.fill(), [Op::Reset]);
        assert!(bench.connection.is_over() && bench.host.borrow().closed);
    }
    let mut bench = Bench::established();
    (0..1000).for_each(|_| bench.connection.tick());
    assert_eq!(bench.fill(), [], "only those that owe one");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever both sides do in whatever order, buffers stay within the window, the guest within its credit,
    /// and what the host receives is what the guest sent, from the start and without a gap.
    #[test]
    fn any_sequence_keeps_the_bounds(steps in prop::collection::vec((0..14_u8, any::<u16>()), 0..200)) {
        let mut bench = Bench::established();
        bench.host.borrow_mut().room = 0;
        let mut sent = Vec::new();
        let mut counter = 0_u8;
        for (step, value) in steps {
            match step {
                0..=3 => {
                    let bytes: Vec<u8> = (0..value % 400).map(|_| { counter = counter.wrapping_add(1); counter }).collect();
                    bench.data(&bytes);
                    sent.extend(bytes);
                }
                4 | 5 => {
                    bench.host.borrow_mut().room += usize::from(value % 800);
                    bench.connection.host_ready(ROOM);
                }
                6 => {
                    bench.host.borrow_mut().to_send.extend(vec![0; usize::from(value % 5000)]);
                    bench.connection.host_ready(DATA);
                }
                7 => { bench.credit = (u32::from(value), bench.credit.1.wrapping_add(u32::from(value % 4096))); }
                8 => bench.packet(Op::from_field(value % 7 + 1).unwrap(), u32::from(value >> 8)),
                9 if value % 8 == 0 => { bench.host.borrow_mut().has_sent_all = true; bench.connection.host_ready(HUNG_UP); }
                10 => bench.connection.tick(),
                11 if value % 8 == 0 => { bench.host.borrow_mut().send_error = Some(ErrorKind::BrokenPipe); }
                _ => { let _ = bench.next(); }
            }
            let host = bench.host.borrow();
            prop_assert!(sent.starts_with(&host.received));
            prop_assert!(bench.connection.buffered() <= WINDOW as usize);
        }
    }
}
