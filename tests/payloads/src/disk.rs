//! A block device's driver (virtio 1.2, 5.2), one request at a time.

use crate::ram;
use crate::virtio::{Device, Part, Queue, status};

/// Request types (virtio 1.2, 5.2.6).
pub mod kind {
    #![allow(missing_docs)] // the names are the specification's
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes: done, the device could not, the device does not know the request.
pub const OK: u8 = 0;
/// See [`OK`].
pub const IO_ERROR: u8 = 1;
/// See [`OK`].
pub const UNSUPPORTED: u8 = 2;
/// A status byte that no device gives.
pub const NONE: u8 = 0xFF;

/// Bytes of a sector.
pub const SECTOR: u32 = 512;
/// Bytes of RAM that a disk uses.
pub const LENGTH: u64 = Queue::LENGTH + 0x3000;

/// A block device and its driver.
pub struct Disk {
    /// The device.
    pub device: Device,
    /// Its queue.
    pub queue: Queue,
    base: u64,
}

impl Disk {
    /// The driver of `device`, with its queue of `size` descriptors and its buffers in the [`LENGTH`] bytes of RAM
    /// from `base` on.
    pub fn new(device: Device, base: u64, size: u16) -> Self {
        Self { device, queue: Queue::new(base, size), base }
    }

    /// Resets the device and starts it with the `wanted` features.
    pub fn start(&mut self, wanted: u64) {
        self.device.write(crate::virtio::register::STATUS, 0);
        self.queue = Queue::new(self.base, self.queue.size);
        assert!(self.device.negotiate(wanted).is_some(), "the disk refused its features");
        self.device.set_up(0, &self.queue);
        assert!(self.device.add_status(status::DRIVER_OK), "the disk did not start");
    }

    /// Address of the request's header.
    pub fn header(&self) -> u64 {
        self.base + Queue::LENGTH
    }

    /// Address of the status byte.
    pub fn status(&self) -> u64 {
        self.header() + 0x800
    }

    /// Address of a page for an indirect table.
    pub fn table(&self) -> u64 {
        self.header() + 0x1000
    }

    /// Address of a page of data.
    pub fn data(&self) -> u64 {
        self.header() + 0x2000
    }

    /// Writes the header of a request.
    pub fn prepare(&self, kind: u32, sector: u64) {
        ram::write_u32(self.header(), kind);
        ram::write_u32(self.header() + 4, 0);
        ram::write_u64(self.header() + 8, sector);
        ram::write_u8(self.status(), NONE);
    }

    /// Makes a request of the header, `data` and the status byte: the status.
    pub fn request(&mut self, kind: u32, sector: u64, data: Option<Part>) -> u8 {
        self.prepare(kind, sector);
        let (header, status) = (Part::read(self.header(), 16), Part::write(self.status(), 1));
        let used = match data {
            Some(data) => self.queue.request(&self.device, &[header, data, status]),
            None => self.queue.request(&self.device, &[header, status]),
        };
        if used.is_some() { ram::read_u8(self.status()) } else { NONE }
    }

    /// The first byte of sector 0, if it can be read.
    pub fn first_byte(&mut self) -> Option<u8> {
        let data = self.data();
        ram::write_u8(data, 0);
        (self.request(kind::READ, 0, Some(Part::write(data, SECTOR))) == OK).then(|| ram::read_u8(data))
    }
}
