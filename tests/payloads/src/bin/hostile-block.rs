//! Breaks the rules of virtqueues and of the block device on the first drive, while the second is a bystander:
//! its name is in `case=NAME`. See `hostile.rs`.
//!
//! The drives are filled with [`VICTIM`] and [`BYSTANDER`]; the domain has [`MIN_MEMORY`].
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{IO_APIC, MIN_MEMORY, VIRTIO_MMIO, virtio_mmio_pin};
use cofferdam_payloads::cpu::delay;
use cofferdam_payloads::disk::{Disk, IO_ERROR, LENGTH, NONE, OK, SECTOR, UNSUPPORTED, kind};
use cofferdam_payloads::hostile::{checkpoint, choose, eventually, expect_needs_reset};
use cofferdam_payloads::virtio::{
    Device, EVENT_IDX, Part, Queue, VERSION_1, describe_in, flag, register, status,
};
use cofferdam_payloads::{mmio, payload, println, ram};

payload!(main);

/// What the drives are full of.
const VICTIM: u8 = 0xA1;
const BYSTANDER: u8 = 0xB2;

const FIRST: u64 = ram::START;
const SECOND: u64 = FIRST + LENGTH;
/// Memory for the attack.
const FREE: u64 = SECOND + LENGTH;

const ALL_FEATURES: u64 = u64::MAX;
const SIZE: u16 = 8;
const MAX_SIZE: u16 = 256;
/// Descriptor flags: the device writes, and there is a next one.
const WRITE_NEXT: u16 = flag::WRITE | flag::NEXT;

#[derive(Clone, Copy)]
enum Attack {
    /// Spoils a good chain of three descriptors: header, data, status.
    Chain(fn(&Disk)),
    /// Spoils the same chain, described by descriptor 0 and an indirect table.
    Indirect(fn(&Disk)),
    /// Does it all, and leaves the device in any state.
    Any(fn(&mut Disk)),
}

const CASES: &[(&str, Attack)] = &[
    ("loop", Attack::Chain(|d| d.queue.describe(1, d.data(), SECTOR, WRITE_NEXT, 1))),
    ("loop-from-start", Attack::Chain(|d| d.queue.describe(0, d.header(), 16, flag::NEXT, 0))),
    ("next-outside-table", Attack::Chain(next_outside_table)),
    ("head-outside-table", Attack::Any(head_outside_table)),
    ("available-index-jumps", Attack::Any(available_index_jumps)),
    ("zero-length", Attack::Chain(|d| d.queue.describe(1, d.data(), 0, WRITE_NEXT, 2))),
    ("beyond-memory", Attack::Chain(|d| d.queue.describe(1, MIN_MEMORY, SECTOR, WRITE_NEXT, 2))),
    ("across-the-end", Attack::Chain(|d| d.queue.describe(1, MIN_MEMORY - 256, SECTOR, WRITE_NEXT, 2))),
    ("device-registers", Attack::Chain(|d| d.queue.describe(1, VIRTIO_MMIO, SECTOR, WRITE_NEXT, 2))),
    ("address-wraps", Attack::Chain(|d| d.queue.describe(1, u64::MAX - 255, SECTOR, WRITE_NEXT, 2))),
    ("huge-descriptor", Attack::Chain(|d| d.queue.describe(1, d.data(), u32::MAX, WRITE_NEXT, 2))),
    ("huge-chain", Attack::Any(huge_chain)),
    ("large-request", Attack::Any(large_request)),
    ("readable-after-writable", Attack::Chain(readable_after_writable)),
    ("no-status", Attack::Chain(|d| d.queue.describe(0, d.header(), 16, 0, 0))),
    ("short-header", Attack::Chain(|d| d.queue.describe(0, d.header(), 15, flag::NEXT, 1))),
    ("indirect-in-indirect", Attack::Indirect(indirect_in_indirect)),
    ("indirect-in-itself", Attack::Indirect(|d| describe_in(d.table(), 0, d.table(), 48, flag::INDIRECT, 0))),
    ("indirect-loop", Attack::Indirect(|d| describe_in(d.table(), 1, d.data(), SECTOR, WRITE_NEXT, 1))),
    ("indirect-next-outside", Attack::Indirect(indirect_next_outside)),
    ("indirect-with-next", Attack::Indirect(|d| indirect(d, d.table(), 48, flag::NEXT))),
    ("indirect-empty", Attack::Indirect(|d| indirect(d, d.table(), 0, 0))),
    ("indirect-odd-length", Attack::Indirect(|d| indirect(d, d.table(), 56, 0))),
    ("indirect-too-long", Attack::Indirect(|d| indirect(d, d.table(), 16 * 257, 0))),
    ("indirect-huge", Attack::Indirect(|d| indirect(d, d.table(), u32::MAX - 15, 0))),
    ("indirect-beyond-memory", Attack::Indirect(|d| indirect(d, MIN_MEMORY, 48, 0))),
    ("indirect-wraps", Attack::Indirect(|d| indirect(d, u64::MAX - 15, 48, 0))),
    ("indirect-not-negotiated", Attack::Any(indirect_not_negotiated)),
    ("queue-layouts", Attack::Any(queue_layouts)),
    ("queue-not-ready", Attack::Any(queue_not_ready)),
    ("data-over-rings", Attack::Any(data_over_rings)),
    ("set-up-in-flight", Attack::Any(set_up_in_flight)),
    ("reset-in-flight", Attack::Any(reset_in_flight)),
    ("descriptors-in-flight", Attack::Any(descriptors_in_flight)),
    ("notify-before-ready", Attack::Any(notify_before_ready)),
    ("notification-flood", Attack::Any(notification_flood)),
    ("break-flood", Attack::Any(break_flood)),
    ("interrupt-to-nobody", Attack::Any(interrupt_to_nobody)),
    ("event-index", Attack::Any(event_index)),
    ("request-extremes", Attack::Any(request_extremes)),
];

fn main() -> u8 {
    let attack = choose(CASES);
    let mut disk = Disk::new(Device::at(0), FIRST, SIZE);
    let mut bystander = Disk::new(Device::at(1), SECOND, SIZE);
    bystander.start(ALL_FEATURES);
    assert_eq!(bystander.first_byte(), Some(BYSTANDER), "before");
    disk.start(ALL_FEATURES);
    assert_eq!(disk.first_byte(), Some(VICTIM), "before");
    checkpoint("ready");
    match attack {
        Attack::Chain(spoil) => {
            good_chain(&disk);
            spoil(&disk);
            break_by(&mut disk, 0);
        }
        Attack::Indirect(spoil) => {
            good_indirect_chain(&disk);
            spoil(&disk);
            break_by(&mut disk, 0);
        }
        Attack::Any(attack) => attack(&mut disk),
    }
    assert_eq!(bystander.first_byte(), Some(BYSTANDER), "the other drive works");
    disk.queue.size = SIZE;
    disk.start(ALL_FEATURES);
    assert_eq!(disk.first_byte(), Some(VICTIM), "after a reset the drive works again");
    checkpoint("done");
    0
}

/// Reads sector 0, by descriptors 0 to 2.
fn good_chain(disk: &Disk) {
    disk.prepare(kind::READ, 0);
    disk.queue.describe(0, disk.header(), 16, flag::NEXT, 1);
    disk.queue.describe(1, disk.data(), SECTOR, WRITE_NEXT, 2);
    disk.queue.describe(2, disk.status(), 1, flag::WRITE, 0);
}

/// Reads sector 0, by an indirect table that descriptor 0 refers to.
fn good_indirect_chain(disk: &Disk) {
    disk.prepare(kind::READ, 0);
    describe_in(disk.table(), 0, disk.header(), 16, flag::NEXT, 1);
    describe_in(disk.table(), 1, disk.data(), SECTOR, WRITE_NEXT, 2);
    describe_in(disk.table(), 2, disk.status(), 1, flag::WRITE, 0);
    indirect(disk, disk.table(), 48, 0);
}

fn indirect(disk: &Disk, table: u64, length: u32, flags: u16) {
    disk.queue.describe(0, table, length, flag::INDIRECT | flags, 1);
}

/// Makes the chain at `head` available, which the device must refuse: it says so, gives nothing back, and does
/// nothing more until it is reset.
fn break_by(disk: &mut Disk, head: u16) {
    disk.queue.offer(head);
    disk.device.notify(0);
    expect_refused(disk);
}

fn expect_refused(disk: &mut Disk) {
    expect_needs_reset(&disk.device);
    assert_eq!(disk.queue.poll(), None, "the chain was not given back");
    good_chain(disk);
    disk.queue.offer(0);
    disk.device.notify(0);
    (0..50).for_each(|_| delay());
    assert_eq!(disk.queue.poll(), None, "nothing is done any more");
    assert!(disk.device.needs_reset(), "it stays so");
}

/// The chain would be good without its third descriptor.
fn readable_after_writable(disk: &Disk) {
    disk.queue.describe(2, disk.header(), 16, flag::NEXT, 3);
    disk.queue.describe(3, disk.status(), 1, flag::WRITE, 0);
}

// What the next cases refer to beyond a table is good, if only it were in the table.

fn next_outside_table(disk: &Disk) {
    disk.queue.describe(1, disk.data(), SECTOR, WRITE_NEXT, SIZE);
    disk.queue.describe(SIZE, disk.status(), 1, flag::WRITE, 0);
}

fn indirect_next_outside(disk: &Disk) {
    describe_in(disk.table(), 1, disk.data(), SECTOR, WRITE_NEXT, 3);
    describe_in(disk.table(), 3, disk.status(), 1, flag::WRITE, 0);
}

fn indirect_in_indirect(disk: &Disk) {
    describe_in(disk.table(), 1, FREE, 32, flag::INDIRECT, 0);
    describe_in(FREE, 0, disk.data(), SECTOR, WRITE_NEXT, 1);
    describe_in(FREE, 1, disk.status(), 1, flag::WRITE, 0);
}

fn head_outside_table(disk: &mut Disk) {
    good_chain(disk);
    disk.queue.describe(SIZE, disk.header(), 16, flag::NEXT, 1);
    break_by(disk, SIZE);
}

fn available_index_jumps(disk: &mut Disk) {
    good_chain(disk);
    disk.queue.set_available_index(disk.queue.next_available.wrapping_add(SIZE + 1));
    disk.device.notify(0);
    expect_refused(disk);
}

/// More than 4 GiB, all of it in memory.
fn huge_chain(disk: &mut Disk) {
    disk.queue.size = MAX_SIZE;
    disk.start(ALL_FEATURES);
    disk.prepare(kind::READ, 0);
    disk.queue.describe(0, disk.header(), 16, flag::NEXT, 1);
    let length = (MIN_MEMORY - ram::START) as u32;
    (1..MAX_SIZE - 1).for_each(|index| {
        disk.queue.describe(index, ram::START, length, WRITE_NEXT, index + 1);
    });
    disk.queue.describe(MAX_SIZE - 1, disk.status(), 1, flag::WRITE, 0);
    break_by(disk, 0);
}

/// Just below 4 GiB, all of it in memory: an I/O error, as no request is that large.
fn large_request(disk: &mut Disk) {
    disk.queue.size = MAX_SIZE;
    disk.start(ALL_FEATURES);
    let length = (MIN_MEMORY - ram::START) as u32;
    for (kind, flags) in [(kind::READ, WRITE_NEXT), (kind::WRITE, flag::NEXT)] {
        disk.prepare(kind, 0);
        disk.queue.describe(0, disk.header(), 16, flag::NEXT, 1);
        let last = (u32::MAX / length) as u16;
        (1..=last).for_each(|index| {
            disk.queue.describe(index, FREE & !0xFFF, length - 0x40_0000, flags, index + 1)
        });
        disk.queue.describe(last + 1, disk.status(), 1, flag::WRITE, 0);
        disk.queue.offer(0);
        disk.device.notify(0);
        assert!(disk.queue.wait(&disk.device).is_some(), "answered");
        assert_eq!(ram::read_u8(disk.status()), IO_ERROR);
    }
}

fn indirect_not_negotiated(disk: &mut Disk) {
    disk.start(VERSION_1);
    good_indirect_chain(disk);
    break_by(disk, 0);
}

/// Where the driver says that a queue lies.
#[derive(Clone, Copy)]
struct Layout {
    size: u32,
    table: u64,
    available: u64,
    used: u64,
}

/// Every queue that cannot be.
fn queue_layouts(disk: &mut Disk) {
    let queue = &disk.queue;
    let good = Layout {
        size: u32::from(SIZE),
        table: queue.table(),
        available: queue.available(),
        used: queue.used(),
    };
    let last = !0xF;
    let bad = [
        Layout { size: 0, ..good },
        Layout { size: 3, ..good },
        Layout { size: 512, ..good },
        Layout { size: 1 << 16, ..good },
        Layout { size: u32::MAX, ..good },
        Layout { table: MIN_MEMORY, ..good },
        Layout { table: MIN_MEMORY - 16, ..good },
        Layout { table: VIRTIO_MMIO, ..good },
        Layout { table: last, ..good },
        Layout { table: good.table + 8, ..good },
        Layout { available: MIN_MEMORY, ..good },
        Layout { available: MIN_MEMORY - 16, ..good },
        Layout { available: last, ..good },
        Layout { available: good.available + 1, ..good },
        Layout { used: MIN_MEMORY, ..good },
        Layout { used: MIN_MEMORY - 16, ..good },
        Layout { used: last, ..good },
        Layout { used: good.used + 2, ..good },
    ];
    for (index, layout) in bad.iter().enumerate() {
        println!("layout {index}");
        set_up(&disk.device, layout);
        expect_needs_reset(&disk.device);
        disk.device.notify(0);
        assert!(!disk.device.start(), "it stays so");
    }
    set_up(&disk.device, &good);
    assert!(!disk.device.needs_reset(), "the good layout is good");
}

fn set_up(device: &Device, layout: &Layout) {
    assert!(device.negotiate(ALL_FEATURES).is_some());
    device.write(register::QUEUE_SEL, 0);
    device.write(register::QUEUE_NUM, layout.size);
    for (low, address) in [
        (register::QUEUE_DESC_LOW, layout.table),
        (register::QUEUE_DRIVER_LOW, layout.available),
        (register::QUEUE_DEVICE_LOW, layout.used),
    ] {
        device.write(low, address as u32);
        device.write(low + 4, (address >> 32) as u32);
    }
    device.write(register::QUEUE_READY, 1);
    device.add_status(status::DRIVER_OK);
}

fn queue_not_ready(disk: &mut Disk) {
    assert!(disk.device.negotiate(ALL_FEATURES).is_some());
    assert!(!disk.device.start());
    expect_needs_reset(&disk.device);
}

/// Reads the drive's content over the queue's own table and rings.
fn data_over_rings(disk: &mut Disk) {
    for target in [disk.queue.table(), disk.queue.available(), disk.queue.used()] {
        disk.start(ALL_FEATURES);
        good_chain(disk);
        disk.queue.describe(1, target, 2 * SECTOR, WRITE_NEXT, 2);
        disk.queue.offer(0);
        disk.device.notify(0);
        eventually("an answer", || disk.device.needs_reset() || ram::read_u8(disk.status()) != NONE);
        // What is there now is the device's to judge, at its next look.
        disk.device.notify(0);
    }
    // All in one place.
    let base = disk.queue.table();
    set_up(&disk.device, &Layout { size: u32::from(SIZE), table: base, available: base, used: base });
    disk.device.notify(0);
}

/// Fills the queue with good requests for `length` bytes each.
fn fill(disk: &mut Disk, length: u32) -> u16 {
    disk.prepare(kind::READ, 0);
    let requests = MAX_SIZE / 4;
    for request in 0..requests {
        let first = request * 4;
        disk.queue.describe(first, disk.header(), 16, flag::NEXT, first + 1);
        disk.queue.describe(first + 1, FREE & !0xFFF, length, WRITE_NEXT, first + 2);
        disk.queue.describe(first + 2, disk.status(), 1, flag::WRITE, 0);
        disk.queue.offer(first);
    }
    requests
}

fn start_large(disk: &mut Disk) {
    disk.queue.size = MAX_SIZE;
    disk.start(ALL_FEATURES);
}

/// The queue's registers change while requests are under way: that is ignored.
fn set_up_in_flight(disk: &mut Disk) {
    start_large(disk);
    let requests = fill(disk, 64 << 10);
    disk.device.notify(0);
    for offset in [
        register::QUEUE_READY,
        register::QUEUE_NUM,
        register::QUEUE_DESC_LOW,
        register::QUEUE_DESC_LOW + 4,
        register::QUEUE_DRIVER_LOW,
        register::QUEUE_DRIVER_LOW + 4,
        register::QUEUE_DEVICE_LOW,
        register::QUEUE_DEVICE_LOW + 4,
        register::DRIVER_FEATURES,
    ] {
        for value in [0, 1, u32::MAX] {
            disk.device.write(offset, value);
        }
    }
    disk.device.write(register::QUEUE_READY, 0);
    assert_eq!(disk.device.read(register::QUEUE_READY), 1, "the queue stays ready");
    for step in [status::ACKNOWLEDGE, status::DRIVER_OK, u32::MAX] {
        disk.device.write(register::STATUS, step);
    }
    (0..requests).for_each(|_| assert!(disk.queue.wait(&disk.device).is_some(), "every request is answered"));
    assert_eq!(disk.first_byte(), Some(VICTIM), "and the next one");
}

/// The device is reset while requests are under way: from then on it leaves memory alone.
fn reset_in_flight(disk: &mut Disk) {
    for _ in 0..20 {
        start_large(disk);
        fill(disk, 64 << 10);
        disk.device.notify(0);
        disk.device.write(register::STATUS, 0);
        assert_eq!(disk.device.read(register::STATUS), 0);
        ram::write_u8(disk.status(), NONE);
        ram::write_u64(FREE & !0xFFF, 0);
        let used = disk.queue.used();
        let before = ram::read_u32(used);
        (0..100).for_each(|_| delay());
        assert_eq!(ram::read_u32(used), before, "nothing is given back after a reset");
        assert_eq!((ram::read_u8(disk.status()), ram::read_u64(FREE & !0xFFF)), (NONE, 0));
    }
}

/// Descriptors and rings change while requests are under way: each is answered, or the device needs reset.
fn descriptors_in_flight(disk: &mut Disk) {
    for round in 0..20_u16 {
        start_large(disk);
        fill(disk, 4 << 10);
        disk.device.notify(0);
        for index in (0..MAX_SIZE).rev().step_by(3) {
            disk.queue.describe(index, MIN_MEMORY - 1, u32::MAX, WRITE_NEXT | flag::INDIRECT, index);
        }
        disk.queue.set_available_index(round.wrapping_mul(0x1111));
        disk.device.notify(0);
    }
}

/// Queue numbers that a notification may name.
const NAMES: [u32; 5] = [0, 1, 2, 1 << 16, u32::MAX];

fn notify_before_ready(disk: &mut Disk) {
    let device = disk.device;
    let notify = || NAMES.iter().for_each(|&queue| device.notify(queue));
    device.write(register::STATUS, 0);
    notify();
    for bits in [status::ACKNOWLEDGE, status::DRIVER] {
        device.add_status(bits);
        notify();
    }
    assert!(device.negotiate(ALL_FEATURES).is_some());
    notify();
    device.set_up(0, &disk.queue);
    notify();
    assert_eq!(device.read(register::STATUS) & (status::DRIVER_OK | status::NEEDS_RESET), 0);
    disk.start(ALL_FEATURES);
    assert_eq!(disk.first_byte(), Some(VICTIM), "none of them mattered");
}

fn notification_flood(disk: &mut Disk) {
    for _ in 0..10_000 {
        NAMES.iter().for_each(|&queue| disk.device.notify(queue));
    }
    assert_eq!(disk.first_byte(), Some(VICTIM), "it still works");
}

/// Breaks the device and resets it, again and again.
fn break_flood(disk: &mut Disk) {
    for _ in 0..300 {
        disk.device.write(register::STATUS, 0);
        assert!(disk.device.negotiate(ALL_FEATURES).is_some());
        assert!(!disk.device.start(), "a queue is missing");
    }
}

/// The drive's interrupt goes to a logical destination that no CPU has.
fn interrupt_to_nobody(disk: &mut Disk) {
    const NOBODY: u32 = 0x55 << 24;
    const LOGICAL: u32 = 1 << 11;
    const VECTOR: u32 = 0x40;
    let entry = 0x10 + 2 * u32::from(virtio_mmio_pin(0));
    for (index, value) in [(entry + 1, NOBODY), (entry, LOGICAL | VECTOR)] {
        mmio::write_u32(IO_APIC, index);
        mmio::write_u32(IO_APIC + 0x10, value);
    }
    for _ in 0..200 {
        assert_eq!(disk.first_byte(), Some(VICTIM), "a driver that polls needs no interrupt");
    }
    mmio::write_u32(IO_APIC, entry);
    mmio::write_u32(IO_APIC + 0x10, 1 << 16);
}

/// `EVENT_IDX`, with events that never come or come always.
fn event_index(disk: &mut Disk) {
    let device = disk.device;
    for used_event in [0, 1, 0x7FFF, 0x8000, 0xFFFF] {
        device.write(register::STATUS, 0);
        device.add_status(status::ACKNOWLEDGE);
        device.add_status(status::DRIVER);
        device.set_features(device.features() & (VERSION_1 | EVENT_IDX));
        assert!(device.add_status(status::FEATURES_OK));
        disk.queue = Queue::new(FIRST, SIZE);
        ram::write_u16(disk.queue.available() + 4 + 2 * u64::from(SIZE), used_event);
        device.set_up(0, &disk.queue);
        assert!(device.start());
        assert_eq!(disk.first_byte(), Some(VICTIM), "used_event {used_event}");
    }
}

/// Requests that a good chain carries, but that no drive can do: an error each, and the drive goes on.
fn request_extremes(disk: &mut Disk) {
    let (data, end) = (disk.data(), disk.device.read_u64(register::CONFIG));
    for sector in [end, end + 1, 1 << 55, u64::MAX / 512, u64::MAX] {
        for (kind, part) in [(kind::READ, Part::write(data, SECTOR)), (kind::WRITE, Part::read(data, SECTOR))]
        {
            assert_eq!(disk.request(kind, sector, Some(part)), IO_ERROR, "{kind} at {sector:#x}");
        }
    }
    for length in [1, SECTOR - 1, SECTOR + 1] {
        assert_eq!(disk.request(kind::READ, 0, Some(Part::write(data, length))), IO_ERROR, "{length}");
        assert_eq!(disk.request(kind::WRITE, 0, Some(Part::read(data, length))), IO_ERROR, "{length}");
    }
    for unknown in [2, 3, 5, 7, 9, 10, 12, 14, 1 << 31, u32::MAX] {
        assert_eq!(disk.request(unknown, 0, Some(Part::write(data, SECTOR))), UNSUPPORTED, "{unknown}");
    }
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        for (sector, sectors, flags, expected) in [
            (end, 1, 0, IO_ERROR),
            (u64::MAX, 1, 0, IO_ERROR),
            (0, u32::MAX, 0, IO_ERROR),
            (0, 1, 1 << 31, UNSUPPORTED),
            (0, 0, u32::MAX, UNSUPPORTED),
        ] {
            ram::write_u64(data, sector);
            ram::write_u32(data + 8, sectors);
            ram::write_u32(data + 12, flags);
            let status = disk.request(kind, 0, Some(Part::read(data, 16)));
            assert_eq!(status, expected, "{kind} at {sector:#x} for {sectors:#x}, {flags:#x}");
        }
        for length in [0, 15, 17, 32] {
            let part = (length > 0).then_some(Part::read(data, length));
            assert_eq!(disk.request(kind, 0, part), IO_ERROR, "{kind} with {length} bytes");
        }
    }
    for length in [1, 19, 20, 21, SECTOR] {
        assert_eq!(
            disk.request(kind::GET_ID, u64::MAX, Some(Part::write(data, length))),
            OK,
            "id of {length}"
        );
    }
    assert_eq!(disk.request(kind::FLUSH, u64::MAX, Some(Part::read(data, 1))), OK);
    assert_eq!(disk.first_byte(), Some(VICTIM), "it still works");
}
