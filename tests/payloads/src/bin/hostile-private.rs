//! Puts virtqueues and buffers into the private memory of a SEV-SNP domain, which a device must not touch: it says that it needs
//! a reset, and works after one. The first drive is full of [`VICTIM`]; there is a vsock device. The domain has 64 MiB.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{MIB, PAGE_SIZE};
use cofferdam_payloads::disk::{Disk, LENGTH, SECTOR, kind};
use cofferdam_payloads::hostile::expect_needs_reset;
use cofferdam_payloads::virtio::{Device, Queue, flag, status};
use cofferdam_payloads::{payload, println, ram, snp};

payload!(main);

/// What the drive is full of.
const VICTIM: u8 = 0xA1;
/// `VIRTIO_ID_VSOCK`, and its queue of packets to the host.
const VSOCK: u32 = 19;
const TX: u32 = 1;
const VSOCK_QUEUES: u64 = (ram::START + LENGTH).next_multiple_of(PAGE_SIZE);
/// Memory that nobody has shared or accepted.
const UNCLAIMED: u64 = 32 * MIB;

fn main() -> u8 {
    assert!(snp::is_active(), "this is for SEV-SNP");
    let mut disk = Disk::new(Device::at(0), ram::START, 8);
    let pages = [
        ("descriptor table", disk.queue.table()),
        ("available ring", disk.queue.available()),
        ("used ring", disk.queue.used()),
        ("header and status", disk.header()),
        ("indirect table", disk.table()),
        ("data", disk.data()),
    ];
    for (name, page) in pages {
        works(&mut disk);
        let data = disk.data();
        describe(&disk, data);
        if page == disk.table() {
            disk.queue.describe(0, page, 48, flag::INDIRECT, 0);
        }
        // A queue cannot be written when it is private; a buffer is to be private before the device may look at it.
        let is_queue = page < disk.header();
        if is_queue {
            disk.queue.offer(0);
        }
        snp::make_private(page..page + PAGE_SIZE);
        if !is_queue {
            disk.queue.offer(0);
        }
        disk.device.notify(0);
        expect_needs_reset(&disk.device);
        println!("private {name}: refused");
        snp::make_shared(page..page + PAGE_SIZE);
    }
    for (name, address) in [("unclaimed", UNCLAIMED), ("half shared", disk.data() + 0xF00)] {
        works(&mut disk);
        let behind = disk.data() + PAGE_SIZE..disk.data() + 2 * PAGE_SIZE;
        snp::make_private(behind.clone());
        describe(&disk, address);
        disk.queue.offer(0);
        disk.device.notify(0);
        expect_needs_reset(&disk.device);
        println!("{name} data: refused");
        snp::make_shared(behind);
    }
    works(&mut disk);
    vsock();
    works(&mut disk);
    println!("the drive works");
    0
}

/// Resets the drive, and reads from it.
fn works(disk: &mut Disk) {
    disk.start(u64::MAX);
    assert_eq!(disk.first_byte(), Some(VICTIM), "after a reset the drive works");
}

/// Describes a request that would be good if its memory were shared: sector 0 to `data`.
fn describe(disk: &Disk, data: u64) {
    disk.prepare(kind::READ, 0);
    disk.queue.describe(0, disk.header(), 16, flag::NEXT, 1);
    disk.queue.describe(1, data, SECTOR, flag::WRITE | flag::NEXT, 2);
    disk.queue.describe(2, disk.status(), 1, flag::WRITE, 0);
}

/// A packet to the host in a queue that is private.
fn vsock() {
    let device = Device::find(VSOCK);
    assert!(device.is_some(), "there is a vsock device");
    let Some(device) = device else { return };
    let queues = [0, 1, 2].map(|number| Queue::new(VSOCK_QUEUES + number * Queue::LENGTH, 8));
    assert!(device.negotiate(u64::MAX).is_some(), "vsock refused its features");
    for (index, queue) in (0..).zip(&queues) {
        device.set_up(index, queue);
    }
    assert!(device.add_status(status::DRIVER_OK), "vsock did not start");
    let ring = queues[TX as usize].available()..queues[TX as usize].used();
    snp::make_private(ring.clone());
    device.notify(TX);
    expect_needs_reset(&device);
    println!("private queue of vsock: refused");
    snp::make_shared(ring);
}
