//! Drives the first block device: reads sector 0, writes a pattern to sector 8 and
//! reads it back, flushes, asks for the id. Prints one line each:
//!
//! ```text
//! capacity SECTORS
//! read STATUS CHECKSUM        (FNV-1a, 32 bits, hexadecimal)
//! write STATUS                ("write read-only" on a read-only device)
//! read-back STATUS CHECKSUM
//! flush STATUS                ("flush unsupported" if not offered)
//! id STATUS NAME
//! ```
//!
//! Exits with 0 if all went well, 1 if a request failed, 2 without a device, 3 if the device refused to start.
#![no_std]
#![no_main]

use cofferdam_payloads::virtio::{Device, Part, Queue, register};
use cofferdam_payloads::{payload, print, println, ram, serial};

payload!(main);

const BLOCK: u32 = 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

/// Request types (virtio 1.2, 5.2.6).
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// Where things lie in `ram`.
const HEADER: u64 = ram::START + Queue::LENGTH;
const STATUS: u64 = HEADER + 16;
const DATA: u64 = HEADER + 0x1000;
const SECTOR: u32 = 512;
const ID_LENGTH: u32 = 20;
/// A status that no device gives.
const NONE: u8 = 0xFF;

struct Disk {
    device: Device,
    queue: Queue,
    failed: bool,
}

impl Disk {
    /// Makes a request of the header, `data` and the status byte.
    fn request(&mut self, kind: u32, sector: u64, data: Option<Part>) -> u8 {
        ram::write_u32(HEADER, kind);
        ram::write_u32(HEADER + 4, 0);
        ram::write_u64(HEADER + 8, sector);
        ram::write_u8(STATUS, NONE);
        let (header, status) = (Part::read(HEADER, 16), Part::write(STATUS, 1));
        let used = match data {
            Some(data) => self.queue.request(&self.device, &[header, data, status]),
            None => self.queue.request(&self.device, &[header, status]),
        };
        let status = if used.is_some() { ram::read_u8(STATUS) } else { NONE };
        self.failed |= status != 0;
        status
    }
}

fn main() -> u8 {
    let Some(device) = Device::find(BLOCK) else { return 2 };
    let Some(features) = device.negotiate(u64::MAX) else { return 3 };
    let queue = Queue::new(ram::START, 8);
    device.set_up(0, &queue);
    if !device.start() {
        return 3;
    }
    println!("capacity {}", device.read_u64(register::CONFIG));
    let mut disk = Disk { device, queue, failed: false };
    let status = disk.request(READ, 0, Some(Part::write(DATA, SECTOR)));
    println!("read {status} {:08x}", checksum(DATA, SECTOR));
    if features & FEATURE_READ_ONLY == 0 {
        (0..SECTOR).for_each(|index| ram::write_u8(DATA + u64::from(index), index as u8 ^ 0xA5));
        println!("write {}", disk.request(WRITE, 8, Some(Part::read(DATA, SECTOR))));
        ram::fill(DATA, u64::from(SECTOR), 0);
        let status = disk.request(READ, 8, Some(Part::write(DATA, SECTOR)));
        println!("read-back {status} {:08x}", checksum(DATA, SECTOR));
    } else {
        println!("write read-only");
    }
    if features & FEATURE_FLUSH != 0 {
        println!("flush {}", disk.request(FLUSH, 0, None));
    } else {
        println!("flush unsupported");
    }
    ram::fill(DATA, u64::from(ID_LENGTH), 0);
    print!("id {} ", disk.request(GET_ID, 0, Some(Part::write(DATA, ID_LENGTH))));
    let name = (DATA..DATA + u64::from(ID_LENGTH)).map(ram::read_u8);
    name.take_while(|&byte| byte != 0).for_each(serial::write);
    println!();
    u8::from(disk.failed)
}

/// FNV-1a.
fn checksum(address: u64, length: u32) -> u32 {
    (address..address + u64::from(length))
        .fold(0x811C_9DC5, |sum, address| (sum ^ u32::from(ram::read_u8(address))).wrapping_mul(0x0100_0193))
}
