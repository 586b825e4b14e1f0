//! Feature negotiation and queue set-up: what the driver has written to a
//! transport so far, and the rules of when it may.
//!
//! ```text
//! 0 ─ ACKNOWLEDGE ─ DRIVER ──── FEATURES_OK ──── DRIVER_OK: queues are live
//!                        features         queues
//! ```
//!
//! A status bit is accepted after its predecessors; none goes away but all at
//! once, by a reset. Features are written between `DRIVER` and `FEATURES_OK`, the
//! queues set up between `FEATURES_OK` and `DRIVER_OK` (virtio 1.2, 3.1.1).

use thiserror::Error;
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::status;

/// What every device offers besides its own features.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What every device offers, and a driver must accept, where the guest shares only some of its memory: the driver is to
/// use addresses as the platform has them, which means memory that is shared.
pub const PRIVATE_MEMORY_FEATURES: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;

/// All status bits that a driver may set.
const DRIVER_BITS: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// A queue that the driver set up in a way that cannot work.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// The size is 0, not a power of two, or larger than the device's.
    #[error("queue {queue} has size {size}, not a power of two up to {max}")]
    Size {
        /// Index of the queue.
        queue: usize,
        /// The driver's size.
        size: u32,
        /// The device's largest size.
        max: u16,
    },
    /// A part of the queue is not aligned as it must be.
    #[error("queue {queue} has its {part} at {address:#x}, which is not aligned")]
    Alignment {
        /// Index of the queue.
        queue: usize,
        /// Which part.
        part: &'static str,
        /// Guest-physical address.
        address: u64,
    },
    /// A part of the queue is not in guest memory.
    #[error("queue {queue} is not completely in guest memory")]
    Memory {
        /// Index of the queue.
        queue: usize,
    },
}

/// One queue, as the driver has described it so far.
#[derive(Clone, Debug, Default)]
pub struct QueueRegisters {
    /// The device's largest size.
    pub max: u16,
    /// `QueueNum`.
    pub size: u32,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`: the descriptor table.
    pub descriptors: u64,
    /// `QueueDriver`: the available ring.
    pub available: u64,
    /// `QueueDevice`: the used ring.
    pub used: u64,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, size: u32::from(max), ..Self::default() }
    }

    /// The queue for the device; checked against `memory` if it is ready.
    fn queue(&self, index: usize, memory: &GuestMemoryMmap, event_idx: bool) -> Result<Queue, QueueError> {
        let size = QueueError::Size { queue: index, size: self.size, max: self.max };
        let mut queue = match Queue::new(self.max) {
            Ok(queue) => queue,
            Err(_) => return Err(size),
        };
        if !self.ready {
            return Ok(queue);
        }
        if u16::try_from(self.size).ok().and_then(|size| queue.try_set_size(size).ok()).is_none() {
            return Err(size);
        }
        let alignment = |part, address| QueueError::Alignment { queue: index, part, address };
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(|_| alignment("descriptor table", self.descriptors))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(|_| alignment("available ring", self.available))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(|_| alignment("used ring", self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if queue.is_valid(memory) { Ok(queue) } else { Err(QueueError::Memory { queue: index }) }
    }
}

/// What the driver has written, except for the status itself.
#[derive(Debug)]
pub struct Registers {
    /// Features that the device offers.
    offered: u64,
    /// `DriverFeatures`, both halves.
    driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `QueueSel`.
    pub queue_select: u32,
    /// The queues by index.
    queues: Vec<QueueRegisters>,
}

impl Registers {
    /// The registers of a device after a reset.
    pub fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes.iter().map(|&max| QueueRegisters::new(max)).collect();
        Self {
            offered,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
        }
    }

    /// Forgets what the driver wrote.
    pub fn reset(&mut self) {
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// `DeviceFeatures`: the selected half of what the device offers.
    pub fn device_features(&self) -> u32 {
        half(self.offered, self.device_features_select)
    }

    /// Writes `DriverFeatures`. `false`: not now.
    pub fn set_driver_features(&mut self, current: u32, value: u32) -> bool {
        if current & status::DRIVER == 0 || current & (status::FEATURES_OK | status::FAILED) != 0 {
            return false;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // Beyond bit 63 nothing is offered, and drivers write only zeroes.
            _ => return value == 0,
        }
        true
    }

    /// Whether the driver's features can be accepted: all were offered, and `VERSION_1` is among them, and `ACCESS_PLATFORM`
    /// if it was offered (virtio 1.2, 6.2: a device may insist on it).
    pub fn features_acceptable(&self) -> bool {
        let needed = 1 << VIRTIO_F_VERSION_1 | self.offered & PRIVATE_MEMORY_FEATURES;
        self.driver_features & !self.offered == 0 && self.driver_features & needed == needed
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// The selected queue, if there is one.
    pub fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Changes the selected queue, which must not be ready. `false`: not now, or there is none.
    pub fn configure(&mut self, current: u32, change: impl FnOnce(&mut QueueRegisters)) -> bool {
        match self.selected_mut(current) {
            Some(queue) if !queue.ready => change(queue),
            _ => return false,
        }
        true
    }

    /// Writes `QueueReady`. `false`: not now, or there is no such queue or value.
    pub fn set_ready(&mut self, current: u32, value: u32) -> bool {
        // Drivers also take down queues that a reset has taken down before.
        if value == 0 && self.selected().is_some_and(|queue| !queue.ready) {
            return true;
        }
        match self.selected_mut(current) {
            Some(queue) if value <= 1 => queue.ready = value == 1,
            _ => return false,
        }
        true
    }

    fn selected_mut(&mut self, current: u32) -> Option<&mut QueueRegisters> {
        let set_up = status::FEATURES_OK | status::DRIVER_OK | status::FAILED | status::NEEDS_RESET;
        if current & set_up != status::FEATURES_OK {
            return None;
        }
        self.queues.get_mut(usize::try_from(self.queue_select).ok()?)
    }

    /// The queues for the device, by index.
    pub fn queues(&self, memory: &GuestMemoryMmap) -> Result<Vec<Queue>, QueueError> {
        let event_idx = self.features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        self.queues.iter().enumerate().map(|(index, queue)| queue.queue(index, memory, event_idx)).collect()
    }
}

/// Which bits a write of `value` to the status register adds to `current`, lowest step first; `None` if the
/// write breaks the rules. A reset (`value` 0) is not the business of this function.
pub fn status_step(current: u32, value: u32) -> Option<u32> {
    // A driver that adds a bit to what it has read writes NEEDS_RESET back.
    let value = value & !status::NEEDS_RESET;
    let kept = current & !status::NEEDS_RESET;
    if value & !DRIVER_BITS != 0 || kept & !value != 0 {
        return None;
    }
    let has = |bit: u32| value & bit != 0;
    let ordered = (!has(status::DRIVER) || has(status::ACKNOWLEDGE))
        && (!has(status::FEATURES_OK) || has(status::DRIVER))
        && (!has(status::DRIVER_OK) || kept & status::FEATURES_OK != 0);
    let added = value & !kept;
    let starts = added & status::DRIVER_OK != 0;
    let dead = has(status::FAILED) || current & status::NEEDS_RESET != 0;
    (ordered && !(starts && dead)).then_some(added)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Replaces the lower half of `register`.
pub fn set_low(register: &mut u64, value: u32) {
    *register = *register & !u64::from(u32::MAX) | u64::from(value);
}

/// Replaces the upper half of `register`.
pub fn set_high(register: &mut u64, value: u32) {
    *register = *register & u64::from(u32::MAX) | u64::from(value) << 32;
}
