//! Talks to the host by vsock, as the command line's `mode=` says:
//!
//! | mode | what |
//! |---|---|
//! | `together` | opens `count=N` connections to port 5000 of the host, talks on all, then closes all; `then=N` does that one by one |
//! | `each` | opens, uses and closes `count=N` connections to port 5000 of the host, one after the other |
//! | `serve` | takes connections of the host until `count=N` have been closed |
//! | `send`, `receive` | one connection to port 5000 and `mib=N` MiB on it |
//!
//! To talk is to send eight bytes and to get them back. In a stream every 4 KiB begin with their own offset.
//! With `stall=1` a stream that gets no credit for some time says so and goes on for good. Prints
//! "A answered, R refused" or "BYTES bytes"; exits with 0, or with 1 if data was wrong or the other side stopped.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{MIB, PAGE_SIZE};
use cofferdam_payloads::cpu::delay;
use cofferdam_payloads::socket::{HEADER, Packet, Shape, Socket, op};
use cofferdam_payloads::virtio::Device;
use cofferdam_payloads::{entry, payload, println, ram};

payload!(main);

const VSOCK: u32 = 19;
/// Ports of the host, and of the guest's first connection.
const HOST_PORT: u32 = 5000;
const GUEST_PORT: u32 = 100_000;
/// What is said on a connection, bytes.
const WORD: u32 = 8;
/// "No more data in either direction".
const BOTH: u32 = 3;
/// Packets that are queued before the device is told.
const BATCH: u32 = 16;
/// Bytes of a stream's packets: a whole number of pages that fits a large buffer.
const PIECE: u32 = 60 << 10;
/// Buffer for a stream that the driver claims to have.
const WINDOW: u32 = 1 << 20;
/// How often to look for a packet, with a delay between: minutes, as the host's other CPUs may be busy.
const PATIENCE: u32 = 100_000_000;
/// The same where none is expected any more: a moment.
const STALL: u32 = 30_000;

fn main() -> u8 {
    let count = entry::number("count").unwrap_or(1) as u32;
    let bytes = entry::number("mib").unwrap_or(1) * MIB;
    let Some(device) = Device::find(VSOCK) else { return 2 };
    let mode = entry::option("mode").unwrap_or_default();
    let shape = if matches!(mode, b"send" | b"receive") { Shape::LARGE } else { Shape::SMALL };
    let mut socket = Socket::start_with(device, ram::START, shape.slots, shape);
    let good = match mode {
        b"together" => {
            let then = entry::number("then").unwrap_or(0) as u32;
            connections(&mut socket, GUEST_PORT, count).report() && (then == 0 || each(&mut socket, then))
        }
        b"each" => each(&mut socket, count),
        b"serve" => serve(&mut socket, count),
        b"send" => send(&mut socket, bytes),
        b"receive" => receive(&mut socket, bytes),
        _ => false,
    };
    u8::from(!good)
}

/// How many connections worked.
#[derive(Default)]
struct Answers {
    answered: u32,
    refused: u32,
    faults: u32,
}

impl Answers {
    fn report(self) -> bool {
        println!("{} answered, {} refused", self.answered, self.refused);
        self.faults == 0
    }
}

impl core::iter::Sum for Answers {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            answered: sum.answered + one.answered,
            refused: sum.refused + one.refused,
            faults: sum.faults + one.faults,
        })
    }
}

/// Opens, uses and closes `count` connections, one after the other.
fn each(socket: &mut Socket, count: u32) -> bool {
    (0..count).map(|index| connections(socket, GUEST_PORT + index, 1)).sum::<Answers>().report()
}

/// The next packet but for news of credit, within minutes; and the first word of its payload.
fn next(socket: &mut Socket) -> Option<(Packet, u64)> {
    for _ in 0..PATIENCE {
        match socket.poll_with(|_, payload| word_at(payload)) {
            Some((packet, _)) if packet.op == op::CREDIT_UPDATE => socket.kick_rx(),
            Some(found) => {
                socket.kick_rx();
                return Some(found);
            }
            None => delay(),
        }
    }
    println!("no packet comes");
    None
}

/// Payloads lie 44 bytes behind the start of a slot, so words are of four bytes there.
fn word_at(address: u64) -> u64 {
    u64::from(ram::read_u32(address)) | u64::from(ram::read_u32(address + 4)) << 32
}

fn put_word(address: u64, word: u64) {
    ram::write_u32(address, word as u32);
    ram::write_u32(address + 4, (word >> 32) as u32);
}

/// Queues `packet` with `word` as its payload, if it has one.
fn say(socket: &mut Socket, packet: &Packet, word: u64) -> bool {
    if packet.len != 0 {
        put_word(socket.tx_slot(socket.next_slot()) + u64::from(HEADER), word);
    }
    socket.queue(packet, packet.len)
}

/// Opens, uses and closes the connections of `count` ports of the guest, all at once.
fn connections(socket: &mut Socket, first: u32, count: u32) -> Answers {
    let ports = || first..first + count;
    let mut answers = Answers::default();
    // Which ones were refused is not kept: all are talked to, and those answer by RST again.
    for step in [op::REQUEST, op::RW, op::SHUTDOWN] {
        let (mut waiting, mut to_send) = (0, ports().peekable());
        while to_send.peek().is_some() || waiting > 0 {
            let mut queued = 0;
            while queued < BATCH
                && let Some(&port) = to_send.peek()
            {
                let mut packet = Packet::new(port, HOST_PORT, step);
                packet.len = if step == op::RW { WORD } else { 0 };
                packet.flags = if step == op::SHUTDOWN { BOTH } else { 0 };
                if !say(socket, &packet, u64::from(port)) {
                    break;
                }
                to_send.next();
                queued += 1;
            }
            waiting += queued;
            socket.kick();
            let Some((packet, word)) = next(socket) else {
                answers.faults += 1;
                return answers;
            };
            waiting -= 1;
            match (step, packet.op) {
                (op::REQUEST, op::RST) => answers.refused += 1,
                (op::REQUEST, op::RESPONSE) | (op::RW, op::RST) | (op::SHUTDOWN, op::RST) => {}
                (op::RW, op::RW) if word == u64::from(packet.dst_port) && packet.len == WORD => {
                    answers.answered += 1
                }
                _ => {
                    println!("{step} was answered by {packet:?}");
                    answers.faults += 1;
                }
            }
        }
    }
    answers
}

/// Serves connections of the host, until `count` have been closed.
fn serve(socket: &mut Socket, count: u32) -> bool {
    println!("ready");
    let (mut closed, mut answered) = (0, 0);
    while closed < count {
        let Some((packet, word)) = next(socket) else { return false };
        let answer = match packet.op {
            op::REQUEST => op::RESPONSE,
            op::RW => op::RW,
            op::SHUTDOWN => op::RST,
            _ => continue,
        };
        let mut reply = Packet::new(packet.dst_port, packet.src_port, answer);
        (answered, closed) = (answered + u32::from(answer == op::RW), closed + u32::from(answer == op::RST));
        reply.len = if answer == op::RW { packet.len } else { 0 };
        while !say(socket, &reply, word) {
            delay();
        }
        socket.kick();
    }
    println!("{answered} answered, 0 refused");
    answered == count
}

/// Sends `bytes`, as fast as the host gives credit.
fn send(socket: &mut Socket, bytes: u64) -> bool {
    if !socket.connect(GUEST_PORT, HOST_PORT) {
        return false;
    }
    // The answer told the window, but `connect` keeps that for itself: so ask.
    let (mut sent, mut window, mut consumed) = (0_u64, 0_u32, 0_u32);
    socket.send(&Packet::new(GUEST_PORT, HOST_PORT, op::CREDIT_REQUEST), 0);
    let (mut idle, patience) = (0, if entry::option("stall").is_some() { STALL } else { PATIENCE });
    while sent < bytes {
        while let Some(news) = socket.poll() {
            (window, consumed, idle) = (news.buf_alloc, news.fwd_cnt, 0);
            socket.kick_rx();
            if news.op == op::RST {
                println!("reset after {sent} bytes");
                return false;
            }
        }
        let length = u64::from(PIECE).min(bytes - sent) as u32;
        let credit = window.saturating_sub((sent as u32).wrapping_sub(consumed));
        let payload = socket.tx_slot(socket.next_slot()) + u64::from(HEADER);
        let mut packet = Packet::new(GUEST_PORT, HOST_PORT, op::RW);
        packet.len = length;
        if credit < length || !stamped(socket, &packet, payload, sent) {
            idle += 1;
            if idle == patience {
                println!("no credit after {sent} bytes");
                if patience == PATIENCE {
                    return false;
                }
            }
            delay();
            continue;
        }
        socket.kick();
        sent += u64::from(length);
    }
    let mut end = Packet::new(GUEST_PORT, HOST_PORT, op::SHUTDOWN);
    end.flags = BOTH;
    socket.send(&end, 0);
    while next(socket).is_some_and(|(packet, _)| packet.op != op::RST) {}
    println!("{sent} bytes");
    true
}

/// Queues `packet`, each page of whose payload begins with its offset in the stream.
fn stamped(socket: &mut Socket, packet: &Packet, payload: u64, offset: u64) -> bool {
    (0..u64::from(packet.len)).step_by(PAGE_SIZE as usize).for_each(|at| put_word(payload + at, offset + at));
    socket.queue(packet, packet.len)
}

/// Receives `bytes` and looks at the start of each of their pages.
fn receive(socket: &mut Socket, bytes: u64) -> bool {
    let mut update = Packet::new(GUEST_PORT, HOST_PORT, op::REQUEST);
    update.buf_alloc = WINDOW;
    socket.send(&update, 0);
    update.op = op::CREDIT_UPDATE;
    let (mut received, mut told, mut wrong, mut idle) = (0_u64, 0_u64, 0_u32, 0);
    while received < bytes && idle < PATIENCE {
        let polled = socket.poll_with(|packet, payload| wrong_pages(packet, payload, received));
        let Some((packet, wrong_here)) = polled else {
            idle += 1;
            delay();
            continue;
        };
        idle = 0;
        if packet.op == op::RST {
            break;
        }
        wrong += wrong_here;
        received += u64::from(packet.len);
        socket.kick_rx();
        if received - told >= u64::from(WINDOW / 4) {
            update.fwd_cnt = received as u32;
            socket.send(&update, 0);
            told = received;
        }
    }
    println!("{received} bytes, {wrong} wrong");
    wrong == 0 && received == bytes
}

/// How many pages of a packet at `offset` of the stream do not begin with their own offset. Packets may end anywhere:
/// a word that is not whole and aligned is not looked at.
fn wrong_pages(packet: &Packet, payload: u64, offset: u64) -> u32 {
    let end = offset + u64::from(packet.len);
    let pages = (offset.next_multiple_of(PAGE_SIZE)..end).step_by(PAGE_SIZE as usize);
    let whole =
        pages.filter(|page| page + u64::from(WORD) <= end && (payload + page - offset).is_multiple_of(4));
    whole.filter(|page| word_at(payload + page - offset) != *page).count() as u32
}
