//! Ports through which a program in the guest speaks to the monitor.
//!
//! ```text
//! offset 0  exit code: any byte; it counts when the guest powers off
//! offset 1  "user space reached": any byte; the first one counts
//! offset 2  refusal: the first stage's reason not to enter the kernel; the domain ends
//! offset 4  step: how far init of a container's domain has come, and why it goes no further
//! ```
//!
//! The first three take byte writes, as `/dev/port` makes them:
//!
//! ```sh
//! printf '\007' | dd of=/dev/port bs=1 seek=$((0x620)) conv=notrunc 2>/dev/null
//! ```
//!
//! and are mounted in MMIO as well, for kernels that have only `/dev/mem`. A wider write is one write per byte, to ports that follow each other. The
//! step takes one write of 32 bits; any other one there is for nothing. Reading
//! gives back what was written last (the code, the reason, the step; 1 for the mark) and 0 before that,
//! so that a guest can tell these ports from absent ones, which read 0xFF.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use cofferdam_firmware::layout::{EXIT_CODE_PORT, REFUSAL_PORT, STEP_PORT, USER_SPACE_PORT};

use super::{GuestRequests, bytes_at, bytes_at_mut};
use crate::bus::BusDevice;

/// Number of ports, from [`EXIT_CODE_PORT`].
pub const GUEST_PORTS: u64 = STEP + 4;

const EXIT_CODE: u64 = 0;
const USER_SPACE: u64 = (USER_SPACE_PORT - EXIT_CODE_PORT) as u64;
const REFUSAL: u64 = (REFUSAL_PORT - EXIT_CODE_PORT) as u64;
const STEP: u64 = (STEP_PORT - EXIT_CODE_PORT) as u64;

/// The ports, to be put at [`EXIT_CODE_PORT`].
pub struct GuestPort {
    requests: Arc<dyn GuestRequests>,
    exit_code: AtomicU8,
    user_space: AtomicU8,
    refusal: AtomicU8,
    step: AtomicU32,
}

impl GuestPort {
    /// Ports that pass what the guest says to `requests`, every time that it says it.
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self {
            requests,
            exit_code: AtomicU8::new(0),
            user_space: AtomicU8::new(0),
            refusal: AtomicU8::new(0),
            step: AtomicU32::new(0),
        }
    }
}

impl BusDevice for GuestPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let step = self.step.load(Ordering::Relaxed).to_le_bytes();
        for (offset, byte) in bytes_at_mut(offset, data) {
            match offset {
                EXIT_CODE => *byte = self.exit_code.load(Ordering::Relaxed),
                USER_SPACE => *byte = self.user_space.load(Ordering::Relaxed),
                REFUSAL => *byte = self.refusal.load(Ordering::Relaxed),
                _ => {
                    let place = offset.checked_sub(STEP).and_then(|place| usize::try_from(place).ok());
                    if let Some(written) = place.and_then(|place| step.get(place)) {
                        *byte = *written;
                    }
                }
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (STEP, Ok(report)) = (offset, data.try_into().map(u32::from_le_bytes)) {
            self.step.store(report, Ordering::Relaxed);
            return self.requests.step(report);
        }
        for write in bytes_at(offset, data) {
            match write {
                (EXIT_CODE, code) => {
                    self.exit_code.store(code, Ordering::Relaxed);
                    self.requests.exit_code(code);
                }
                (USER_SPACE, _) => {
                    self.user_space.store(1, Ordering::Relaxed);
                    self.requests.user_space();
                }
                (REFUSAL, reason) => {
                    self.refusal.store(reason, Ordering::Relaxed);
                    self.requests.refused(reason);
                }
                _ => {}
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
    fn bytes_reach_the_monitor_and_can_be_read_back() {
        let requests = Arc::new(Requests::default());
        let device = GuestPort::new(requests.clone());
        assert_eq!((read_byte(&device, EXIT_CODE), read_byte(&device, USER_SPACE)), (0, 0));
        device.write(USER_SPACE, &[0]);
        device.write(EXIT_CODE, &[7]);
        device.write(EXIT_CODE, &[255]);
        assert_eq!(requests.take(), [Request::UserSpace, Request::ExitCode(7), Request::ExitCode(255)]);
        assert_eq!((read_byte(&device, EXIT_CODE), read_byte(&device, USER_SPACE)), (255, 1));
        device.write(REFUSAL, &[9]);
        assert_eq!(requests.take(), [Request::Refused(9)]);
        assert_eq!((read_byte(&device, REFUSAL), read_byte(&device, 3)), (9, 0xFF));
    }

    #[test]
    fn a_wide_write_is_several_narrow_ones() {
        let requests = Arc::new(Requests::default());
        let device = GuestPort::new(requests.clone());
        device.write(EXIT_CODE, &[3, 9]);
        assert_eq!(requests.take(), [Request::ExitCode(3), Request::UserSpace]);
    }

    #[test]
    fn a_step_is_one_write_of_32_bits() {
        let requests = Arc::new(Requests::default());
        let device = GuestPort::new(requests.clone());
        device.write(STEP, &0x8002_0B04_u32.to_le_bytes());
        assert_eq!(requests.take(), [Request::Step(0x8002_0B04)]);
        let mut read = [0; 4];
        device.read(STEP, &mut read);
        assert_eq!(u32::from_le_bytes(read), 0x8002_0B04);
        assert_eq!((read_byte(&device, STEP + 1), read_byte(&device, 3)), (0x0B, 0xFF));
        for (offset, length) in [(STEP, 1), (STEP, 2), (STEP, 8), (STEP + 1, 4), (STEP + 3, 1), (3, 4)] {
            device.write(offset, &vec![1; length]);
            assert_eq!(requests.take(), [], "{length} bytes at {offset}");
        }
        device.write(EXIT_CODE, &[1; 8]);
        assert_eq!(requests.take(), [Request::ExitCode(1), Request::UserSpace, Request::Refused(1)]);
        device.read(STEP, &mut read);
        assert_eq!(u32::from_le_bytes(read), 0x8002_0B04, "none of them counts");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics(accesses in accesses(GUEST_PORTS)) {
            perform(&GuestPort::new(Arc::new(Requests::default())), &accesses);
        }
    }
}
