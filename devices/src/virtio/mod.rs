//! virtio 1.2 devices behind the virtio-mmio transport (version 2).
//!
//! Who does what:
//! - [`mmio::MmioTransport`] owns the registers, the status machine and the
//!   feature negotiation of one device, the queues until they are live, and the
//!   eventfds by which the guest notifies them.
//! - A [`VirtioDevice`] (block, vsock) is given the live queues at
//!   `DRIVER_OK` and moves data on the event loop thread.
//! - [`chain::Chain`] is one descriptor chain, read and checked completely before
//!   a device looks at it; [`used`] gives it back and interrupts the driver.
//!
//! A driver that breaks the rules costs it the device: the device stops, sets
//! `DEVICE_NEEDS_RESET` and raises a configuration interrupt. Nothing else is
//! affected.

pub mod block;
pub mod chain;
pub mod mmio;
mod registers;
#[cfg(any(test, feature = "test-support"))]
pub mod testing;
pub mod used;
pub mod vsock;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cofferdam_metrics::{Counter, group};
use event_manager::{EventOps, Events};
use thiserror::Error;
use tracing::warn;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use crate::interrupt::InterruptLine;
use crate::tally::Tally;

/// The memory that a device may touch: on a confidential platform only the shared side.
pub type Memory = Arc<GuestMemoryMmap>;

/// Tells which memory a guest shares with devices, where that is not all. The memory of others reads as zeroes here, and
/// what is written there is lost: a driver that offers it is broken, and is told so.
pub trait SharedPages: Send + Sync {
    /// Whether `length` bytes at the guest-physical address `address` are shared, all of them.
    fn is_shared(&self, address: u64, length: u64) -> bool;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready; queues are live.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The device has met an error that it cannot recover from.
    pub const NEEDS_RESET: u32 = 64;
    /// The guest has given up on the device.
    pub const FAILED: u32 = 128;
}

/// `InterruptStatus` bits (virtio 1.2, 4.2.2).
pub mod interrupt_status {
    /// A used buffer notification.
    pub const USED: u32 = 1;
    /// The configuration or the device status has changed.
    pub const CONFIG: u32 = 2;
}

group! {
    /// Of the transport of a virtio device.
    pub struct TransportMetrics {
        /// Times that a device needed reset
        pub needs_reset_count: Counter,
        /// Writes of the driver to registers that were ignored, as they broke the rules
        pub ignored_writes_count: Counter,
        /// Interrupts of the driver
        pub interrupts_count: Counter,
        /// Interrupts that could not be raised
        pub interrupt_fails: Counter,
        /// Messages about these that were not logged, because there were too many
        pub rate_limited_log_count: Counter,
    }
}

/// The interrupt of one device, and the registers that go with it, shared by
/// transport and device so that neither waits for the other.
pub struct VirtioInterrupt {
    /// Device status register.
    pub(crate) status: AtomicU32,
    /// Interrupt status register.
    pub(crate) pending: AtomicU32,
    /// Configuration generation.
    pub(crate) generation: AtomicU32,
    line: Arc<dyn InterruptLine>,
    pub(crate) metrics: Arc<TransportMetrics>,
    /// Lines about breakdowns.
    breakdowns: Tally,
    /// Lines about lost interrupts.
    lost: Tally,
}

impl VirtioInterrupt {
    /// The interrupt of a device on `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self {
            status: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            line,
            metrics: Arc::default(),
            breakdowns: Tally::default(),
            lost: Tally::default(),
        }
    }

    /// Tells the driver of used buffers.
    pub fn used(&self) {
        self.raise(interrupt_status::USED);
    }

    /// Puts the device out of service until the driver resets it.
    pub fn needs_reset(&self, reason: &dyn std::fmt::Display) {
        let before = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if before & status::NEEDS_RESET == 0 {
            self.metrics.needs_reset_count.count();
            if let Some(line) = self.breakdowns.count(&self.metrics.rate_limited_log_count) {
                warn!(dropped = line.dropped, "virtio device needs reset: {reason}");
            }
        }
        self.config_changed();
    }

    /// Tells the driver, if there is one to hear it (virtio 1.2, 2.1.2), that configuration or status have changed.
    fn config_changed(&self) {
        if self.status.load(Ordering::SeqCst) & status::DRIVER_OK != 0 {
            self.raise(interrupt_status::CONFIG);
        }
    }

    /// Whether the device is out of service.
    pub fn is_broken(&self) -> bool {
        self.status.load(Ordering::SeqCst) & status::NEEDS_RESET != 0
    }

    fn raise(&self, bits: u32) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        self.metrics.interrupts_count.count();
        if let Err(error) = self.line.trigger() {
            self.metrics.interrupt_fails.count();
            if let Some(line) = self.lost.count(&self.metrics.rate_limited_log_count) {
                warn!(dropped = line.dropped, "virtio interrupt lost: {error}");
            }
        }
    }
}

/// What a device needs to work, given to it at `DRIVER_OK`.
pub struct Driver {
    /// Guest memory.
    pub memory: Memory,
    /// What of it the guest shares; all, if nobody tells.
    pub shared: Option<Arc<dyn SharedPages>>,
    /// The live queues, by index; each was checked against guest memory.
    pub queues: Vec<Queue>,
    /// The negotiated features.
    pub features: u64,
    /// The device's interrupt.
    pub interrupt: Arc<VirtioInterrupt>,
}

/// Why a device could not be activated.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left a queue out that the device needs.
    #[error("queue {0} is not ready")]
    QueueNotReady(usize),
    /// The host refused something that the device needs.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] std::io::Error),
}

/// First value of [`Events::data`] that is a device's own; lower ones are queue indices.
pub const DEVICE_EVENTS: u32 = 0x100;

/// A virtio device behind a transport. Never called by two threads at once.
///
/// `notify`, `register` and `event` run on the event loop thread, the others
/// on a vCPU thread as well.
pub trait VirtioDevice: Any + Send {
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// Largest size of each queue; their number is the device's number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Device-specific feature bits. The transport adds `VERSION_1`, `EVENT_IDX`,
    /// `INDIRECT_DESC` and, where some memory is private, `ACCESS_PLATFORM`.
    fn features(&self) -> u64;
    /// Reads the configuration space. `data` comes zeroed; bytes beyond the space stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; read-only fields ignore it.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// The driver set `DRIVER_OK`. On an error the device needs reset.
    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError>;
    /// The driver set `DRIVER_OK`, and the device could not be activated.
    fn activation_failed(&mut self) {}
    /// The driver reset the device, or the domain ends. When it returns, the device no longer touches guest
    /// memory, and nothing of the driver is left.
    fn reset(&mut self);
    /// The driver made buffers available in `queue`. Also called for every queue once after activation.
    fn notify(&mut self, queue: u16);
    /// Adds the device's own descriptors to the event loop, with [`Events::data`] from [`DEVICE_EVENTS`] on.
    fn register(&mut self, ops: &mut EventOps);
    /// One of the device's own descriptors is ready.
    fn event(&mut self, event: Events, ops: &mut EventOps);
}
