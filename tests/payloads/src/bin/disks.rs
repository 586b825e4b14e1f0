//! Makes requests to every block device, one device after the other. On the command line:
//!
//! | option | meaning | without it |
//! |---|---|---|
//! | `op=NAME` | `read`, `write`, `keep` (a write and then a flush), `discard`, or `zero`: write zeroes | `read` |
//! | `repeat=N` | requests per device, each a page further, and again from the start at the end | 1 |
//! | `from=N` | page of the first one | 0 |
//! | `wait=1` | prints "ready" first and waits for a byte | at once |
//!
//! Prints "disk SLOT: DONE done, FAILED failed, first byte B" for each; B is that of sector 0. Exits with the number of
//! devices.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{PAGE_SIZE, VIRTIO_MMIO_SLOTS};
use cofferdam_payloads::disk::{self, Disk, kind};
use cofferdam_payloads::virtio::{Device, Part, register};
use cofferdam_payloads::{entry, payload, println, ram, serial};

payload!(main);

const BLOCK: u32 = 2;
/// Bytes of a segment of discard and write zeroes (virtio 1.2, 5.2.6): sector, number of sectors, flags.
const SEGMENT: u32 = 16;
const SECTORS_PER_PAGE: u64 = PAGE_SIZE / disk::SECTOR as u64;

fn main() -> u8 {
    let repeat = entry::number("repeat").unwrap_or(1);
    let from = entry::number("from").unwrap_or(0);
    let operation = entry::option("op").unwrap_or(b"read");
    if entry::option("wait").is_some() {
        println!("ready");
        while serial::read().is_none() {}
    }
    let mut count = 0;
    for slot in 0..VIRTIO_MMIO_SLOTS {
        let device = Device::at(slot);
        if device.read(register::DEVICE_ID) != BLOCK {
            continue;
        }
        let mut disk = Disk::new(device, ram::START, 8);
        disk.start(u64::MAX);
        let page = disk.data();
        let pages = (disk.device.read_u64(register::CONFIG) / SECTORS_PER_PAGE).max(1);
        let done = (0..repeat).filter(|index| {
            let sector = (from + index) % pages * SECTORS_PER_PAGE;
            let (kind, data) = match operation {
                b"read" => (kind::READ, Part::write(page, PAGE_SIZE as u32)),
                b"discard" | b"zero" => {
                    ram::write_u64(page, sector);
                    ram::write_u32(page + 8, SECTORS_PER_PAGE as u32);
                    ram::write_u32(page + 12, 0);
                    let kind = if operation == b"zero" { kind::WRITE_ZEROES } else { kind::DISCARD };
                    (kind, Part::read(page, SEGMENT))
                }
                _ => (kind::WRITE, Part::read(page, PAGE_SIZE as u32)),
            };
            let done = disk.request(kind, sector, Some(data)) == disk::OK;
            done && (operation != b"keep" || disk.request(kind::FLUSH, 0, None) == disk::OK)
        });
        let done = done.count() as u64;
        let first = disk.first_byte().map_or(-1, i32::from);
        println!("disk {slot}: {done} done, {} failed, first byte {first}", repeat - done);
        count += 1;
    }
    count
}
