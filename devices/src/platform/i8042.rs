//! The keyboard controller, of which only the reset line is left.
//!
//! A PC resets by the command 0xFE to the i8042 on port 0x64. Linux does so for
//! `reboot=k`, but first reads the status (the same port) until bit 1, "input
//! buffer full", is clear. Here it always is: status 0, nothing to read and room
//! for a command. There is no keyboard, mouse or interrupt; other commands and
//! data are swallowed. The ACPI tables say that there is no i8042, so no driver
//! looks for one.

use std::sync::Arc;

use cofferdam_firmware::layout::{I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_RESET_COMMAND};
use cofferdam_metrics::{Counter, group};

use super::{GuestRequests, bytes_at, bytes_at_mut};
use crate::bus::BusDevice;

/// Ports from the data port to the command port. The three between them belong to
/// others (speaker, NMI status) and behave as if nobody were there.
pub const I8042_PORTS: u64 = COMMAND + 1;

const DATA: u64 = 0;
const COMMAND: u64 = (I8042_COMMAND_PORT - I8042_DATA_PORT) as u64;

group! {
    /// Of the i8042.
    pub struct I8042Metrics {
        /// Reads of its two ports
        pub read_count: Counter,
        /// Writes of its two ports
        pub write_count: Counter,
        /// Resets that the guest asked for by it
        pub reset_count: Counter,
        /// Reads of the ports between its two
        pub missed_read_count: Counter,
        /// Writes of the ports between its two
        pub missed_write_count: Counter,
    }
}

/// The i8042 stub, to be put at [`I8042_DATA_PORT`].
pub struct I8042 {
    requests: Arc<dyn GuestRequests>,
    metrics: Arc<I8042Metrics>,
}

impl I8042 {
    /// A stub that passes resets to `requests`.
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests, metrics: Arc::default() }
    }

    /// What is counted here.
    pub fn metrics(&self) -> Arc<I8042Metrics> {
        self.metrics.clone()
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in bytes_at_mut(offset, data) {
            if offset == DATA || offset == COMMAND {
                self.metrics.read_count.count();
                *byte = 0;
            } else {
                self.metrics.missed_read_count.count();
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for write in bytes_at(offset, data) {
            match write {
                (DATA | COMMAND, _) => self.metrics.write_count.count(),
                _ => self.metrics.missed_write_count.count(),
            }
            if write == (COMMAND, I8042_RESET_COMMAND) {
                self.metrics.reset_count.count();
                self.requests.reset();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_reset_command_does_something() {
        let requests = Arc::new(Requests::default());
        let device = I8042::new(requests.clone());
        for value in 0..=u8::MAX {
            device.write(DATA, &[value]);
            if value != 0xFE {
                device.write(COMMAND, &[value]);
            }
            device.write(1, &[value]);
        }
        assert_eq!(requests.take(), []);
        device.write(COMMAND, &[0xFE]);
        assert_eq!(requests.take(), [Request::Reset]);
    }

    #[test]
    fn it_is_always_ready_for_a_command() {
        let device = I8042::new(Arc::new(Requests::default()));
        let read = (0..I8042_PORTS).map(|offset| read_byte(&device, offset)).collect::<Vec<_>>();
        assert_eq!(read, [0, 0xFF, 0xFF, 0xFF, 0]);
    }

    #[test]
    fn accesses_are_counted() {
        let device = I8042::new(Arc::new(Requests::default()));
        for offset in 0..I8042_PORTS {
            read_byte(&device, offset);
        }
        device.write(DATA, &[1]);
        device.write(1, &[0xFE, 0xFE]);
        device.write(COMMAND, &[0xFE]);
        let metrics = device.metrics();
        assert_eq!((metrics.read_count.total(), metrics.missed_read_count.total()), (2, 3));
        assert_eq!((metrics.write_count.total(), metrics.missed_write_count.total()), (2, 2));
        assert_eq!(metrics.reset_count.total(), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics(accesses in accesses(I8042_PORTS)) {
            perform(&I8042::new(Arc::new(Requests::default())), &accesses);
        }
    }
}
