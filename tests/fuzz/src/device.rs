//! A device, and the event loop that it lives in.

use std::sync::{Arc, Mutex, MutexGuard};

use cofferdam_devices::virtio::VirtioDevice;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};

/// A device as the event loop knows it.
pub struct Subscriber<D>(D);

impl<D: VirtioDevice> MutEventSubscriber for Subscriber<D> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.0.event(events, ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.0.register(ops);
    }
}

/// A device whose events are served when the target says so.
pub struct Looped<D> {
    device: Arc<Mutex<Subscriber<D>>>,
    manager: EventManager<Arc<Mutex<Subscriber<D>>>>,
}

impl<D: VirtioDevice> Looped<D> {
    /// `device` in an event loop of its own.
    pub fn new(device: D) -> Self {
        let device = Arc::new(Mutex::new(Subscriber(device)));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(device.clone());
        Self { device, manager }
    }

    /// Does something with the device.
    pub fn with<R>(&self, action: impl FnOnce(&mut D) -> R) -> R {
        let mut guard: MutexGuard<'_, Subscriber<D>> = self.device.lock().unwrap();
        action(&mut guard.0)
    }

    /// Serves what is ready within `milliseconds`; whether anything was.
    pub fn run(&mut self, milliseconds: i32) -> bool {
        self.manager.run_with_timeout(milliseconds).unwrap() > 0
    }
}
