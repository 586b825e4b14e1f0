//! How a payload ends, and what it tells the monitor before.

use cofferdam_firmware::layout;

use crate::cpu::{halt, outb};

/// `SLP_EN` and the place of `SLP_TYP` in the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// Gives the exit code and powers off.
pub fn exit(code: u8) -> ! {
    outb(layout::EXIT_CODE_PORT, code);
    power_off()
}

/// Powers off without an exit code.
pub fn power_off() -> ! {
    outb(layout::SLEEP_CONTROL_PORT, SLEEP_ENABLE | layout::SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT);
    halt()
}

/// Tells the monitor that the guest is up.
pub fn mark_user_space() {
    outb(layout::USER_SPACE_PORT, 1);
}
