//! Touches registers as no driver does: its name is in `case=NAME`. See `hostile.rs`.
//!
//! The domain has drives in slots 0 and 1, vsock in slot 2, and nothing in slot 3.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{
    EVENT_PORT, EXIT_CODE_PORT, GUEST_PORT_MMIO, I8042_DATA_PORT, IO_APIC, PVPANIC_PORT, REFUSAL_PORT,
    SERIAL_PORT, SLEEP_CONTROL_PORT, STEP_PORT, VIRTIO_MMIO_STRIDE, virtio_mmio_pin,
};
use cofferdam_payloads::cpu::{inb, inl, insb, inw, outb, outl, outsb, outw};
use cofferdam_payloads::disk::Disk;
use cofferdam_payloads::hostile::{checkpoint, choose};
use cofferdam_payloads::socket::Socket;
use cofferdam_payloads::virtio::{Device, VERSION_1, register, status};
use cofferdam_payloads::{mmio, payload, ram, serial};

payload!(main);

const DRIVES: [u8; 2] = [0xA1, 0xB2];
const VSOCK: u8 = 2;
const EMPTY: u8 = 3;
const WIDTHS: [u64; 4] = [1, 2, 4, 8];
const ALL_FEATURES: u64 = u64::MAX;
/// What is written where nothing should be.
const EXTREMES: [u64; 4] = [0, 1, 0xA5A5_5A5A_A5A5_5A5A, u64::MAX];

/// Registers that a driver may write (virtio 1.2, 4.2.2); the others of the page are read-only, or not there.
const WRITABLE: [u64; 16] = [
    register::DEVICE_FEATURES_SEL,
    register::DRIVER_FEATURES,
    register::DRIVER_FEATURES_SEL,
    register::QUEUE_SEL,
    register::QUEUE_NUM,
    register::QUEUE_READY,
    register::QUEUE_NOTIFY,
    register::INTERRUPT_ACK,
    register::STATUS,
    register::QUEUE_DESC_LOW,
    register::QUEUE_DESC_LOW + 4,
    register::QUEUE_DRIVER_LOW,
    register::QUEUE_DRIVER_LOW + 4,
    register::QUEUE_DEVICE_LOW,
    register::QUEUE_DEVICE_LOW + 4,
    0xAC, // SHMSel
];

const CASES: &[(&str, fn())] = &[
    ("widths", widths),
    ("read-only", read_only),
    ("status", status_values),
    ("selectors", selectors),
    ("io-apic", io_apic),
    ("ports", ports),
    ("strings", strings),
];

fn main() -> u8 {
    let attack = choose(CASES);
    works();
    checkpoint("ready");
    attack();
    works();
    checkpoint("done");
    0
}

/// Every device does what it is for.
fn works() {
    for (slot, fill) in (0..).zip(DRIVES) {
        let mut disk = start_disk(slot);
        assert_eq!(disk.first_byte(), Some(fill), "drive {slot}");
    }
    let mut socket = Socket::start(Device::at(VSOCK), ram::START, 8);
    assert!(!socket.connect(1000, 1), "nobody listens there, and vsock says so");
    socket.device.write(register::STATUS, 0);
    assert_eq!(inb(SERIAL_PORT + 5) & 0x20, 0x20, "the serial port can send");
}

fn start_disk(slot: u8) -> Disk {
    let mut disk = Disk::new(Device::at(slot), ram::START, 8);
    disk.start(ALL_FEATURES);
    disk
}

/// Slots with a device.
fn devices() -> impl Iterator<Item = Device> {
    (0..=VSOCK).map(Device::at)
}

/// Calls `check` with `device` at each step from reset to live.
fn at_each_step(device: Device, check: impl Fn(Device)) {
    device.write(register::STATUS, 0);
    check(device);
    for bits in [status::ACKNOWLEDGE, status::DRIVER] {
        assert!(device.add_status(bits));
        check(device);
    }
    assert!(device.negotiate(ALL_FEATURES).is_some());
    check(device);
    if device.base() < Device::at(VSOCK).base() {
        let mut disk = Disk::new(device, ram::START, 8);
        disk.start(ALL_FEATURES);
    } else {
        Socket::start(device, ram::START, 8);
    }
    check(device);
}

/// What can be read of a device: registers and configuration, as a sum that tells any change.
fn contents(device: Device) -> u64 {
    (0..0x200).step_by(4).fold(0, |sum: u64, offset| {
        sum.rotate_left(7) ^ u64::from(device.read(offset)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}

/// The offsets at which something is, and the last of the page, from where accesses reach into the next.
fn offsets() -> impl Iterator<Item = u64> {
    (0..0x180).chain(VIRTIO_MMIO_STRIDE - 9..VIRTIO_MMIO_STRIDE)
}

fn is_register(offset: u64, width: u64) -> bool {
    width == 4 && offset.is_multiple_of(4) && offset < register::CONFIG
}

/// Accesses of any width at any offset: registers answer aligned ones of four bytes only, the configuration any.
fn widths() {
    for device in devices() {
        let before = contents(device);
        for (offset, width) in offsets().flat_map(|offset| WIDTHS.map(|width| (offset, width))) {
            let value = mmio::read(device.base() + offset, width);
            if offset < register::CONFIG && !is_register(offset, width) {
                assert_eq!(value, 0, "{width} bytes at {offset:#x}");
            } else if (register::CONFIG..0x180 - 8).contains(&offset) {
                let bytes = (0..width).map(|at| u64::from(device.read_u8(offset + at)) << (8 * at));
                assert_eq!(value, bytes.sum::<u64>(), "{width} bytes at {offset:#x}");
            }
            if !is_register(offset, width) && offset + width <= VIRTIO_MMIO_STRIDE {
                EXTREMES.iter().for_each(|&value| mmio::write(device.base() + offset, width, value));
            }
        }
        assert_eq!(contents(device), before, "nothing was written");
    }
    let empty = Device::at(EMPTY).base();
    for (offset, width) in (0..0x180).flat_map(|offset| WIDTHS.map(|width| (offset, width))) {
        let ones = u64::MAX >> (64 - 8 * width);
        assert_eq!(mmio::read(empty + offset, width), ones, "nobody is there");
        mmio::write(empty + offset, width, 0);
    }
}

/// Writes to what cannot be written, at each step.
fn read_only() {
    for device in devices() {
        at_each_step(device, |device| {
            let before = contents(device);
            for offset in (0..0x180).step_by(4).filter(|offset| !WRITABLE.contains(offset)) {
                EXTREMES.iter().for_each(|&value| device.write(offset, value as u32));
            }
            assert_eq!(contents(device), before, "nothing was written");
            assert!(!device.needs_reset());
        });
    }
}

/// Every value of the status register, at each step.
fn status_values() {
    const STEPS: [u32; 4] = [0, status::ACKNOWLEDGE, status::ACKNOWLEDGE | status::DRIVER, 11];
    let values = (1..=0xFF).chain((8..32).map(|bit| 1 << bit)).chain([u32::MAX]);
    for device in devices() {
        for (step, value) in STEPS.iter().flat_map(|&step| values.clone().map(move |value| (step, value))) {
            device.write(register::STATUS, 0);
            device.write(register::STATUS, step & status::ACKNOWLEDGE);
            device.write(register::STATUS, step & (status::ACKNOWLEDGE | status::DRIVER));
            device.set_features(VERSION_1);
            device.write(register::STATUS, step);
            assert_eq!(device.read(register::STATUS), step);
            device.write(register::STATUS, value);
            let now = device.read(register::STATUS);
            assert_eq!(now & step, step, "{value:#x} took a bit from {step:#x}: {now:#x}");
            assert_eq!(now & !step & !value & !status::NEEDS_RESET, 0, "{value:#x} at {step:#x}: {now:#x}");
            let live = now & status::DRIVER_OK != 0;
            assert!(!live || step & status::FEATURES_OK != 0, "{value:#x} at {step:#x}: {now:#x}");
            assert!(!live || device.needs_reset(), "no queue was set up");
        }
    }
}

/// Queues, halves of features and shared memory that there are not.
fn selectors() {
    for device in devices() {
        at_each_step(device, |device| {
            for select in [3, 0xFF, 1 << 16, 1 << 31, u32::MAX] {
                device.write(register::QUEUE_SEL, select);
                assert_eq!(device.read(register::QUEUE_NUM_MAX), 0);
                for offset in WRITABLE.into_iter().filter(|&offset| {
                    offset == register::QUEUE_NUM
                        || offset == register::QUEUE_READY
                        || (register::QUEUE_DESC_LOW..0xAC).contains(&offset)
                }) {
                    EXTREMES.iter().for_each(|&value| device.write(offset, value as u32));
                }
                assert_eq!(device.read(register::QUEUE_READY), 0);
                device.write(register::DEVICE_FEATURES_SEL, select);
                assert_eq!(device.read(register::DEVICE_FEATURES), 0);
                device.write(0xAC, select);
                assert_eq!((device.read(0xB0), device.read(0xB4)), (u32::MAX, u32::MAX), "no shared memory");
                device.write(register::INTERRUPT_ACK, select);
            }
            device.write(register::QUEUE_SEL, 0);
            assert!(!device.needs_reset());
        });
        // Features that were not offered.
        for (low, high) in [(u32::MAX, u32::MAX), (u32::MAX, 1), (0, 1 | 1 << 31), (0, 0)] {
            device.write(register::STATUS, 0);
            assert!(device.add_status(status::ACKNOWLEDGE) && device.add_status(status::DRIVER));
            device.set_features(u64::from(low) | u64::from(high) << 32);
            assert!(!device.add_status(status::FEATURES_OK), "{low:#x} {high:#x}");
        }
    }
}

/// The interrupt controller, with every pin masked throughout: what it delivers is the guest's own affair.
fn io_apic() {
    const ID: u32 = 0x0100_0000;
    /// No pin beyond those of the devices.
    const PINS: u32 = virtio_mmio_pin(EMPTY) as u32;
    const VERSION: u32 = 0x20 | (PINS - 1) << 16;
    const MASKED: u32 = 1 << 16;
    const SEND_PENDING: u32 = 1 << 12;
    let entries = (0..PINS).map(|pin| 0x10 + 2 * pin);
    for index in (0..=0xFF).chain([0x100, 1 << 16, u32::MAX]) {
        // What is beyond a byte is not kept, so the mask goes with each write.
        for value in [u32::MAX, MASKED, 0xA5A5_5A5A | MASKED] {
            set(index, value);
        }
    }
    entries.clone().for_each(|entry| {
        set(entry, MASKED);
        set(entry + 1, 0);
    });
    set(0, ID);
    [1, 2, 3, 0xF, 0xC0, 0xFF].into_iter().for_each(|read_only| set(read_only, u32::MAX));
    assert_eq!((get(0), get(1), get(2), get(3), get(0xC0)), (ID, VERSION, ID, 0, 0));

    mmio::write_u32(IO_APIC, 0);
    for (offset, width) in
        (0..0x60).chain(0xFF8..0x1000).flat_map(|offset| WIDTHS.map(|width| (offset, width)))
    {
        let is_register = width == 4 && (offset == 0 || offset == 0x10);
        if offset + width <= 0x1000 && !is_register {
            assert_eq!(mmio::read(IO_APIC + offset, width), 0, "{width} bytes at {offset:#x}");
            EXTREMES.iter().for_each(|&value| mmio::write(IO_APIC + offset, width, value));
            assert_eq!(
                (mmio::read_u32(IO_APIC), mmio::read_u32(IO_APIC + 0x10)),
                (0, ID),
                "nothing was written"
            );
        }
    }
    // An edge that met the mask shows as one that is to be sent.
    let untouched = |entry| (get(entry) & !SEND_PENDING, get(entry + 1)) == (MASKED, 0);
    assert!(entries.clone().all(untouched), "nor to a pin");

    for (offset, width) in (0..8).flat_map(|offset| WIDTHS.map(|width| (offset, width))) {
        mmio::read(GUEST_PORT_MMIO + offset, width);
        // A refusal ends the domain.
        if !(offset..offset + width).contains(&u64::from(REFUSAL_PORT - EXIT_CODE_PORT)) {
            let fatal = (offset, width) == (u64::from(STEP_PORT - EXIT_CODE_PORT), 4);
            mmio::write(GUEST_PORT_MMIO + offset, width, if fatal { NOT_FATAL.into() } else { u64::MAX });
        }
    }
}

/// All of a report of init but the bit that ends the domain.
const NOT_FATAL: u32 = u32::MAX >> 1;

/// Reads a register of the interrupt controller.
fn get(index: u32) -> u32 {
    mmio::write_u32(IO_APIC, index);
    mmio::read_u32(IO_APIC + 0x10)
}

/// Writes a register of the interrupt controller.
fn set(index: u32, value: u32) {
    mmio::write_u32(IO_APIC, index);
    mmio::write_u32(IO_APIC + 0x10, value);
}

/// Whether an access of `width` at `port` reaches `other`.
fn reaches(port: u16, width: u16, other: u16) -> bool {
    (port..=port.saturating_add(width - 1)).contains(&other)
}

/// Every port where something is or might be, at any width; but nothing that ends the domain.
fn ports() {
    let all = (0..0x800_u16).chain(0xCF0..0xD00).chain(0xFFF8..=0xFFFF);
    for port in all {
        inb(port);
        inw(port);
        inl(port);
        for value in [0, u32::MAX] {
            let value = |width| if reaches(port, width, PVPANIC_PORT) { 0 } else { value };
            let refuses = |width| reaches(port, width, REFUSAL_PORT);
            if !refuses(1) {
                outb(port, value(1) as u8);
            }
            if !refuses(2) {
                outw(port, value(2) as u16);
            }
            if !refuses(4) {
                outl(port, if port == STEP_PORT { value(4) & NOT_FATAL } else { value(4) });
            }
        }
    }
    restore_serial();
}

/// String instructions, which are many accesses at once.
fn strings() {
    ram::fill(ram::START, 0x2000, 0);
    for port in
        [I8042_DATA_PORT, SERIAL_PORT, PVPANIC_PORT, SLEEP_CONTROL_PORT, EVENT_PORT, EXIT_CODE_PORT, 0x80]
    {
        for count in [0, 1, 3, 64, 0x1001] {
            outsb(port, ram::START, count);
            insb(port, ram::START + 0x4000, count);
        }
    }
    restore_serial();
}

/// No interrupts, no FIFO, 8 bits, no loop.
fn restore_serial() {
    for (register, value) in [(3, 3), (1, 0), (2, 0), (4, 0)] {
        outb(SERIAL_PORT + register, value);
    }
    // What a loop has left there is no answer to a checkpoint.
    while inb(SERIAL_PORT + 5) & 1 != 0 {
        inb(SERIAL_PORT);
    }
    // Ends the line that the attack may have begun.
    serial::write(b'\n');
}
