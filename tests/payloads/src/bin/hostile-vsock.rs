//! Sends what no socket sends, and floods: what is in `case=NAME`. See `hostile.rs`.
//!
//! Vsock is in slot 2, a bystanding drive in slot 0. On the host, programs listen on ports [`SILENT`], [`CROWDED`] and
//! [`AS_CROWDED`] and do nothing, and on [`EAGER`], where each connection is sent data at once.
#![no_std]
#![no_main]

use cofferdam_payloads::cpu::delay;
use cofferdam_payloads::disk::{self, Disk};
use cofferdam_payloads::hostile::{checkpoint, choose, expect_needs_reset};
use cofferdam_payloads::socket::{self, HEADER, Packet, SLOTS, Socket, op};
use cofferdam_payloads::virtio::{Device, flag, register, status};
use cofferdam_payloads::{payload, println, ram};

payload!(main);

const BYSTANDER: u8 = 0xA1;
const SILENT: u32 = 7;
const CROWDED: u32 = 9;
const EAGER: u32 = 10;
const AS_CROWDED: u32 = 11;
/// Most connections that there can be.
const LIMIT: u32 = 4096;
/// A port of the host that nobody serves.
const NOBODY: u32 = 99;
const PORT_ANY: u32 = u32::MAX;
const MAX_PAYLOAD: u32 = 64 << 10;

const DISK: u64 = ram::START;
const SOCKET: u64 = DISK + disk::LENGTH;

type Attack = fn(&mut Socket);

const CASES: &[(&str, Attack)] = &[
    ("lengths", lengths),
    ("addresses", addresses),
    ("operations", operations),
    ("credit-overrun", credit_overrun),
    ("credit-extremes", credit_extremes),
    ("chains", chains),
    ("connection-flood", connection_flood),
    ("connections-in-turn", connections_in_turn),
    ("packet-flood", packet_flood),
    ("notification-flood", notification_flood),
    ("resets", resets),
];

fn main() -> u8 {
    let attack = choose(CASES);
    let mut bystander = Disk::new(Device::at(0), DISK, 8);
    bystander.start(u64::MAX);
    assert_eq!(bystander.first_byte(), Some(BYSTANDER), "before");
    let mut socket = start();
    assert!(socket.connect(1, SILENT), "before");
    checkpoint("ready");
    attack(&mut socket);
    assert_eq!(bystander.first_byte(), Some(BYSTANDER), "the drive works");
    let mut socket = start();
    assert!(socket.connect(1, SILENT), "after a reset vsock works again");
    checkpoint("done");
    0
}

fn start() -> Socket {
    Socket::start(device(), SOCKET, SLOTS)
}

fn device() -> Device {
    Device::at(2)
}

/// The next packet is an RST for the connection of these ports.
fn expect_reset(socket: &mut Socket, guest: u32, host: u32, what: &str) {
    let answer = socket.receive();
    let fits = answer.is_some_and(|a| (a.op, a.src_port, a.dst_port) == (op::RST, host, guest));
    assert!(fits, "{what}: {answer:?}");
}

/// A payload longer than its packet, or than any may be.
fn lengths(socket: &mut Socket) {
    for (len, payload) in
        [(1, 0), (101, 100), (MAX_PAYLOAD + 1, MAX_PAYLOAD + 1), (1 << 31, 100), (u32::MAX, 100)]
    {
        assert!(socket.connect(1000, SILENT));
        socket.send(&Packet { len, ..Packet::new(1000, SILENT, op::RW) }, payload);
        expect_reset(socket, 1000, SILENT, "an impossible length");
        let request = Packet { len, ..Packet::new(1000, SILENT, op::REQUEST) };
        socket.send(&request, payload);
        if len == MAX_PAYLOAD + 1 || payload < len {
            expect_reset(socket, 1000, SILENT, "a request of impossible length");
        }
    }
}

/// From and to whom there is nobody.
fn addresses(socket: &mut Socket) {
    let request = Packet::new(1000, SILENT, op::REQUEST);
    for (guest, host) in [(PORT_ANY, SILENT), (1000, PORT_ANY), (PORT_ANY, PORT_ANY), (1000, NOBODY), (0, 0)]
    {
        socket.send(&Packet::new(guest, host, op::REQUEST), 0);
        expect_reset(socket, guest, host, "a port that cannot be");
    }
    for cid in [0, 1, socket::HOST, 4, socket::GUEST | 1 << 32, u64::MAX] {
        socket.send(&Packet { src_cid: cid, ..request }, 0);
        assert!(socket.is_quiet(), "from {cid:#x}");
    }
    for cid in [0, 1, socket::GUEST, 4, socket::HOST | 1 << 32, u64::MAX] {
        socket.send(&Packet { dst_cid: cid, ..request }, 0);
        assert!(socket.is_quiet(), "to {cid:#x}");
    }
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
        socket.send(&Packet::new(1000, SILENT, op), 0);
        expect_reset(socket, 1000, SILENT, "no such connection");
    }
    socket.send(&Packet::new(1000, SILENT, op::RST), 0);
    assert!(socket.is_quiet(), "an RST has no answer");
}

/// Operations and types that there are not, or not now.
fn operations(socket: &mut Socket) {
    let data = Packet::new(1000, SILENT, op::RW);
    for bad in [
        Packet { op: 0, ..data },
        Packet { op: 8, ..data },
        Packet { op: u16::MAX, ..data },
        Packet { op: op::REQUEST, ..data },
        Packet { op: op::RESPONSE, ..data },
        Packet { op: op::SHUTDOWN, flags: u32::MAX, ..data },
    ] {
        assert!(socket.connect(1000, SILENT));
        socket.send(&bad, 0);
        expect_reset(socket, 1000, SILENT, "a wrong operation");
    }
    for kind in [0, 2, u16::MAX] {
        socket.send(&Packet { kind, ..Packet::new(1000, SILENT, op::REQUEST) }, 0);
        expect_reset(socket, 1000, SILENT, "a wrong type");
    }
}

/// Data beyond what the other side has room for.
fn credit_overrun(socket: &mut Socket) {
    assert!(socket.connect(1000, SILENT));
    let data = Packet { len: MAX_PAYLOAD, ..Packet::new(1000, SILENT, op::RW) };
    let reset = |answer: Packet| answer.op == op::RST;
    let early = (0..64).any(|_| {
        socket.send(&data, MAX_PAYLOAD);
        socket.poll().is_some_and(reset)
    });
    // What it says of its credit comes first.
    assert!(early || core::iter::from_fn(|| socket.receive()).any(reset), "the connection goes on");
}

/// The guest's own credit at its extremes: never more data than that.
fn credit_extremes(socket: &mut Socket) {
    for (buf_alloc, fwd_cnt) in [(0, 0), (1, 0), (1000, 0), (1, 1), (u32::MAX, u32::MAX), (0, u32::MAX)] {
        let credit = u64::from(buf_alloc.saturating_sub(0_u32.wrapping_sub(fwd_cnt)));
        let request = Packet { buf_alloc, fwd_cnt, ..Packet::new(1000, EAGER, op::REQUEST) };
        socket.send(&request, 0);
        assert_eq!(socket.receive().map(|answer| answer.op), Some(op::RESPONSE));
        let mut data = 0;
        let mut count = |packet: Packet| {
            let goes_on = matches!(packet.op, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST);
            assert!(goes_on, "{packet:?} for {buf_alloc:#x} {fwd_cnt:#x}");
            data += u64::from(packet.len);
            assert!(data <= credit, "{data} bytes for {credit}");
            data
        };
        if credit > 0 {
            (0..SLOTS).all(|_| socket.receive().is_some_and(|packet| count(packet) < credit));
        }
        // Time for what should not come.
        (0..500).for_each(|_| delay());
        while let Some(packet) = socket.poll() {
            count(packet);
        }
        println!("credit {credit} data {data}");
        // Whatever is still under way goes down with the device.
        *socket = start();
    }
}

/// Chains that hold no packet.
fn chains(_: &mut Socket) {
    let breaks: [Attack; 8] = [
        |s| transmit(s, s.tx_slot(0), HEADER - 1, 0),
        |s| transmit(s, s.tx_slot(0), HEADER, flag::WRITE),
        |s| transmit(s, u64::MAX - 20, HEADER, 0),
        |s| transmit(s, s.tx_slot(0), u32::MAX, 0),
        |s| transmit(s, s.tx_slot(0), HEADER, flag::NEXT),
        |s| receive(s, s.tx_slot(0), HEADER, flag::WRITE),
        |s| receive(s, s.tx_slot(0), 4096, 0),
        |s| receive(s, 0xF000_0000, 4096, flag::WRITE),
    ];
    for break_it in breaks {
        let mut socket = Socket::start(device(), SOCKET, 0);
        break_it(&mut socket);
        expect_needs_reset(&socket.device);
    }
    // One queue of two.
    assert!(device().negotiate(u64::MAX).is_some());
    let queue = cofferdam_payloads::virtio::Queue::new(SOCKET, SLOTS);
    device().set_up(0, &queue);
    device().add_status(status::DRIVER_OK);
    expect_needs_reset(&device());
}

/// Transmits a chain of one descriptor, whose next one is itself.
fn transmit(socket: &mut Socket, address: u64, length: u32, flags: u16) {
    socket.tx.describe(0, address, length, flags, 0);
    socket.tx.offer(0);
    socket.kick();
}

/// Offers a buffer to receive into, and has something sent.
fn receive(socket: &mut Socket, address: u64, length: u32, flags: u16) {
    socket.rx.describe(0, address, length, flags, 0);
    socket.rx.offer(0);
    socket.kick_rx();
    socket.send(&Packet::new(1000, NOBODY, op::CREDIT_UPDATE), 0);
}

/// What became of requests.
#[derive(Debug, Default)]
struct Answers {
    accepted: u32,
    refused: u32,
}

impl Answers {
    fn count(&mut self, packet: Option<Packet>) {
        assert!(packet.is_some(), "an answer is missing: {self:?}");
        match packet.map(|packet| packet.op) {
            Some(op::RESPONSE) => self.accepted += 1,
            Some(op::RST) => self.refused += 1,
            _ => {}
        }
    }
}

/// More connections than there can be, all at once: each is accepted or reset.
fn connection_flood(socket: &mut Socket) {
    const REQUESTS: u32 = LIMIT + 500;
    let mut answers = Answers::default();
    for port in 0..REQUESTS {
        // So many that the backlog of one program would not hold them.
        let host = if port.is_multiple_of(2) { CROWDED } else { AS_CROWDED };
        let request = Packet::new(10_000 + port, host, op::REQUEST);
        while !socket.queue(&request, 0) {
            socket.kick();
            answers.count(socket.receive());
        }
    }
    socket.kick();
    while answers.accepted + answers.refused < REQUESTS {
        answers.count(socket.receive());
    }
    println!("{answers:?}");
    assert!(answers.accepted > 0 && answers.accepted <= LIMIT);
    checkpoint("crowded");
}

fn connections_in_turn(socket: &mut Socket) {
    for _ in 0..1000 {
        assert!(socket.connect(1000, CROWDED));
        socket.send(&Packet::new(1000, CROWDED, op::RST), 0);
    }
    assert!(socket.is_quiet());
}

/// Packets that each ask for an answer, from a guest that has no place for any: all are taken, and so many answers are kept.
fn packet_flood(socket: &mut Socket) {
    const KEPT: u32 = 4096;
    const FLOOD: u32 = KEPT + 1000;
    *socket = Socket::start(device(), SOCKET, 0);
    (0..FLOOD).for_each(|port| socket.send(&Packet::new(port, NOBODY, op::CREDIT_UPDATE), 0));
    (0..SLOTS).for_each(|slot| socket.offer_buffer(slot));
    socket.kick_rx();
    (0..KEPT).for_each(|port| expect_reset(socket, port, NOBODY, "each has its answer"));
    // Those that were still in the queue when there was room again have theirs too.
    socket.send(&Packet::new(FLOOD, NOBODY, op::CREDIT_UPDATE), 0);
    let mut late = 0;
    loop {
        let answer = socket.receive();
        assert!(answer.is_some(), "an answer is missing");
        if answer.is_none_or(|answer| answer.dst_port == FLOOD) {
            break;
        }
        late += 1;
    }
    assert!(late < FLOOD - KEPT, "answers are kept without bound");
    println!("{late} answers came late");
}

fn notification_flood(socket: &mut Socket) {
    for _ in 0..5000 {
        for queue in [0, 1, 2, 3, u32::MAX] {
            socket.device.notify(queue);
        }
    }
    assert!(socket.connect(1000, SILENT), "it still works");
}

/// Resets with connections in every state.
fn resets(socket: &mut Socket) {
    for _ in 0..30 {
        for port in 0..20 {
            assert!(socket.queue(&Packet::new(1000 + port, CROWDED, op::REQUEST), 0));
            assert!(socket.queue(&Packet { len: 400, ..Packet::new(1000 + port, CROWDED, op::RW) }, 400));
        }
        socket.kick();
        device().write(register::STATUS, 0);
        *socket = start();
    }
}
