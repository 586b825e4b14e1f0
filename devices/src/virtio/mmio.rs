//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).
//!
//! A device has a page of MMIO space: 32-bit registers below 0x100, its
//! configuration space from there on. Registers answer aligned 4-byte accesses
//! only; others read 0 and write nothing.
//!
//! vCPU threads read and write registers; the event loop moves data. What both
//! need (device, queues) is behind one lock. What a guest touches in its interrupt
//! handler (`InterruptStatus`, `InterruptACK`, `Status` reads) and `QueueNotify` are
//! not, so that a vCPU never waits there for a device at work.
//!
//! A driver that writes what it may not write, or when it may not, is ignored, and
//! the log says so; one whose queues cannot work gets `DEVICE_NEEDS_RESET`
//! (`registers.rs` has the rules).

use std::any::Any;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use tracing::{error, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::registers::{
    PRIVATE_MEMORY_FEATURES, QueueRegisters, Registers, TRANSPORT_FEATURES, set_high, set_low, status_step,
};
use super::{
    DEVICE_EVENTS, Driver, Memory, SharedPages, TransportMetrics, VirtioDevice, VirtioInterrupt, status,
};
use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;
use crate::tally::Tally;

/// Length of the register space, bytes.
pub const MMIO_SIZE: u64 = 0x1000;
/// Offset of `QueueNotify`, where the monitor puts one ioeventfd per queue, matching a 4-byte write of its index.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC_VALUE: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0C;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DESC_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xA0;
const QUEUE_DEVICE_HIGH: u64 = 0xA4;
const SHM_SELECT: u64 = 0xAC;
const SHM_LENGTH_LOW: u64 = 0xB0;
const SHM_BASE_HIGH: u64 = 0xBC;
const CONFIG_GENERATION: u64 = 0xFC;
const CONFIG: u64 = 0x100;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// "CFDM"
const VENDOR: u32 = 0x4D44_4643;

/// One virtio device and its registers.
pub struct MmioTransport {
    device_type: u32,
    memory: Memory,
    shared: Option<Arc<dyn SharedPages>>,
    interrupt: Arc<VirtioInterrupt>,
    queue_events: Vec<EventFd>,
    /// Lines about writes that broke the rules.
    ignored: Tally,
    state: Mutex<State>,
}

/// What vCPU threads and the event loop share under the lock.
struct State {
    device: Box<dyn VirtioDevice>,
    registers: Registers,
    /// The device was activated and not reset since.
    live: bool,
    /// The device was shut down for good.
    ended: bool,
}

impl MmioTransport {
    /// A device on `line` that works on `memory`, or on what of it is `shared`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        shared: Option<Arc<dyn SharedPages>>,
        line: Arc<dyn InterruptLine>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        if sizes.len() > DEVICE_EVENTS as usize || sizes.iter().any(|size| !size.is_power_of_two()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("bad queue sizes {sizes:?}")));
        }
        let queue_events =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        let private = if shared.is_some() { PRIVATE_MEMORY_FEATURES } else { 0 };
        let registers = Registers::new(device.features() | TRANSPORT_FEATURES | private, sizes);
        Ok(Self {
            device_type: device.device_type(),
            memory,
            shared,
            interrupt: Arc::new(VirtioInterrupt::new(line)),
            queue_events,
            ignored: Tally::default(),
            state: Mutex::new(State { device, registers, live: false, ended: false }),
        })
    }

    /// The eventfd by which the driver notifies each queue, by index.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// What is counted here.
    pub fn metrics(&self) -> Arc<TransportMetrics> {
        self.interrupt.metrics.clone()
    }

    /// Calls `f` with the device between two of its turns. `None`: it is no `T`.
    pub fn with_device<T: VirtioDevice, R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut state = self.lock();
        let device: &mut dyn Any = &mut *state.device;
        device.downcast_mut().map(f)
    }

    /// The same for what changes the configuration space, of which the driver is told.
    pub fn reconfigure<T: VirtioDevice, R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        let result = self.with_device(|device| {
            // Before the change: a driver that reads both the old space and the new one finds another generation at
            // the end (virtio 1.2, 2.5.1), since it gets at the space only under the lock.
            self.interrupt.generation.fetch_add(1, Ordering::SeqCst);
            f(device)
        });
        self.interrupt.config_changed();
        result
    }

    /// Ends the device: it no longer touches guest memory when this returns.
    pub fn shut_down(&self) {
        let mut state = self.lock();
        state.ended = true;
        self.reset(&mut state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> u32 {
        self.interrupt.status.load(Ordering::SeqCst)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => 2,
            DEVICE_ID => self.device_type,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => self.lock().registers.device_features(),
            QUEUE_SIZE_MAX => self.lock().registers.selected().map_or(0, |queue| u32::from(queue.max)),
            QUEUE_READY => self.lock().registers.selected().map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.interrupt.pending.load(Ordering::SeqCst),
            STATUS => self.status(),
            // No shared memory: every region has length -1 (virtio 1.2, 4.2.2.1).
            SHM_LENGTH_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.interrupt.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            QUEUE_NOTIFY => self.notify_queue(value),
            INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::SeqCst);
            }
            STATUS => self.write_status(value),
            _ => self.write_set_up(offset, value),
        }
    }

    /// Passes a notification on that no ioeventfd caught.
    fn notify_queue(&self, index: u32) {
        if let Some(event) = usize::try_from(index).ok().and_then(|index| self.queue_events.get(index)) {
            // Fails only when the counter is full: then the event is pending already.
            let _ = event.write(1);
        }
    }

    /// Writes a register of negotiation or queue set-up.
    fn write_set_up(&self, offset: u64, value: u32) {
        let state = &mut *self.lock();
        let registers = &mut state.registers;
        let current = self.status();
        let mut queue =
            |change: fn(&mut QueueRegisters, u32)| registers.configure(current, |queue| change(queue, value));
        let accepted = match offset {
            QUEUE_SIZE => queue(|queue, value| queue.size = value),
            QUEUE_DESC_LOW => queue(|queue, value| set_low(&mut queue.descriptors, value)),
            QUEUE_DESC_HIGH => queue(|queue, value| set_high(&mut queue.descriptors, value)),
            QUEUE_DRIVER_LOW => queue(|queue, value| set_low(&mut queue.available, value)),
            QUEUE_DRIVER_HIGH => queue(|queue, value| set_high(&mut queue.available, value)),
            QUEUE_DEVICE_LOW => queue(|queue, value| set_low(&mut queue.used, value)),
            QUEUE_DEVICE_HIGH => queue(|queue, value| set_high(&mut queue.used, value)),
            QUEUE_READY => registers.set_ready(current, value),
            DRIVER_FEATURES => registers.set_driver_features(current, value),
            DEVICE_FEATURES_SELECT => {
                registers.device_features_select = value;
                true
            }
            DRIVER_FEATURES_SELECT => {
                registers.driver_features_select = value;
                true
            }
            QUEUE_SELECT => {
                registers.queue_select = value;
                true
            }
            SHM_SELECT => true,
            _ => false,
        };
        if !accepted {
            self.ignore(offset, value);
        }
    }

    fn write_status(&self, value: u32) {
        let state = &mut *self.lock();
        if state.ended {
            return;
        }
        if value == 0 {
            self.reset(state);
            return;
        }
        let Some(added) = status_step(self.status(), value) else {
            self.ignore(STATUS, value);
            return;
        };
        let mut accepted = added & !status::DRIVER_OK;
        if added & status::FEATURES_OK != 0 && !state.registers.features_acceptable() {
            // The driver reads the bit back and finds it missing (virtio 1.2, 3.1.1).
            accepted &= !status::FEATURES_OK;
            self.ignore(STATUS, value);
        }
        self.interrupt.status.fetch_or(accepted, Ordering::SeqCst);
        if added & status::DRIVER_OK != 0 {
            self.activate(state);
        }
    }

    /// Hands the queues to the device, or needs a reset.
    fn activate(&self, state: &mut State) {
        self.interrupt.status.fetch_or(status::DRIVER_OK, Ordering::SeqCst);
        let queues = match state.registers.queues(&self.memory) {
            Ok(queues) => queues,
            Err(error) => {
                state.device.activation_failed();
                return self.interrupt.needs_reset(&error);
            }
        };
        let driver = Driver {
            memory: self.memory.clone(),
            shared: self.shared.clone(),
            queues,
            features: state.registers.features(),
            interrupt: self.interrupt.clone(),
        };
        match state.device.activate(driver) {
            Ok(()) => state.live = true,
            Err(error) => {
                state.device.activation_failed();
                return self.interrupt.needs_reset(&error);
            }
        }
        // Buffers may have been made available before; the device looks on the event loop.
        for event in &self.queue_events {
            let _ = event.write(1);
        }
    }

    fn reset(&self, state: &mut State) {
        state.live = false;
        state.device.reset();
        state.registers.reset();
        for event in &self.queue_events {
            // Fails if there is nothing to drain.
            let _ = event.read();
        }
        self.interrupt.pending.store(0, Ordering::SeqCst);
        // Last: the driver takes a zero for "reset is complete" (virtio 1.2, 4.2.3.1).
        self.interrupt.status.store(0, Ordering::SeqCst);
    }

    /// Notes a write that broke the rules.
    fn ignore(&self, offset: u64, value: u32) {
        let metrics = &self.interrupt.metrics;
        metrics.ignored_writes_count.count();
        if let Some(line) = self.ignored.count(&metrics.rate_limited_log_count) {
            let (device, status) = (self.device_type, self.status());
            warn!(
                dropped = line.dropped,
                "virtio device {device}, status {status:#x}: ignored {value:#x} at register {offset:#x}"
            );
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.lock().device.read_config(offset, data);
        } else if let (Ok(register), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let mut state = self.lock();
            if !state.ended && self.status() & status::DRIVER != 0 {
                state.device.write_config(offset, data);
            }
        } else if let (Ok(register), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }
}

impl EventSubscriber for MmioTransport {
    fn process(&self, events: Events, ops: &mut EventOps) {
        let source = events.data();
        if source >= DEVICE_EVENTS {
            self.lock().device.event(events, ops);
            return;
        }
        let Some(event) = usize::try_from(source).ok().and_then(|index| self.queue_events.get(index)) else {
            return;
        };
        // Fails if a reset has drained it meanwhile.
        let _ = event.read();
        let mut state = self.lock();
        if let (true, false, Ok(queue)) = (state.live, self.interrupt.is_broken(), u16::try_from(source)) {
            state.device.notify(queue);
        }
    }

    fn init(&self, ops: &mut EventOps) {
        for (index, event) in (0..).zip(&self.queue_events) {
            if let Err(error) = ops.add(Events::with_data(event, index, EventSet::IN)) {
                error!("virtio device {}: queue {index} is deaf: {error}", self.device_type);
            }
        }
        self.lock().device.register(ops);
    }
}

#[cfg(test)]
mod tests;
