//! pvpanic: how a guest's kernel says that it panicked.
//!
//! One port (QEMU, `docs/specs/pvpanic`; found through ACPI as `QEMU0001`).
//! Reading it gives the events that the device knows, and a driver sends no
//! others; writing it sends events:
//!
//! ```text
//! bit 0  the kernel panicked and ends
//! bit 1  it panicked and a crash kernel takes over
//! bit 2  it shuts down
//! ```
//!
//! Only bit 0 is offered. With a crash kernel the domain goes on, to be ended by
//! that kernel; and a shutdown is seen on the ACPI registers, where it cannot be
//! pretended without happening.

use std::sync::Arc;

use super::GuestRequests;
use crate::bus::BusDevice;

const PANICKED: u8 = 1 << 0;

/// The pvpanic port.
pub struct PvPanic {
    requests: Arc<dyn GuestRequests>,
}

impl PvPanic {
    /// A port that passes panics to `requests`.
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, [first, ..]) = (offset, data) {
            *first = PANICKED;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [first, ..]) = (offset, data)
            && first & PANICKED != 0
        {
            self.requests.panicked();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::*;
    use proptest::prelude::*;

    #[test]
    fn a_panic_and_only_a_panic_is_heard() {
        let requests = Arc::new(Requests::default());
        let device = PvPanic::new(requests.clone());
        for events in (0..=u8::MAX).filter(|events| events & 1 == 0) {
            device.write(0, &[events]);
        }
        device.write(1, &[1]);
        assert_eq!(requests.take(), []);
        device.write(0, &[1]);
        device.write(0, &[0xFF]);
        assert_eq!(requests.take(), [Request::Panicked, Request::Panicked]);
    }

    #[test]
    fn only_panics_are_offered() {
        assert_eq!(read_byte(&PvPanic::new(Arc::new(Requests::default())), 0), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics(accesses in accesses(1)) {
            perform(&PvPanic::new(Arc::new(Requests::default())), &accesses);
        }
    }
}
