//! Stands for the init of a container's domain, as the command line's `mode=` says:
//!
//! | mode | what |
//! |---|---|
//! | `report` | writes each number of `reports=` (hexadecimal, with commas) to the step port |
//! | `mmio` | the same by MMIO |
//! | `widths` | accesses of every other width and place there |
//! | `flood` | `count=N` reports, each another number, none of them fatal |
//! | `drives` | prints id, size in bytes, `ro` or `rw`, and the first 16 bytes of each drive |
//! | `serve` | reports `running`, then serves requests until it is asked to stop |
//!
//! The name of the process that a request is about says how it is answered:
//!
//! | process | what is answered |
//! |---|---|
//! | `deny` | a refusal by the manifest |
//! | `garbage` | bytes that are no frame |
//! | `nonsense` | a frame with no message in it |
//! | `foreign` | the answer to another request |
//! | `half` | half an answer |
//! | `close` | the end of the connection |
//! | `never` | nothing; to `hang` nothing when its end is waited for |
//! | another one, or none | what is wanted: exit code 7, and 1 for each number of the statistics |
//!
//! Stop is answered as if it were about the process of `stop=`. With `deaf=1` nobody takes connections. The exit code is
//! `code=`, 0 by default.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{self, EXIT_CODE_PORT, STEP_PORT, VIRTIO_MMIO_SLOTS};
use cofferdam_payloads::cpu::{delay, inb, inl, outb, outl, outw};
use cofferdam_payloads::disk::{self, Disk, kind};
use cofferdam_payloads::socket::{HEADER, Packet, SLOTS, Socket, op};
use cofferdam_payloads::virtio::{Device, Part, register};
use cofferdam_payloads::{entry, mmio, payload, print, println, ram, serial};

payload!(main);

const BLOCK: u32 = 2;
const VSOCK: u32 = 19;
/// Port of the guest that requests come to.
const CONTROL_PORT: u32 = 1024;
/// The report that init is at the step `running`.
const RUNNING: u32 = 0x7FFF_0008;
/// "No more data in either direction".
const BOTH: u32 = 3;
/// Where the name of the method stands in a frame: behind its header, and the name of the service with tag and length;
/// then come tag, length and name.
const METHOD: usize = 10 + 2 + "cofferdam.container.v1.Container".len();
/// Length of a drive's id, and the feature of one that cannot be written (virtio 1.2, 5.2).
const ID: u32 = 20;
const READ_ONLY: u32 = 1 << 5;

fn main() -> u8 {
    let reports = entry::option("reports").unwrap_or_default();
    match entry::option("mode").unwrap_or_default() {
        b"report" => numbers(reports).for_each(|report| outl(STEP_PORT, report)),
        b"mmio" => {
            let address = layout::GUEST_PORT_MMIO + u64::from(STEP_PORT - EXIT_CODE_PORT);
            numbers(reports).for_each(|report| mmio::write_u32(address, report));
        }
        b"widths" => widths(),
        b"flood" => {
            for number in 0..entry::number("count").unwrap_or(0) as u32 {
                outl(STEP_PORT, number.wrapping_mul(0x9E37_79B9) & 0x7FFF_FFFF);
            }
        }
        b"drives" => drives(),
        b"serve" => serve(),
        _ => return 2,
    }
    entry::number("code").unwrap_or(0) as u8
}

/// Hexadecimal numbers with commas between them.
fn numbers(text: &[u8]) -> impl Iterator<Item = u32> + '_ {
    text.split(|byte| *byte == b',').filter(|word| !word.is_empty()).map(|word| {
        word.iter().fold(0, |number, digit| number << 4 | char::from(*digit).to_digit(16).unwrap_or(0))
    })
}

fn widths() {
    outl(STEP_PORT, RUNNING);
    assert!(inl(STEP_PORT) == RUNNING, "it is not read back");
    for offset in 0..4 {
        outb(STEP_PORT + offset, 0x81);
        if offset != 0 {
            outl(STEP_PORT + offset, 0x8181_8181);
        }
        outw(STEP_PORT + offset, 0x8181);
    }
    assert!(inl(STEP_PORT) == RUNNING, "half a report counts");
    println!("{:#x}", inb(STEP_PORT + 3));
}

fn drives() {
    for slot in 0..VIRTIO_MMIO_SLOTS {
        let device = Device::at(slot);
        if device.read(register::DEVICE_ID) != BLOCK {
            continue;
        }
        let mut disk = Disk::new(device, ram::START, 8);
        disk.start(u64::MAX);
        device.write(register::DEVICE_FEATURES_SEL, 0);
        let access = if device.read(register::DEVICE_FEATURES) & READ_ONLY != 0 { "ro" } else { "rw" };
        let data = disk.data();
        assert!(disk.request(kind::GET_ID, 0, Some(Part::write(data, ID))) == disk::OK, "no id");
        print(data, ID);
        print!(" {} {access} ", device.read_u64(register::CONFIG) * u64::from(disk::SECTOR));
        assert!(disk.request(kind::READ, 0, Some(Part::write(data, disk::SECTOR))) == disk::OK, "not read");
        print(data, 16);
        println!();
    }
}

/// Prints up to `length` bytes at `address`, or up to a NUL.
fn print(address: u64, length: u32) {
    (address..).take(length as usize).map(ram::read_u8).take_while(|byte| *byte != 0).for_each(serial::write);
}

/// The start of a packet's payload.
struct Bytes {
    bytes: [u8; 256],
    length: usize,
}

impl Bytes {
    fn at(address: u64, length: u32) -> Self {
        let mut bytes = [0; 256];
        let length = bytes.len().min(length as usize);
        (address..).zip(&mut bytes[..length]).for_each(|(address, byte)| *byte = ram::read_u8(address));
        Self { bytes, length }
    }

    /// The field of protobuf at `at` that has a length, with less than 128 bytes, and the place behind it.
    fn field(&self, at: usize) -> Option<(&[u8], usize)> {
        let start = at + 2;
        let end = start + usize::from(*self.bytes.get(at + 1)?);
        Some((self.bytes[..self.length].get(start..end)?, end))
    }

    /// The method, and the process that its request begins with.
    fn request(&self) -> Option<(&[u8], &[u8])> {
        let (method, behind) = self.field(METHOD)?;
        let process = if method == b"Stop" {
            entry::option("stop").unwrap_or_default()
        } else if self.field(behind).is_some_and(|(payload, _)| payload.first() == Some(&0x0A)) {
            self.field(behind + 2)?.0
        } else {
            &[]
        };
        Some((method, process))
    }
}

fn serve() {
    let device = Device::find(VSOCK);
    assert!(device.is_some(), "no vsock");
    let Some(device) = device else { return };
    let mut socket = Socket::start(device, ram::START, SLOTS);
    outl(STEP_PORT, RUNNING);
    println!("ready");
    let deaf = entry::option("deaf").is_some();
    loop {
        let Some((packet, bytes)) = socket.poll_with(|packet, payload| Bytes::at(payload, packet.len)) else {
            delay();
            continue;
        };
        socket.kick_rx();
        let mut reply = Packet::new(packet.dst_port, packet.src_port, op::RST);
        match packet.op {
            op::REQUEST if packet.dst_port == CONTROL_PORT && !deaf => reply.op = op::RESPONSE,
            op::REQUEST | op::SHUTDOWN => {}
            op::RW => {
                let Some((method, process)) = bytes.request() else { continue };
                answer(&mut socket, reply, &bytes.bytes[4..8], method, process);
                if method == b"Stop" && process.is_empty() {
                    return;
                }
                continue;
            }
            _ => continue,
        }
        socket.send(&reply, 0);
    }
}

/// Answers the request of `stream`.
fn answer(socket: &mut Socket, mut reply: Packet, stream: &[u8], method: &[u8], process: &[u8]) {
    let message: &[u8] = match (process, method) {
        (b"never", _) | (b"hang", b"Wait") => return,
        (b"close", _) => {
            (reply.op, reply.flags) = (op::SHUTDOWN, BOTH);
            return socket.send(&reply, 0);
        }
        (b"garbage", _) => return send(socket, reply, &[b"HTTP/1.1 200 OK\r\n\r\n"]),
        (b"nonsense", _) => &[0xFF; 12],
        // A status: code 7, and a message with a control character.
        (b"deny", _) => b"\x0a\x0f\x08\x07\x12\x0bhost.exec\x1b.",
        (_, b"Wait") => b"\x12\x02\x08\x07",
        (_, b"Stats") => b"\x12\x14\x08\x01\x10\x01\x18\x01\x20\x01\x2a\x0a\x0a\x06Signal\x10\x01",
        _ => b"",
    };
    let stream = u32::from_be_bytes([stream[0], stream[1], stream[2], stream[3]]);
    let stream = if process == b"foreign" { stream + 2 } else { stream };
    let header = [&(message.len() as u32).to_be_bytes()[..], &stream.to_be_bytes(), &[2, 0]];
    if process == b"half" {
        return send(socket, reply, &header[..2]);
    }
    send(socket, reply, &[header[0], header[1], header[2], message]);
}

/// Sends what `parts` are together.
fn send(socket: &mut Socket, mut reply: Packet, parts: &[&[u8]]) {
    let payload = socket.tx_slot(socket.next_slot()) + u64::from(HEADER);
    let bytes = parts.iter().copied().flatten();
    reply.op = op::RW;
    reply.len = (payload..).zip(bytes).map(|(address, byte)| ram::write_u8(address, *byte)).count() as u32;
    socket.send(&reply, reply.len);
}
