//! A vsock device's driver (virtio 1.2, 5.10): packets as they are asked for,
//! sensible or not.

use crate::cpu::delay;
use crate::ram;
use crate::virtio::{Device, Queue, flag, register, status};

/// Length of a header, bytes.
pub const HEADER: u32 = 44;
/// The guest's context identifier.
pub const GUEST: u64 = 3;
/// The host's context identifier.
pub const HOST: u64 = 2;
/// Bytes of RAM that the driver uses, with [`SLOTS`] small buffers.
pub const LENGTH: u64 = Shape::SMALL.length();

/// Descriptors of each queue, and buffers, if they are small.
pub const SLOTS: u16 = Shape::SMALL.slots;

/// Number and size of the buffers.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Descriptors of each queue, and buffers for it: a power of two, at most 256.
    pub slots: u16,
    /// Bytes of a buffer, header included.
    pub bytes: u32,
}

impl Shape {
    /// For packets with little or no payload.
    pub const SMALL: Self = Self { slots: 128, bytes: 0x200 };
    /// For streams.
    pub const LARGE: Self = Self { slots: 32, bytes: 0x1_0000 };

    /// Bytes of RAM that a driver with such buffers uses.
    pub const fn length(self) -> u64 {
        2 * Queue::LENGTH + 2 * self.slots as u64 * self.bytes as u64
    }
}

const RX: u32 = 0;
const TX: u32 = 1;
/// How often to look for a packet, with a delay between: minutes, as the host's other CPUs may be busy.
const PATIENCE: u32 = 100_000_000;

/// Operations (virtio 1.2, 5.10.6).
pub mod op {
    #![allow(missing_docs)] // the names are the specification's
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // the names are the specification's
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Packet {
    /// A packet of the guest on a stream between these ports.
    pub fn new(guest: u32, host: u32, op: u16) -> Self {
        Self {
            src_cid: GUEST,
            dst_cid: HOST,
            src_port: guest,
            dst_port: host,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        }
    }

    fn write(&self, at: u64) {
        ram::write_u64(at, self.src_cid);
        ram::write_u64(at + 8, self.dst_cid);
        ram::write_u32(at + 16, self.src_port);
        ram::write_u32(at + 20, self.dst_port);
        ram::write_u32(at + 24, self.len);
        ram::write_u16(at + 28, self.kind);
        ram::write_u16(at + 30, self.op);
        ram::write_u32(at + 32, self.flags);
        ram::write_u32(at + 36, self.buf_alloc);
        ram::write_u32(at + 40, self.fwd_cnt);
    }

    fn read(at: u64) -> Self {
        Self {
            src_cid: ram::read_u64(at),
            dst_cid: ram::read_u64(at + 8),
            src_port: ram::read_u32(at + 16),
            dst_port: ram::read_u32(at + 20),
            len: ram::read_u32(at + 24),
            kind: ram::read_u16(at + 28),
            op: ram::read_u16(at + 30),
            flags: ram::read_u32(at + 32),
            buf_alloc: ram::read_u32(at + 36),
            fwd_cnt: ram::read_u32(at + 40),
        }
    }
}

/// A vsock device and its driver.
pub struct Socket {
    /// The device.
    pub device: Device,
    /// The queue by which the guest receives.
    pub rx: Queue,
    /// The queue by which the guest transmits.
    pub tx: Queue,
    base: u64,
    shape: Shape,
    /// Buffers in the receive queue.
    offered: u16,
    /// Packets in the transmit queue.
    under_way: u16,
    next: u16,
}

impl Socket {
    /// Starts `device`, with queues and buffers in the [`LENGTH`] bytes of RAM from `base` on, and gives it
    /// `buffers` (at most [`SLOTS`]) to receive into.
    pub fn start(device: Device, base: u64, buffers: u16) -> Self {
        Self::start_with(device, base, buffers, Shape::SMALL)
    }

    /// The same with queues and buffers of another shape.
    pub fn start_with(device: Device, base: u64, buffers: u16, shape: Shape) -> Self {
        device.write(register::STATUS, 0);
        let (rx, tx) = (Queue::new(base, shape.slots), Queue::new(base + Queue::LENGTH, shape.slots));
        assert!(device.negotiate(u64::MAX).is_some(), "vsock refused its features");
        device.set_up(RX, &rx);
        device.set_up(TX, &tx);
        assert!(device.add_status(status::DRIVER_OK), "vsock did not start");
        let mut socket = Self { device, rx, tx, base, shape, offered: 0, under_way: 0, next: 0 };
        (0..buffers).for_each(|slot| socket.offer_buffer(slot));
        device.notify(RX);
        socket
    }

    /// Gives the device buffer `slot` to receive into.
    pub fn offer_buffer(&mut self, slot: u16) {
        self.rx.describe(slot, self.rx_slot(slot), self.shape.bytes, flag::WRITE, 0);
        self.rx.offer(slot);
        self.offered += 1;
    }

    /// Tells the device of new buffers.
    pub fn kick_rx(&self) {
        self.device.notify(RX);
    }

    fn rx_slot(&self, slot: u16) -> u64 {
        self.base + 2 * Queue::LENGTH + u64::from(slot) * u64::from(self.shape.bytes)
    }

    /// Address of the buffer that packet `slot` is sent from.
    pub fn tx_slot(&self, slot: u16) -> u64 {
        self.rx_slot(self.shape.slots) + u64::from(slot) * u64::from(self.shape.bytes)
    }

    /// The slot that the next packet is sent from.
    pub fn next_slot(&self) -> u16 {
        self.next % self.shape.slots
    }

    /// Queues a packet with `payload` bytes after its header, which need not be what the header says. `false` if
    /// the queue is full.
    pub fn queue(&mut self, packet: &Packet, payload: u32) -> bool {
        while self.tx.poll().is_some() {
            self.under_way -= 1;
        }
        if self.under_way == self.shape.slots {
            return false;
        }
        let slot = self.next_slot();
        self.next = self.next.wrapping_add(1);
        packet.write(self.tx_slot(slot));
        self.tx.describe(slot, self.tx_slot(slot), HEADER + payload, 0, 0);
        self.tx.offer(slot);
        self.under_way += 1;
        true
    }

    /// Tells the device of queued packets.
    pub fn kick(&self) {
        self.device.notify(TX);
    }

    /// Sends a packet, waiting for room as long as it takes the device.
    pub fn send(&mut self, packet: &Packet, payload: u32) {
        let queued = (0..PATIENCE).any(|_| {
            let queued = self.queue(packet, payload);
            if !queued {
                delay();
            }
            queued
        });
        assert!(queued, "the transmit queue stays full");
        self.kick();
    }

    /// The next packet, if one is there; its buffer is offered again.
    pub fn poll(&mut self) -> Option<Packet> {
        self.poll_with(|_, _| ()).map(|(packet, ())| packet)
    }

    /// The next packet, if one is there, and what `look` makes of it and of the payload at an address.
    pub fn poll_with<R>(&mut self, look: impl FnOnce(&Packet, u64) -> R) -> Option<(Packet, R)> {
        let used = self.rx.poll()?;
        let slot = self.rx_slot(used.head as u16);
        let packet = Packet::read(slot);
        let result = look(&packet, slot + u64::from(HEADER));
        self.offered -= 1;
        self.offer_buffer(used.head as u16);
        Some((packet, result))
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> Option<Packet> {
        for attempt in 0..PATIENCE {
            if let Some(packet) = self.poll() {
                self.kick_rx();
                return Some(packet);
            }
            if attempt % 256 == 255 && self.device.needs_reset() {
                return None;
            }
            delay();
        }
        None
    }

    /// Asks for a connection from `guest` to `host`: whether the host accepted.
    pub fn connect(&mut self, guest: u32, host: u32) -> bool {
        self.send(&Packet::new(guest, host, op::REQUEST), 0);
        match self.receive() {
            Some(answer) => {
                assert_eq!((answer.src_port, answer.dst_port), (host, guest), "an answer to somebody else");
                answer.op == op::RESPONSE
            }
            None => false,
        }
    }

    /// Nothing comes in, although the device has had a turn since what was sent.
    pub fn is_quiet(&mut self) -> bool {
        // An answer to this one follows all others.
        self.send(&Packet::new(u32::MAX - 1, u32::MAX - 1, op::CREDIT_REQUEST), 0);
        match self.receive() {
            Some(answer) => answer.op == op::RST && answer.dst_port == u32::MAX - 1,
            None => false,
        }
    }
}
