//! A virtio-mmio driver that does what it is told: every step of a good driver is
//! here, but nothing forces a payload to take them in order, or to put anything
//! sensible into a descriptor, a ring or a register.
//!
//! A good driver:
//!
//! ```text
//! let device = Device::find(2)?;
//! let features = device.negotiate(u64::MAX)?;      // up to FEATURES_OK
//! let mut queue = Queue::new(ram::START, 8);
//! device.set_up(0, &queue);                        // up to QueueReady
//! device.start()                                   // DRIVER_OK
//! let used = queue.request(&device, &[Part::read(..), Part::write(..)])?;
//! ```

use cofferdam_firmware::layout::{VIRTIO_MMIO_SLOTS, VIRTIO_MMIO_STRIDE, virtio_mmio_address};

use crate::cpu::delay;
use crate::{mmio, ram};

/// Registers (virtio 1.2, 4.2.2).
pub mod register {
    #![allow(missing_docs)] // the names are the specification's
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xA0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xA4;
    pub const CONFIG_GENERATION: u64 = 0xFC;
    pub const CONFIG: u64 = 0x100;
}

/// Status bits (virtio 1.2, 2.1).
pub mod status {
    #![allow(missing_docs)] // the names are the specification's
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Descriptor flags (virtio 1.2, 2.7.5).
pub mod flag {
    #![allow(missing_docs)] // the names are the specification's
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`, which [`Queue`] does not speak.
pub const EVENT_IDX: u64 = 1 << 29;
/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// How often a driver looks for an answer, with a delay between: minutes, as the host's disk or its other CPUs may be busy.
const PATIENCE: u32 = 100_000_000;

/// The registers of one virtio-mmio slot.
#[derive(Clone, Copy)]
pub struct Device {
    base: u64,
}

macro_rules! accessors {
    ($read:ident, $write:ident, $kind:ty, $mmio_read:path, $mmio_write:path) => {
        /// Reads at `offset` from the start of the slot; it need not be aligned.
        pub fn $read(&self, offset: u64) -> $kind {
            $mmio_read(self.address(offset, size_of::<$kind>() as u64))
        }

        /// Writes at `offset` from the start of the slot; it need not be aligned.
        pub fn $write(&self, offset: u64, value: $kind) {
            $mmio_write(self.address(offset, size_of::<$kind>() as u64), value);
        }
    };
}

impl Device {
    /// The device in `slot`, which may be empty.
    pub fn at(slot: u8) -> Self {
        assert!(slot < VIRTIO_MMIO_SLOTS, "no slot {slot}");
        Self { base: virtio_mmio_address(slot) }
    }

    /// The first device of this type (virtio 1.2, section 5).
    pub fn find(device_type: u32) -> Option<Self> {
        let fits = |device: &Self| {
            device.read(register::MAGIC_VALUE) == MAGIC && device.read(register::DEVICE_ID) == device_type
        };
        (0..VIRTIO_MMIO_SLOTS).map(Self::at).find(fits)
    }

    fn address(&self, offset: u64, length: u64) -> u64 {
        assert!(offset.saturating_add(length) <= VIRTIO_MMIO_STRIDE, "no register at {offset:#x}");
        self.base + offset
    }

    /// Address of the slot's first register.
    pub fn base(&self) -> u64 {
        self.base
    }

    accessors!(read_u8, write_u8, u8, mmio::read_u8, mmio::write_u8);
    accessors!(read_u16, write_u16, u16, mmio::read_u16, mmio::write_u16);
    accessors!(read, write, u32, mmio::read_u32, mmio::write_u32);
    accessors!(read_u64, write_u64, u64, mmio::read_u64, mmio::write_u64);

    /// The features that the device offers.
    pub fn features(&self) -> u64 {
        let half = |select| {
            self.write(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Writes the driver's features.
    pub fn set_features(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, select);
            self.write(register::DRIVER_FEATURES, half);
        }
    }

    /// Adds status bits, and says whether the device kept them.
    pub fn add_status(&self, bits: u32) -> bool {
        self.write(register::STATUS, self.read(register::STATUS) | bits);
        self.read(register::STATUS) & bits == bits
    }

    /// Whether the device needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.read(register::STATUS) & status::NEEDS_RESET != 0
    }

    /// Resets the device and negotiates `wanted` features as far as they are offered, but not `EVENT_IDX`:
    /// what was agreed on, `None` if the device refused.
    pub fn negotiate(&self, wanted: u64) -> Option<u64> {
        self.write(register::STATUS, 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let features = (self.features() & wanted & !EVENT_IDX) | VERSION_1;
        self.set_features(features);
        self.add_status(status::FEATURES_OK).then_some(features)
    }

    /// Describes queue `index` to the device and makes it ready.
    pub fn set_up(&self, index: u32, queue: &Queue) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_NUM, u32::from(queue.size));
        for (low, address) in [
            (register::QUEUE_DESC_LOW, queue.table()),
            (register::QUEUE_DRIVER_LOW, queue.available()),
            (register::QUEUE_DEVICE_LOW, queue.used()),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Sets `DRIVER_OK`; `false` if the device cannot work like that.
    pub fn start(&self) -> bool {
        self.add_status(status::DRIVER_OK) && !self.needs_reset()
    }

    /// Tells the device to look at queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(register::QUEUE_NOTIFY, index);
    }
}

/// One part of a request.
#[derive(Clone, Copy)]
pub struct Part {
    address: u64,
    length: u32,
    flags: u16,
}

impl Part {
    /// What the device reads.
    pub fn read(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0 }
    }

    /// What the device writes.
    pub fn write(address: u64, length: u32) -> Self {
        Self { address, length, flags: flag::WRITE }
    }
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// First descriptor of the chain.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// A split virtqueue in [`ram`]: descriptor table, available ring and used ring, [`Queue::PART`] bytes each.
pub struct Queue {
    base: u64,
    /// Descriptors.
    pub size: u16,
    /// The available index that was written last.
    pub next_available: u16,
    next_used: u16,
}

impl Queue {
    /// Bytes of each of the three parts: room for 256 descriptors.
    pub const PART: u64 = 0x1000;
    /// Bytes of all parts.
    pub const LENGTH: u64 = 3 * Self::PART;

    /// An empty queue of `size` (at most 256) descriptors at `base`.
    pub fn new(base: u64, size: u16) -> Self {
        assert!(size <= 256, "no room for {size} descriptors");
        (base..base + Self::LENGTH).step_by(8).for_each(|address| ram::write_u64(address, 0));
        Self { base, size, next_available: 0, next_used: 0 }
    }

    /// Address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    pub fn available(&self) -> u64 {
        self.base + Self::PART
    }

    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + 2 * Self::PART
    }

    /// Writes descriptor `index` of the queue's table.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        describe_in(self.table(), index, address, length, flags, next);
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer(&mut self, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        ram::write_u16(self.available() + 4 + 2 * entry, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available index.
    pub fn set_available_index(&self, index: u16) {
        ram::write_u16(self.available() + 2, index);
    }

    /// What the device has given back next, if anything.
    pub fn poll(&mut self) -> Option<Used> {
        if ram::read_u16(self.used() + 2) == self.next_used {
            return None;
        }
        let entry = self.used() + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        Some(Used { head: ram::read_u32(entry), written: ram::read_u32(entry + 4) })
    }

    /// Waits some minutes for [`Queue::poll`], or until the device needs a reset.
    pub fn wait(&mut self, device: &Device) -> Option<Used> {
        for attempt in 0..PATIENCE {
            let used = self.poll();
            if used.is_some() || (attempt % 256 == 255 && device.needs_reset()) {
                return used;
            }
            delay();
        }
        None
    }

    /// Describes a request from descriptor 0 on, makes it available in queue 0 and waits for it.
    pub fn request(&mut self, device: &Device, parts: &[Part]) -> Option<Used> {
        for (index, part) in (0..).zip(parts) {
            let next = if usize::from(index) + 1 < parts.len() { flag::NEXT } else { 0 };
            self.describe(index, part.address, part.length, part.flags | next, index + 1);
        }
        self.offer(0);
        device.notify(0);
        self.wait(device)
    }
}

/// Writes descriptor `index` of the table at `table`.
pub fn describe_in(table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let entry = table + 16 * u64::from(index);
    ram::write_u64(entry, address);
    ram::write_u32(entry + 8, length);
    ram::write_u16(entry + 12, flags);
    ram::write_u16(entry + 14, next);
}
