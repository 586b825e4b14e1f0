//! Power management of hardware-reduced ACPI: how the guest powers off and
//! resets, and how the host presses the power button.
//!
//! [`SleepRegisters`], three byte-wide ports (ACPI 6.5, 4.8.3.6 and 4.8.3.7):
//!
//! ```text
//! offset 0  sleep control  bit 5 SLP_EN, bits 4..2 SLP_TYP; write-only, reads 0
//! offset 1  sleep status   bit 7 WAK_STS; reads 0, as this machine never wakes
//! offset 2  reset          the reset value resets; reads 0
//! ```
//!
//! [`PowerButton`], the generic event device (ACPI 6.5, 5.6.9): the host sets a
//! bit in a 32-bit word of pending events and raises the device's interrupt; the
//! guest's `_EVT` method reads the word, which clears it, and notifies the power
//! button. An edge always follows its bit, so no event waits unseen.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cofferdam_firmware::layout::{
    EVENT_POWER_BUTTON, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
};
use cofferdam_metrics::{Counter, group};

use super::{GuestRequests, bytes_at, bytes_at_mut};
use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;

/// Number of ports of [`SleepRegisters`], from [`SLEEP_CONTROL_PORT`].
pub const SLEEP_PORTS: u64 = RESET + 1;
/// Number of ports of [`PowerButton`].
pub const EVENT_PORTS: u64 = 4;

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = (SLEEP_STATUS_PORT - SLEEP_CONTROL_PORT) as u64;
const RESET: u64 = (RESET_PORT - SLEEP_CONTROL_PORT) as u64;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP: u8 = 0b111 << SLP_TYP_SHIFT;

/// Sleep control, sleep status and reset, to be put at [`SLEEP_CONTROL_PORT`].
pub struct SleepRegisters {
    requests: Arc<dyn GuestRequests>,
}

impl SleepRegisters {
    /// Registers that pass power-offs and resets to `requests`.
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in bytes_at_mut(offset, data) {
            if matches!(offset, SLEEP_CONTROL | SLEEP_STATUS | RESET) {
                *byte = 0;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for write in bytes_at(offset, data) {
            match write {
                (SLEEP_CONTROL, value)
                    if value & SLP_EN != 0 && (value & SLP_TYP) >> SLP_TYP_SHIFT == SLEEP_TYPE_S5 =>
                {
                    self.requests.power_off();
                }
                (RESET, RESET_VALUE) => self.requests.reset(),
                _ => {}
            }
        }
    }
}

group! {
    /// Of the power button.
    pub struct PowerMetrics {
        /// Presses of the power button
        pub button_count: Counter,
    }
}

/// The generic event device, whose only event is the power button.
pub struct PowerButton {
    line: Arc<dyn InterruptLine>,
    pending: AtomicU32,
    metrics: Arc<PowerMetrics>,
}

impl PowerButton {
    /// A button that raises `line` when pressed.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { line, pending: AtomicU32::new(0), metrics: Arc::default() }
    }

    /// What is counted here.
    pub fn metrics(&self) -> Arc<PowerMetrics> {
        self.metrics.clone()
    }

    /// Presses the button: asks the guest's operating system for an orderly power-off. The press stays
    /// pending even if the interrupt cannot be raised.
    pub fn press(&self) -> io::Result<()> {
        self.metrics.button_count.count();
        self.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        self.line.trigger()
    }
}

/// A read narrower than the word gives, and clears, the bytes that it covers.
impl BusDevice for PowerButton {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in bytes_at_mut(offset, data) {
            *byte = match offset {
                0..EVENT_PORTS => {
                    let shift = (offset as u32).saturating_mul(8);
                    (self.pending.fetch_and(!(0xFF << shift), Ordering::AcqRel) >> shift) as u8
                }
                _ => 0,
            };
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::*;
    use proptest::prelude::*;

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let requests = Arc::new(Requests::default());
        let device = SleepRegisters::new(requests.clone());
        for value in 0..=u8::MAX {
            device.write(SLEEP_CONTROL, &[value]);
            let expected: &[Request] =
                if value & 0b0011_1100 == 0b0011_0100 { &[Request::PowerOff] } else { &[] };
            assert_eq!(requests.take(), expected, "{value:#x}");
            device.write(SLEEP_STATUS, &[value]);
            assert_eq!(requests.take(), []);
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let requests = Arc::new(Requests::default());
        let device = SleepRegisters::new(requests.clone());
        for value in (0..=u8::MAX).filter(|&value| value != RESET_VALUE) {
            device.write(RESET, &[value]);
        }
        assert_eq!(requests.take(), []);
        device.write(RESET, &[RESET_VALUE]);
        assert_eq!(requests.take(), [Request::Reset]);
    }

    #[test]
    fn sleep_registers_read_zero() {
        let device = SleepRegisters::new(Arc::new(Requests::default()));
        device.write(0, &[0xFF; 2]);
        let mut data = [0xFF; 3];
        device.read(0, &mut data);
        assert_eq!(data, [0; 3]);
    }

    #[test]
    fn a_press_raises_the_line_and_is_seen_once() {
        let edges = Arc::new(Edges::default());
        let device = PowerButton::new(edges.clone());
        let read = || {
            let mut data = [0xFF; 4];
            device.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(), 0);
        device.press().unwrap();
        device.press().unwrap();
        assert_eq!((edges.take(), device.metrics().button_count.total()), (2, 2));
        device.write(0, &[0; 4]);
        assert_eq!(read(), EVENT_POWER_BUTTON);
        assert_eq!(read(), 0);
    }

    #[test]
    fn narrow_reads_clear_what_they_cover() {
        let device = PowerButton::new(Arc::new(Edges::default()));
        device.press().unwrap();
        assert_eq!(read_byte(&device, 1), 0);
        assert_eq!(read_byte(&device, 0), 1);
        assert_eq!(read_byte(&device, 0), 0);
        device.press().unwrap();
        let mut data = [0xFF; 2];
        device.read(2, &mut data);
        assert_eq!(data, [0, 0]);
        device.read(0, &mut data);
        assert_eq!(data, [1, 0]);
    }

    #[test]
    fn a_press_survives_a_line_that_fails() {
        struct Broken;
        impl InterruptLine for Broken {
            fn trigger(&self) -> io::Result<()> {
                Err(io::ErrorKind::Other.into())
            }
        }
        let device = PowerButton::new(Arc::new(Broken));
        device.press().unwrap_err();
        assert_eq!(read_byte(&device, 0), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics(accesses in accesses(EVENT_PORTS)) {
            perform(&SleepRegisters::new(Arc::new(Requests::default())), &accesses);
            let button = PowerButton::new(Arc::new(Edges::default()));
            button.press().unwrap();
            perform(&button, &accesses);
        }
    }
}
