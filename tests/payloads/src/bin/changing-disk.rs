//! Watches the first block device: prints "N sectors, first byte B" at the start, whenever the device says that its
//! configuration has changed, and when a byte is typed. Ends at a "q".
#![no_std]
#![no_main]

use cofferdam_payloads::disk::Disk;
use cofferdam_payloads::virtio::{Device, register};
use cofferdam_payloads::{payload, println, ram, serial};

payload!(main);

const BLOCK: u32 = 2;
/// "The configuration has changed", in the interrupt status.
const CONFIG_CHANGED: u32 = 2;

fn main() -> u8 {
    let Some(device) = Device::find(BLOCK) else { return 1 };
    let mut disk = Disk::new(device, ram::START, 8);
    disk.start(u64::MAX);
    show("start", &mut disk);
    loop {
        let pending = disk.device.read(register::INTERRUPT_STATUS);
        disk.device.write(register::INTERRUPT_ACK, pending);
        if pending & CONFIG_CHANGED != 0 {
            show("change", &mut disk);
        }
        match serial::read() {
            Some(b'q') => return 0,
            Some(_) => show("look", &mut disk),
            None => {}
        }
    }
}

fn show(why: &str, disk: &mut Disk) {
    let generation = disk.device.read(register::CONFIG_GENERATION);
    let sectors = disk.device.read_u64(register::CONFIG);
    let first = disk.first_byte().map_or(-1, i32::from);
    println!("{why} {generation}: {sectors} sectors, first byte {first}");
}
