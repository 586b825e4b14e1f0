//! The first serial port, polled.

use core::fmt;

use cofferdam_firmware::layout::SERIAL_PORT;

use crate::cpu::{inb, outb};

/// Line status register, and its bits.
const LINE_STATUS: u16 = SERIAL_PORT + 5;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Writes a byte.
pub fn write(byte: u8) {
    while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
    outb(SERIAL_PORT, byte);
}

/// A byte, if one has come in.
pub fn read() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(SERIAL_PORT))
}

/// For `print!` and `println!`.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(write);
        Ok(())
    }
}

/// Prints on the serial port.
#[macro_export]
macro_rules! print {
    ($($arguments:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::serial::Serial, format_args!($($arguments)*));
    }};
}

/// Prints a line on the serial port.
#[macro_export]
macro_rules! println {
    () => {
        $crate::serial::write(b'\n')
    };
    ($($arguments:tt)*) => {{
        $crate::print!($($arguments)*);
        $crate::serial::write(b'\n');
    }};
}
