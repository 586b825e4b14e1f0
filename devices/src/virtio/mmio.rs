//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

use std::sync::Arc;

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::eventfd::EventFd;

use super::{Memory, VirtioDevice, VirtioInterrupt};
use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;

/// Length of the register space, bytes.
pub const MMIO_SIZE: u64 = 0x1000;
/// Offset of `QueueNotify`, where the monitor puts one ioeventfd per queue, matching a 4-byte write of its index.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// One virtio device and its registers.
pub struct MmioTransport {
    interrupt: Arc<VirtioInterrupt>,
}

impl MmioTransport {
    /// A device on `line` that works on `memory`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: Arc<dyn InterruptLine>,
    ) -> std::io::Result<Self> {
        let _ = (device, memory);
        Ok(Self { interrupt: Arc::new(VirtioInterrupt::new(line)) })
    }

    /// The eventfd by which the driver notifies each queue, by index.
    pub fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    /// Ends the device: it no longer touches guest memory when this returns.
    pub fn shut_down(&self) {}
}

impl BusDevice for MmioTransport {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl EventSubscriber for MmioTransport {
    fn process(&self, _events: Events, _ops: &mut EventOps) {}
    fn init(&self, _ops: &mut EventOps) {}
}
