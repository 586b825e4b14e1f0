//! Packets of a guest to a live vsock device, with programs of the host on Unix sockets at its other side.
//!
//! Holds: connections, handshakes, refusals and windows stay within their bounds; each transmitted chain comes back
//! once, or the device needs reset; what the guest receives is a packet for it, not longer than its buffer, and never
//! more data than it has said it takes; after a reset nothing is left.
#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cofferdam_devices::virtio::testing::{Line, Ring, memory};
use cofferdam_devices::virtio::vsock::{SocketFile, Vsock, bind};
use cofferdam_devices::virtio::{Driver, Memory, VirtioDevice, VirtioInterrupt};
use cofferdam_fuzz::device::Looped;
use cofferdam_fuzz::packet::{HEADER, Header};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;
const TX: u64 = 0x4000;
const RX: u64 = 0x8000;
const QUEUE_SIZE: u16 = 256;
/// Packets of the guest; each reads on as far as its header says.
const PACKETS: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_SPACE: u64 = 0x1000;
const END: u64 = 0x20_0000;

/// Bounds of the device: see `Limits` and `WINDOW_RESERVE` of its muxer.
const MOST_CONNECTIONS: usize = 4096;
const MOST_REFUSALS: usize = 4096;
const MOST_RESERVED: u64 = 16 << 20;
const SMALLEST_WINDOW: u64 = 8 << 10;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const READ_WRITE: u16 = 5;

#[derive(Arbitrary, Debug)]
struct Input {
    event_idx: bool,
    buffers: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A packet that belongs to a connection, or could.
    Packet {
        guest: u8,
        host: u8,
        op: u8,
        flags: u8,
        len: u16,
        credit: Credit,
        cuts: Vec<u16>,
    },
    /// The same with one field that it should not have.
    Odd {
        op: u16,
        kind: u16,
        src_cid: u64,
        dst_cid: u64,
        guest: u32,
        host: u32,
        len: u32,
        credit: Credit,
    },
    /// Opens a connection, which the program accepts.
    Open {
        guest: u8,
        host: u8,
        credit: Credit,
    },
    /// Answers whatever the device asks for.
    Accept(Credit),
    Chain {
        parts: Vec<(u32, u16, bool)>,
    },
    Buffer {
        length: u16,
        reads: bool,
    },
    Buffers(u8),
    Index {
        transmit: bool,
        index: u16,
    },
    Connect {
        line: Greeting,
        rest: u8,
    },
    ProgramAccepts(u8),
    ProgramWrites {
        program: u8,
        length: u16,
    },
    ProgramReads(u8),
    ProgramShuts {
        program: u8,
        how: u8,
    },
    ProgramCloses(u8),
    Notify(bool),
    Run,
    Reset,
}

/// What a program says first.
#[derive(Arbitrary, Debug)]
enum Greeting {
    Port(u8),
    Far(u32),
    Raw([u8; 24]),
    Nothing,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Credit {
    Plenty,
    Little(u8),
    Any(u32, u32),
}

impl Credit {
    /// `buf_alloc` and `fwd_cnt`, of a guest that has consumed `received` bytes.
    fn get(self, received: u32) -> (u32, u32) {
        match self {
            Self::Plenty => (1 << 18, received),
            Self::Little(bytes) => (bytes.into(), received),
            Self::Any(size, consumed) => (size, consumed),
        }
    }
}

/// What stays from one input to the next.
struct Host {
    device: Looped<Vsock>,
    memory: Memory,
    path: PathBuf,
    listeners: Vec<UnixListener>,
    _file: SocketFile,
    _directory: TempDir,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let (listener, file) = bind(&path).unwrap();
        let listeners = (0..3)
            .map(|port| {
                let listener = UnixListener::bind(directory.path().join(format!("v_{port}"))).unwrap();
                listener.set_nonblocking(true).unwrap();
                listener
            })
            .collect();
        let device = Vsock::new(GUEST_CID as u32, Some(listener), Some(path.clone())).unwrap();
        Self {
            device: Looped::new(device),
            memory: memory(&[(0, END as usize)]),
            path,
            listeners,
            _file: file,
            _directory: directory,
        }
    }
}

/// What the guest knows of a connection.
#[derive(Clone, Copy, Default)]
struct Received {
    /// Bytes received.
    bytes: u32,
    /// Most bytes that it has said it takes; unknown once it has said what makes no sense.
    limit: Option<u32>,
}

/// The guest from one reset to the next.
struct Guest<'a> {
    host: &'a mut Host,
    tx: Ring,
    rx: Ring,
    interrupt: Arc<VirtioInterrupt>,
    event_idx: bool,
    /// Next descriptor of the transmit queue, and chains offered in it.
    next: u16,
    transmitted: u16,
    offered: u16,
    /// Length of the buffer that starts at each receive descriptor.
    buffers: Vec<u32>,
    seen: u16,
    received: HashMap<(u32, u32), Received>,
    requests: Vec<(u32, u32)>,
    programs: Vec<UnixStream>,
    wild: bool,
}

impl Guest<'_> {
    fn activate(&mut self) {
        for ring in [&self.tx, &self.rx] {
            ring.write(ring.table(), &[0; 0x3000]);
        }
        (self.next, self.transmitted, self.offered, self.seen, self.wild) = (0, 0, 0, 0, false);
        self.buffers.clear();
        self.received.clear();
        self.requests.clear();
        self.interrupt = Arc::new(VirtioInterrupt::new(Arc::new(Line::default())));
        let driver = Driver {
            shared: None,
            memory: self.host.memory.clone(),
            queues: vec![self.rx.queue(self.event_idx), self.tx.queue(self.event_idx)],
            features: 0,
            interrupt: self.interrupt.clone(),
        };
        self.host.device.with(|device| device.activate(driver)).unwrap();
    }

    /// Makes a chain available to be sent, while there are descriptors.
    fn offer(&mut self, parts: &[(u64, u32, bool)]) {
        let count = parts.len() as u16;
        if count != 0 && self.next + count <= QUEUE_SIZE {
            self.tx.offer_chain(self.next, parts);
            self.next += count;
            self.transmitted += 1;
        }
    }

    fn send(&mut self, header: Header, cuts: &[u16]) {
        let place = PACKETS + u64::from(self.transmitted) * 0x40;
        self.tx.write(place, &header.to_bytes());
        // The payload is what follows in memory.
        let mut rest = (HEADER as u32).saturating_add(header.len).min(0x2_0000);
        let mut parts = Vec::new();
        let mut at = place;
        for cut in cuts.iter().take(6).map(|cut| u32::from(*cut).max(1)) {
            if cut < rest {
                parts.push((at, cut, false));
                (at, rest) = (at + u64::from(cut), rest - cut);
            }
        }
        parts.push((at, rest, false));
        self.offer(&parts);
    }

    /// A header, and a note of the credit that it gives.
    fn header(&mut self, guest: u32, host: u32, op: u16, credit: Credit) -> Header {
        // A packet that is still to be taken may have given other credit, to this connection or one before it.
        let known = self.taken() == self.transmitted;
        let new = Received { bytes: 0, limit: known.then_some(0) };
        let received = self.received.entry((guest, host)).or_insert(new);
        let (buf_alloc, fwd_cnt) = credit.get(received.bytes);
        received.limit = match credit {
            Credit::Any(..) => None,
            _ if op == RESET => None,
            _ => received.limit.map(|limit| limit.max(fwd_cnt + buf_alloc)),
        };
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: 1,
            op,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    /// Transmitted chains that came back.
    fn taken(&self) -> u16 {
        self.tx.u16(self.tx.used() + 2)
    }

    fn offer_buffer(&mut self, length: u32, reads: bool) {
        let index = self.offered;
        if index < QUEUE_SIZE {
            let place = BUFFERS + u64::from(index) * BUFFER_SPACE;
            self.rx.offer_chain(index, &[(place, length, !reads)]);
            self.buffers.push(length);
            self.offered += 1;
        }
    }

    /// Ports of the guest's connections to programs are 0 to 7, those of the host's are what the device chose.
    fn ports(&self, guest: u8, host: u8) -> (u32, u32) {
        match self.requests.get(usize::from(host).wrapping_sub(4)) {
            Some(&ports) => ports,
            None => (u32::from(guest % 8), u32::from(host % 4)),
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Packet { guest, host, op, flags, len, credit, ref cuts } => {
                let (guest, host) = self.ports(guest, host);
                let header = self.header(guest, host, u16::from(op % 9), credit);
                let len = if header.op == READ_WRITE { len.into() } else { 0 };
                self.send(Header { len, flags: u32::from(flags % 4), ..header }, cuts);
            }
            Step::Odd { op, kind, src_cid, dst_cid, guest, host, len, credit } => {
                let header = self.header(guest, host, op % 10, credit);
                self.send(Header { kind: kind % 3, src_cid, dst_cid, len, ..header }, &[]);
            }
            Step::Open { guest, host, credit } => {
                let header = self.header(u32::from(guest % 8), u32::from(host % 4), REQUEST, credit);
                self.send(header, &[]);
                self.host.device.with(|device| device.notify(1));
                self.program(&Step::ProgramAccepts(host % 4));
            }
            Step::Accept(credit) => {
                for (guest, host) in self.requests.clone() {
                    let header = self.header(guest, host, RESPONSE, credit);
                    self.send(header, &[]);
                }
            }
            Step::Chain { ref parts } => {
                let parts: Vec<_> = parts
                    .iter()
                    .take(8)
                    .map(|&(address, length, writes)| {
                        (u64::from(address) % (END + 0x1000), length.into(), writes)
                    })
                    .collect();
                self.offer(&parts);
            }
            Step::Buffer { length, reads } => self.offer_buffer((length % 0x1001).into(), reads),
            Step::Buffers(count) => {
                (0..count % 32).for_each(|_| self.offer_buffer(BUFFER_SPACE as u32, false))
            }
            Step::Index { transmit, index } => {
                self.wild = true;
                if transmit { self.tx.set_index(index) } else { self.rx.set_index(index) }
            }
            Step::Notify(transmit) => self.host.device.with(|device| device.notify(transmit.into())),
            Step::Run => {
                self.host.device.run(0);
            }
            Step::Reset => {
                self.end();
                self.activate();
            }
            Step::Connect { .. }
            | Step::ProgramAccepts(_)
            | Step::ProgramWrites { .. }
            | Step::ProgramReads(_)
            | Step::ProgramShuts { .. }
            | Step::ProgramCloses(_) => self.program(step),
        }
        self.check();
    }

    /// What happens on the host's side. Nothing there fails but by the other side's doing.
    fn program(&mut self, step: &Step) {
        let count = self.programs.len();
        let program = |index: u8| self.programs.get(usize::from(index).checked_rem(count).unwrap_or(0));
        match *step {
            Step::Connect { ref line, rest } if count < 64 => {
                let mut bytes = match line {
                    Greeting::Port(port) => format!("CONNECT {port}\n").into_bytes(),
                    Greeting::Far(port) => format!("CONNECT {port}\n").into_bytes(),
                    Greeting::Raw(bytes) => bytes.to_vec(),
                    Greeting::Nothing => Vec::new(),
                };
                bytes.resize(bytes.len() + usize::from(rest), b'+');
                let mut stream = UnixStream::connect(&self.host.path).unwrap();
                stream.set_nonblocking(true).unwrap();
                let _ = stream.write(&bytes);
                self.programs.push(stream);
            }
            Step::ProgramAccepts(port) => {
                let listener = &self.host.listeners[usize::from(port) % self.host.listeners.len()];
                if let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).unwrap();
                    self.programs.push(stream);
                }
            }
            Step::ProgramWrites { program: index, length } => {
                let _ = program(index).map(|mut stream| stream.write(&vec![b'w'; length.into()]));
                self.host.device.run(0);
            }
            Step::ProgramReads(index) => {
                let _ = program(index).map(|mut stream| stream.read(&mut [0; 0x4000]));
            }
            Step::ProgramShuts { program: index, how } => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how) % 3];
                let _ = program(index).map(|stream| stream.shutdown(how));
            }
            Step::ProgramCloses(index) if count > 0 => {
                self.programs.swap_remove(usize::from(index) % count);
            }
            _ => {}
        }
    }

    /// Looks at what came back, and at what the device holds.
    fn check(&mut self) {
        let ((connections, handshakes, refusals, turns), reserved) =
            self.host.device.with(|device| device.load());
        assert!(connections + handshakes <= MOST_CONNECTIONS && refusals <= MOST_REFUSALS);
        assert!(turns <= connections);
        assert!(reserved <= MOST_RESERVED + connections as u64 * SMALLEST_WINDOW);
        assert!(connections > 0 || reserved == 0);
        if self.interrupt.is_broken() {
            assert_eq!((connections, handshakes, refusals, reserved), (0, 0, 0, 0), "needs reset");
        }
        if self.wild {
            return;
        }
        assert!(self.taken() <= self.transmitted, "more came back than was sent");
        let used = self.rx.completed();
        assert!(used.len() <= usize::from(self.offered));
        for &(head, length) in used.iter().skip(self.seen.into()) {
            assert_eq!(head, u32::from(self.seen), "buffers come back in order");
            self.receive(head, length);
            self.seen += 1;
        }
    }

    fn receive(&mut self, head: u32, length: u32) {
        let place = BUFFERS + u64::from(head) * BUFFER_SPACE;
        let field = |offset: u64| -> u32 { self.host.memory.read_obj(GuestAddress(place + offset)).unwrap() };
        assert_eq!((field(0), field(4), field(8), field(12)), (HOST_CID as u32, 0, GUEST_CID as u32, 0));
        let (host, guest, len, kind, op) =
            (field(16), field(20), field(24), field(28) & 0xFFFF, field(28) >> 16);
        assert!((1..=7).contains(&op), "{op}");
        assert_eq!(length, HEADER as u32 + len);
        assert!(length <= self.buffers[head as usize]);
        assert!(len == 0 || op == u32::from(READ_WRITE));
        let connection = self.received.entry((guest, host)).or_default();
        connection.bytes = connection.bytes.wrapping_add(len);
        assert!(connection.limit.is_none_or(|limit| connection.bytes <= limit), "more data than credit");
        if op == u32::from(REQUEST) {
            self.requests.push((guest, host));
        }
        // Of another type, it is the answer to a packet that was not for the connection.
        if op == u32::from(RESET) && kind == 1 {
            self.received.remove(&(guest, host));
            self.requests.retain(|ports| *ports != (guest, host));
        }
    }

    /// Lets the device finish, and takes it away.
    fn end(&mut self) {
        if !self.interrupt.is_broken() && !self.wild {
            while self.offered < QUEUE_SIZE {
                self.offer_buffer(BUFFER_SPACE as u32, false);
            }
            self.host.device.with(|device| device.notify(1));
            self.check();
            if !self.interrupt.is_broken() {
                assert_eq!(self.taken(), self.transmitted, "a packet was not taken");
            }
        }
        self.host.device.with(|device| device.reset());
        assert_eq!(self.host.device.with(|device| device.load()), ((0, 0, 0, 0), 0));
        assert_eq!(Arc::strong_count(&self.host.memory), 3, "the device kept guest memory");
        self.programs.clear();
        for listener in &self.host.listeners {
            while listener.accept().is_ok() {}
        }
    }
}

fuzz_target!(|input: Input| {
    thread_local!(static HOST: RefCell<Host> = RefCell::new(Host::new()));
    HOST.with_borrow_mut(|host| {
        let (tx, rx) = (Ring::new(&host.memory, TX, QUEUE_SIZE), Ring::new(&host.memory, RX, QUEUE_SIZE));
        let mut guest = Guest {
            host,
            tx,
            rx,
            interrupt: Arc::new(VirtioInterrupt::new(Arc::new(Line::default()))),
            event_idx: input.event_idx,
            next: 0,
            transmitted: 0,
            offered: 0,
            buffers: Vec::new(),
            seen: 0,
            received: HashMap::new(),
            requests: Vec::new(),
            programs: Vec::new(),
            wild: false,
        };
        guest.activate();
        (0..input.buffers).for_each(|_| guest.offer_buffer(BUFFER_SPACE as u32, false));
        for step in &input.steps {
            guest.step(step);
        }
        guest.end();
    });
});
