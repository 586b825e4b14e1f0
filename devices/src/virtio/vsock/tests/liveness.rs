//! Nothing is lost and nothing stands still, whoever waits for whom.
//!
//! Everybody here sleeps whenever they may: the guest notifies a queue only if the device asked for it, looks at used
//! buffers only after an interrupt, and sends credit as seldom as Linux does; the device runs only when it was notified
//! or its descriptor is readable.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, Socket, op};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Ring;
use crate::virtio::vsock::packet::{HEADER_LEN, Header, Op, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Port on which a program of the host listens, and one on which the guest does.
const PROGRAM: u32 = 7;
const GUEST: u32 = 52;
/// Turns in which a world without a lost wake-up has long come to rest, beside one for each byte.
const TURNS: usize = 20_000;

/// Byte `index` of every stream.
fn byte(index: usize) -> u8 {
    (index % 251) as u8
}

fn bytes(from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(byte).collect()
}

/// Whether a side that went from `old` to `new` must tell the other, which asked to hear of `event` (virtio 1.2, 2.7.10).
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// One connection: the guest's socket and program, and the program of the host.
struct Pair {
    socket: Socket,
    /// The guest's socket is connected.
    open: bool,
    /// Bytes that the guest's program has written, and wants to be its last ones.
    to_send: usize,
    ends: bool,
    told_end: bool,
    /// Bytes that came for the guest, those its program has read, and those that the host knows of.
    came: usize,
    read: usize,
    told: usize,
    /// Directions that the host has ended.
    host_ended: u32,
    reset: bool,
    program: UnixStream,
    /// Bytes that it has to write, has written, and has read.
    to_write: usize,
    written: usize,
    received: usize,
    program_ends: bool,
    has_ended: bool,
    at_end: bool,
}

impl Pair {
    fn new(program: UnixStream, ports: Ports, buf_alloc: u32) -> Self {
        program.set_nonblocking(true).unwrap();
        Self {
            socket: Socket { buf_alloc, ..Socket::new(ports.guest, ports.host) },
            open: false,
            to_send: 0,
            ends: false,
            told_end: false,
            came: 0,
            read: 0,
            told: 0,
            host_ended: 0,
            reset: false,
            program,
            to_write: 0,
            written: 0,
            received: 0,
            program_ends: false,
            has_ended: false,
            at_end: false,
        }
    }

    /// The host's program writes what it can.
    fn write(&mut self) -> bool {
        let mut moved = false;
        while self.written < self.to_write {
            let count = (self.to_write - self.written).min(0x1_0000);
            match self.program.write(&bytes(self.written, count)) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return moved,
                Err(error) => panic!("{error}"),
            }
            moved = true;
        }
        if self.program_ends && !std::mem::replace(&mut self.has_ended, true) {
            self.program.shutdown(Shutdown::Write).unwrap();
            moved = true;
        }
        moved
    }

    /// The host's program reads up to `most` bytes.
    fn read(&mut self, skip: &mut usize, most: usize) -> bool {
        let mut data = vec![0; most];
        match self.program.read(&mut data) {
            Ok(0) => !std::mem::replace(&mut self.at_end, true),
            Ok(count) => {
                // Of the host's connection the line comes first.
                let line = count.min(*skip);
                *skip -= line;
                assert!(
                    data[line..count] == bytes(self.received, count - line),
                    "other bytes than were sent"
                );
                self.received += count - line;
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }
}

struct World {
    driver: Driver,
    pairs: Vec<Pair>,
    /// Bytes of the line that the host's program reads before the stream, by pair.
    lines: Vec<usize>,
    _listener: UnixListener,
    /// Packets that wait for room in the transmit queue.
    backlog: VecDeque<(Header, Vec<u8>)>,
    /// Chains that may be under way, and those that are as far as the guest knows.
    slots: u16,
    transmitted: u16,
    done: u16,
    /// Receive buffers that the guest has taken and not given back.
    taken: Vec<u16>,
    seen: u16,
    edges: usize,
    buffer_len: u32,
}

impl World {
    /// Two connections: one of the guest's, and one of a program's.
    fn new(buffers: u16, buffer_len: u32, slots: u16, buf_alloc: u32) -> Self {
        let mut driver = Driver::without_buffers(buffer_len);
        let listener = driver.listen(PROGRAM);
        let mut caller = driver.connect();
        writeln!(caller, "CONNECT {GUEST}").unwrap();
        driver.refill = false;
        let mut world = Self {
            driver,
            pairs: Vec::new(),
            lines: vec![0, "OK 1073741824\n".len()],
            _listener: listener,
            backlog: VecDeque::new(),
            slots,
            transmitted: 0,
            done: 0,
            taken: (0..buffers).collect(),
            seen: 0,
            edges: 0,
            buffer_len,
        };
        world.refill();
        let ports = Ports { host: PROGRAM, guest: 1000 };
        world.transmit(Socket { buf_alloc, ..Socket::new(1000, PROGRAM) }.header(Op::Request), Vec::new());
        let program = world._listener.accept().unwrap().0;
        world.pairs.push(Pair::new(program, ports, buf_alloc));
        world.pairs.push(Pair::new(caller, Ports { host: 1 << 30, guest: GUEST }, buf_alloc));
        world
    }

    /// Adds to a ring by `add`, and notifies the device if it wants that.
    fn add(&mut self, index: u16, add: impl FnOnce(&mut Self)) {
        let ring = |world: &Self, at: fn(&Ring) -> u64, offset: u64| {
            let ring = if index == 0 { &world.driver.rx } else { &world.driver.tx };
            ring.u16(at(ring) + offset)
        };
        let old = ring(self, Ring::available, 2);
        add(self);
        let new = ring(self, Ring::available, 2);
        if crosses(ring(self, Ring::used, 4 + 256 * 8), new, old) {
            self.driver.device.notify(index);
        }
    }

    fn refill(&mut self) {
        self.add(0, |world| {
            for index in std::mem::take(&mut world.taken) {
                let address = 0x200_0000 + u64::from(index) * 0x1_1000;
                world.driver.rx.offer_chain(index, &[(address, world.buffer_len, true)]);
            }
        });
    }

    fn transmit(&mut self, header: Header, payload: Vec<u8>) {
        self.backlog.push_back((header, payload));
        self.pump();
    }

    fn pump(&mut self) {
        self.add(1, |world| {
            while world.transmitted.wrapping_sub(world.done) < world.slots
                && let Some((header, payload)) = world.backlog.pop_front()
            {
                assert!(world.driver.queue(&header, &payload));
                world.transmitted = world.transmitted.wrapping_add(1);
            }
        });
    }

    /// The guest's interrupt handler, if there was an interrupt.
    fn interrupted(&mut self) -> bool {
        let edges = self.driver.line.edges();
        if std::mem::replace(&mut self.edges, edges) == edges {
            return false;
        }
        loop {
            self.done = self.driver.tx.u16(self.driver.tx.used() + 2);
            self.pump();
            while self.seen != self.driver.rx.u16(self.driver.rx.used() + 2) {
                self.take_one();
            }
            // Before it sleeps it asks to hear of more, and looks again.
            for (ring, index) in [(&self.driver.rx, self.seen), (&self.driver.tx, self.done)] {
                ring.write(ring.available() + 4 + 256 * 2, &index.to_le_bytes());
            }
            let used = |ring: &Ring| ring.u16(ring.used() + 2);
            if (used(&self.driver.rx), used(&self.driver.tx)) == (self.seen, self.done) {
                return true;
            }
        }
    }

    fn take_one(&mut self) {
        let entry = self.driver.rx.used() + 4 + u64::from(self.seen % 256) * 8;
        let field = |offset| self.driver.memory.read_obj::<u32>(GuestAddress(entry + offset)).unwrap();
        let (index, length) = (field(0), field(4));
        let mut data = vec![0; length as usize];
        let address = 0x200_0000 + u64::from(index) * 0x1_1000;
        self.driver.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        self.taken.push(index as u16);
        let payload = data.split_off(HEADER_LEN as usize);
        self.packet(&Header::parse(&data.try_into().unwrap()), &payload);
    }

    fn packet(&mut self, header: &Header, payload: &[u8]) {
        let index = usize::from(header.dst_port == GUEST);
        let pair = &mut self.pairs[index];
        assert_eq!((header.dst_port, header.src_port), (pair.socket.ports.guest, pair.socket.ports.host));
        pair.socket.peer = (header.buf_alloc, header.fwd_cnt);
        match op(header) {
            Op::Request => {
                pair.open = true;
                let answer = pair.socket.header(Op::Response);
                self.transmit(answer, Vec::new());
            }
            Op::Response => pair.open = true,
            Op::ReadWrite => {
                assert!(payload == bytes(pair.came, payload.len()), "other bytes than were written");
                pair.came += payload.len();
                assert!(pair.came - pair.read <= pair.socket.buf_alloc as usize, "beyond the guest's buffer");
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.tell_credit(index),
            Op::Shutdown => {
                pair.host_ended |= header.flags;
                if pair.host_ended == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                    let answer = pair.socket.header(Op::Reset);
                    pair.reset = true;
                    self.transmit(answer, Vec::new());
                }
            }
            Op::Reset => pair.reset = true,
        }
        self.send(index, 0);
    }

    fn tell_credit(&mut self, index: usize) {
        self.pairs[index].told = self.pairs[index].read;
        self.control(index, Op::CreditUpdate, 0);
    }

    fn control(&mut self, index: usize, op: Op, flags: u32) {
        let pair = &mut self.pairs[index];
        pair.socket.fwd_cnt = pair.read as u32;
        pair.told = pair.read;
        let header = Header { flags, ..pair.socket.header(op) };
        self.transmit(header, Vec::new());
    }

    /// The guest's program wants to send `more` bytes; sends what there is credit for.
    fn send(&mut self, index: usize, more: usize) -> bool {
        let mut moved = false;
        self.pairs[index].to_send += if self.pairs[index].ends { 0 } else { more };
        loop {
            let pair = &mut self.pairs[index];
            let from = pair.socket.sent as usize;
            let count = (pair.to_send - from).min(pair.socket.credit() as usize).min(0x1_0000);
            if !pair.open || pair.reset || count == 0 {
                break;
            }
            pair.socket.fwd_cnt = pair.read as u32;
            pair.told = pair.read;
            let header = Header { len: count as u32, ..pair.socket.header(Op::ReadWrite) };
            pair.socket.sent += count as u32;
            self.transmit(header, bytes(from, count));
            moved = true;
        }
        let pair = &mut self.pairs[index];
        if pair.ends
            && pair.open
            && !pair.reset
            && pair.socket.sent as usize == pair.to_send
            && !pair.told_end
        {
            pair.told_end = true;
            self.control(index, Op::Shutdown, SHUTDOWN_SEND);
            moved = true;
        }
        moved
    }

    /// The guest's program reads up to `most` bytes. As Linux does, it tells the host only once most of its buffer was
    /// read, or nothing is left.
    fn consume(&mut self, index: usize, most: usize) -> bool {
        let pair = &mut self.pairs[index];
        let count = most.min(pair.came - pair.read);
        pair.read += count;
        let free = pair.socket.buf_alloc as usize - (pair.read - pair.told);
        if count > 0 && !pair.reset && (free < pair.socket.buf_alloc as usize / 4 || pair.read == pair.came) {
            self.tell_credit(index);
        }
        count > 0
    }

    /// The event loop's turn, if it has one.
    fn event_loop(&mut self) -> bool {
        let descriptor = self.driver.device.muxer.descriptor();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&now)).unwrap() > 0;
        if ready {
            self.driver.device.host_ready().unwrap();
        }
        ready
    }

    fn step(&mut self, step: &Step) {
        let second = |second: bool| usize::from(second);
        match *step {
            Step::Loop => _ = self.event_loop(),
            Step::Interrupt => _ = self.interrupted(),
            Step::Refill => self.refill(),
            Step::Send(pair, count) => _ = self.send(second(pair), count),
            Step::Consume(pair, count) => _ = self.consume(second(pair), count),
            Step::End(pair) => {
                self.pairs[second(pair)].ends = true;
                self.send(second(pair), 0);
            }
            Step::Write(pair, count) => {
                let pair = &mut self.pairs[second(pair)];
                pair.to_write += if pair.program_ends { 0 } else { count };
                pair.write();
            }
            Step::Read(pair, count) => {
                _ = self.pairs[second(pair)].read(&mut self.lines[second(pair)], count.max(1));
            }
            Step::ProgramEnds(pair) => {
                self.pairs[second(pair)].program_ends = true;
                self.pairs[second(pair)].write();
            }
        }
    }

    /// Lets everybody do what they are woken for until nobody is any more.
    fn rest(&mut self) {
        let bytes: usize = self.pairs.iter().map(|pair| pair.to_send + pair.to_write).sum();
        for _ in 0..TURNS + bytes {
            let mut moved = self.event_loop() | self.interrupted();
            if !self.taken.is_empty() {
                self.refill();
                moved = true;
            }
            for index in 0..self.pairs.len() {
                moved |= self.consume(index, usize::MAX) | self.send(index, 0);
                let pair = &mut self.pairs[index];
                moved |= pair.write() | pair.read(&mut self.lines[index], 0x2_0000);
            }
            if !moved {
                return;
            }
        }
        panic!("no rest");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Loop,
    Interrupt,
    Refill,
    Send(bool, usize),
    Consume(bool, usize),
    End(bool),
    Write(bool, usize),
    Read(bool, usize),
    ProgramEnds(bool),
}

fn any_step() -> impl Strategy<Value = Step> {
    let count = || prop_oneof![3 => 0..500_usize, 3 => 0..20_000_usize, 3 => 200_000..1_500_000_usize];
    let pair = any::<bool>;
    prop_oneof![
        6 => Just(Step::Loop),
        6 => Just(Step::Interrupt),
        4 => Just(Step::Refill),
        4 => (pair(), count()).prop_map(|(pair, count)| Step::Send(pair, count)),
        3 => (pair(), count()).prop_map(|(pair, count)| Step::Consume(pair, count)),
        4 => (pair(), count()).prop_map(|(pair, count)| Step::Write(pair, count)),
        3 => (pair(), count()).prop_map(|(pair, count)| Step::Read(pair, count)),
        1 => pair().prop_map(Step::End),
        1 => pair().prop_map(Step::ProgramEnds),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever happens in whatever order: once everybody goes on, all that was written arrives, each end is heard of
    /// after it, and the device and both sides come to rest.
    #[test]
    fn everything_arrives(
        buffers in prop_oneof![1..4_u16, 1..64_u16],
        buffer_len in prop_oneof![45..200_u32, Just(4096_u32), Just(0x1_0000_u32)],
        slots in prop_oneof![1..4_u16, Just(64_u16)],
        buf_alloc in prop_oneof![200..5000_u32, Just(1_u32 << 16), Just(1_u32 << 18)],
        steps in prop::collection::vec(any_step(), 0..120),
        ends in any::<[bool; 4]>(),
    ) {
        let mut world = World::new(buffers, buffer_len, slots, buf_alloc);
        for step in &steps {
            // A stream in small buffers is as good a test when it is short.
            let packets = |count: usize| count.min(500 * (buffer_len - HEADER_LEN) as usize);
            let scale = |count: usize| if buf_alloc < 5000 { packets(count / 20) } else { packets(count) };
            match *step {
                Step::Send(pair, count) => world.step(&Step::Send(pair, scale(count))),
                Step::Write(pair, count) => world.step(&Step::Write(pair, scale(count))),
                ref step => world.step(step),
            }
        }
        world.rest();
        for (index, pair) in world.pairs.iter_mut().enumerate() {
            prop_assert!(pair.open, "{index}: no connection");
            prop_assert_eq!(pair.received, pair.to_send, "{}: bytes of the guest", index);
            prop_assert_eq!(pair.read, pair.to_write, "{}: bytes of the program", index);
            pair.ends |= ends[index * 2];
            pair.program_ends |= ends[index * 2 + 1];
        }
        world.rest();
        for (index, pair) in world.pairs.iter().enumerate() {
            prop_assert_eq!(pair.at_end, pair.ends, "{}: the end of the guest's data", index);
            let host_ended = pair.host_ended & SHUTDOWN_SEND != 0 || pair.reset;
            prop_assert_eq!(host_ended, pair.program_ends, "{}: the end of the program's data", index);
            prop_assert_eq!(pair.reset, pair.ends && pair.program_ends, "{}: the end", index);
        }
        let open = world.pairs.iter().filter(|pair| !pair.reset).count();
        prop_assert_eq!(world.driver.device.muxer.counts(), (open, 0, 0, 0));
    }
}
