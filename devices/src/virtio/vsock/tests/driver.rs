//! A guest's driver, as far as the tests need one.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::testing::{Line, Ring, memory};
use crate::virtio::vsock::device::Vsock;
use crate::virtio::vsock::host::{SocketFile, bind};
use crate::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op, Ports, TYPE_STREAM};
use crate::virtio::{Driver as Live, Memory, VirtioDevice, VirtioInterrupt};

pub const GUEST_CID: u32 = 3;
/// Buffers in the receive queue.
const BUFFERS: u16 = 256;
/// Chains in the transmit queue, each a header and a payload.
const SLOTS: u16 = 128;
const HEADERS: u64 = 0x10_0000;
const PAYLOADS: u64 = 0x20_0000;
const BUFFERS_AT: u64 = 0x200_0000;
const BUFFER_SPACE: u64 = 0x1_1000;
/// How long anything may take on a busy machine.
pub const LONGEST: Duration = Duration::from_secs(300);

/// The operation of a header that the device made.
pub fn op(header: &Header) -> Op {
    Op::from_field(header.op).unwrap()
}

/// A device in a directory of its own, and its driver.
pub struct Driver {
    pub device: Vsock,
    pub memory: Memory,
    pub rx: Ring,
    pub tx: Ring,
    pub line: Arc<Line>,
    pub interrupt: Arc<VirtioInterrupt>,
    /// Gives buffers back once they are read.
    pub refill: bool,
    buffer_len: u32,
    transmitted: u16,
    received: u16,
    directory: TempDir,
    _file: SocketFile,
}

impl Driver {
    /// A live device with all receive buffers offered, each of `buffer_len` bytes.
    pub fn new(buffer_len: u32) -> Self {
        let mut driver = Self::without_buffers(buffer_len);
        driver.offer_buffers(BUFFERS);
        driver
    }

    /// A live device without receive buffers.
    pub fn without_buffers(buffer_len: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let (listener, file) = bind(&path).unwrap();
        let memory = memory(&[(0, 0x400_0000)]);
        let line = Arc::new(Line::default());
        let mut driver = Self {
            device: Vsock::new(GUEST_CID, Some(listener), Some(path)).unwrap(),
            rx: Ring::new(&memory, 0, BUFFERS),
            tx: Ring::new(&memory, 0x3000, 2 * SLOTS),
            interrupt: Arc::new(VirtioInterrupt::new(line.clone())),
            memory,
            line,
            refill: true,
            buffer_len,
            transmitted: 0,
            received: 0,
            directory,
            _file: file,
        };
        driver.activate();
        driver
    }

    /// Sets the device going with empty rings.
    pub fn activate(&mut self) {
        for ring in [&self.rx, &self.tx] {
            ring.write(ring.available(), &[0; 4]);
            ring.write(ring.used(), &[0; 4]);
        }
        (self.transmitted, self.received) = (0, 0);
        let queues =
            vec![self.rx.queue(true), self.tx.queue(true), Ring::new(&self.memory, 0x6000, 256).queue(true)];
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        self.device.activate(Live { memory, shared: None, queues, features: 0, interrupt }).unwrap();
    }

    /// Path of the device's socket.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("v.sock")
    }

    /// A program of the host that listens for the guest on `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// A program of the host that connects to the device.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(LONGEST)).unwrap();
        stream
    }

    pub fn offer_buffers(&mut self, count: u16) {
        for index in 0..count {
            let address = BUFFERS_AT + u64::from(index) * BUFFER_SPACE;
            self.rx.offer_chain(index, &[(address, self.buffer_len, true)]);
        }
        self.device.notify(0);
    }

    /// Puts a packet into the transmit queue, without notifying. `false`: there is no room.
    pub fn queue(&mut self, header: &Header, payload: &[u8]) -> bool {
        let done = self.tx.u16(self.tx.used() + 2);
        if self.transmitted.wrapping_sub(done) >= SLOTS {
            return false;
        }
        let slot = u64::from(self.transmitted % SLOTS);
        let (head, body) = (HEADERS + slot * 64, PAYLOADS + slot * 0x1_0000);
        self.tx.write(head, &header.to_bytes());
        self.tx.write(body, payload);
        let parts = [(head, HEADER_LEN, false), (body, payload.len() as u32, false)];
        let parts = if payload.is_empty() { &parts[..1] } else { &parts[..] };
        self.tx.offer_chain(slot as u16 * 2, parts);
        self.transmitted = self.transmitted.wrapping_add(1);
        true
    }

    /// Transmits a packet.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        assert!(self.queue(header, payload), "the device has stopped taking packets");
        self.device.notify(1);
    }

    /// Packets that the guest has received since the last call, without waiting.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.received_up_to(usize::MAX)
    }

    /// The first `most` of them.
    pub fn received_up_to(&mut self, most: usize) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        let used = self.rx.u16(self.rx.used() + 2);
        while self.received != used && packets.len() < most {
            let entry = self.rx.used() + 4 + u64::from(self.received % BUFFERS) * 8;
            let (index, length): (u32, u32) = (
                self.memory.read_obj(GuestAddress(entry)).unwrap(),
                self.memory.read_obj(GuestAddress(entry + 4)).unwrap(),
            );
            let address = BUFFERS_AT + u64::from(index) * BUFFER_SPACE;
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            let payload = bytes.split_off(HEADER_LEN as usize);
            let header = Header::parse(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize, payload.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, u64::from(GUEST_CID)));
            packets.push((header, payload));
            self.received = self.received.wrapping_add(1);
            if self.refill {
                self.rx.offer(index as u16);
            }
        }
        if self.refill && !packets.is_empty() {
            self.device.notify(0);
        }
        packets
    }

    /// Waits up to `wait` for the host's side and lets the device deal with it; whether there was something.
    pub fn turn(&mut self, wait: Duration) -> bool {
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let descriptor = self.device.muxer.descriptor();
        let mut set = [PollFd::new(&descriptor, PollFlags::IN)];
        let ready = poll(&mut set, Some(&timeout)).unwrap() > 0;
        if ready {
            self.device.host_ready().unwrap();
        }
        ready
    }

    /// Packets that the guest receives, waiting for the first.
    pub fn wait(&mut self) -> Vec<(Header, Vec<u8>)> {
        let deadline = Instant::now() + LONGEST;
        loop {
            let packets = self.received();
            if !packets.is_empty() {
                return packets;
            }
            assert!(Instant::now() < deadline, "no packet came");
            self.turn(Duration::from_millis(50));
        }
    }

    /// Packets that the guest receives up to the first of that kind.
    pub fn wait_for(&mut self, op: Op) -> Vec<(Header, Vec<u8>)> {
        let mut packets = self.wait();
        while packets.iter().all(|(header, _)| header.op != op as u16) {
            packets.extend(self.wait());
        }
        packets
    }

    /// The one packet that the guest receives next.
    pub fn wait_one(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.wait();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Whether the guest receives nothing, after all that is ready on the host's side was dealt with.
    pub fn is_quiet(&mut self) -> bool {
        for _ in 0..20 {
            self.turn(Duration::from_millis(1));
        }
        self.received().is_empty()
    }
}

/// One connection as the guest sees it.
#[derive(Clone, Copy)]
pub struct Socket {
    pub ports: Ports,
    /// The guest's buffer.
    pub buf_alloc: u32,
    /// Bytes that the guest has received and consumed.
    pub fwd_cnt: u32,
    /// Bytes that it has sent.
    pub sent: u32,
    /// The host's credit.
    pub peer: (u32, u32),
}

impl Socket {
    pub fn new(guest: u32, host: u32) -> Self {
        Self { ports: Ports { host, guest }, buf_alloc: 1 << 18, fwd_cnt: 0, sent: 0, peer: (0, 0) }
    }

    /// A header of a packet to the host.
    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: u64::from(GUEST_CID),
            dst_cid: HOST_CID,
            src_port: self.ports.guest,
            dst_port: self.ports.host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    /// Connects to the host; `false` if it is refused.
    pub fn connect(&mut self, driver: &mut Driver) -> bool {
        driver.send(&self.header(Op::Request), b"");
        let (header, _) = driver.wait_one();
        self.take(&header);
        header.op == Op::Response as u16
    }

    /// Notes what a header of the host says.
    pub fn take(&mut self, header: &Header) {
        assert_eq!((header.src_port, header.dst_port), (self.ports.host, self.ports.guest));
        self.peer = (header.buf_alloc, header.fwd_cnt);
        if header.op == Op::ReadWrite as u16 {
            self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
        }
    }

    /// Bytes that may be sent.
    pub fn credit(&self) -> u32 {
        self.peer.0 - self.sent.wrapping_sub(self.peer.1)
    }

    pub fn send(&mut self, driver: &mut Driver, data: &[u8]) {
        let header = Header { len: data.len() as u32, ..self.header(Op::ReadWrite) };
        driver.send(&header, data);
        self.sent = self.sent.wrapping_add(data.len() as u32);
    }

    pub fn shut_down(&self, driver: &mut Driver, flags: u32) {
        driver.send(&Header { flags, ..self.header(Op::Shutdown) }, b"");
    }
}
