//! The serial port: a 16550 of eight byte-wide registers, by vm-superio.
//!
//! It sends at once and never looks busy. What it receives waits in its FIFO of
//! 64 bytes; what it sends goes to the console's queue. This file adds to
//! vm-superio:
//!
//! - A vCPU that finds the queue full waits *before* it takes the UART's lock, so
//!   that the event loop can always hand over input and drain the queue.
//! - Who hands over input is woken when the UART takes bytes again.
//! - Interrupt identification. vm-superio forgets all causes when the guest reads
//!   IIR, and received data also when the guest reads the first byte of several.
//!   On a level-triggered line that would go unnoticed; here a lost cause is lost
//!   input. So received data is reported as long as there is some, alone, as the
//!   highest of the two causes that there are, and an empty transmitter that was
//!   pending beside it is raised again (16550D datasheet, table IV).
//!
//! With that, edges suffice: a cause that appears raises an edge, whether or not
//! another is pending; enabling a cause that is there raises one too; and Linux's
//! 8250 driver serves a port until IIR names no cause.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cofferdam_metrics::{Counter, group};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::console::queue::OutputQueue;
use super::{bytes_at, bytes_at_mut, lock};
use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;

/// Number of ports.
pub const SERIAL_PORTS: u64 = 8;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

const ENABLE_RECEIVED_DATA: u8 = 1 << 0;
const NO_CAUSE: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 1;
const RECEIVED_DATA: u8 = 1 << 2;
const DIVISOR_LATCH: u8 = 1 << 7;
const DATA_READY: u8 = 1 << 0;

group! {
    /// Of the serial port.
    pub struct UartMetrics {
        /// Times that the guest read the receive register
        pub read_count: Counter,
        /// Bytes that the guest sent
        pub write_count: Counter,
        /// Times that the console's input or output failed, and was given up
        pub error_count: Counter,
        /// Bytes of the guest that were dropped, as the console's output had failed or the domain had ended
        pub lost_bytes: Counter,
        /// Bytes of the guest that were dropped, as they were beyond the console's limit
        pub rate_limiter_dropped_bytes: Counter,
    }
}

type Uart = Serial<Line, InputGate, Transmitter>;

/// A serial port.
pub struct SerialPort {
    uart: Mutex<Uart>,
    output: Option<Arc<OutputQueue>>,
    metrics: Arc<UartMetrics>,
}

impl SerialPort {
    /// A port that raises `line`, sends into `output` (nowhere without one), and writes to `wake` when it can
    /// receive what it could not.
    pub(super) fn new(
        line: Arc<dyn InterruptLine>,
        output: Option<Arc<OutputQueue>>,
        wake: Arc<EventFd>,
    ) -> Self {
        let metrics = output.as_ref().map(|queue| queue.metrics().clone()).unwrap_or_default();
        let gate = InputGate { shut: AtomicBool::new(false), wake, metrics: metrics.clone() };
        let uart = Serial::with_events(Line(line), gate, Transmitter(output.clone()));
        Self { uart: Mutex::new(uart), output, metrics }
    }

    /// What is counted here.
    pub fn metrics(&self) -> Arc<UartMetrics> {
        self.metrics.clone()
    }

    /// Receives the first of `bytes` and says how many. If not all, `wake` is written to when that may have changed.
    pub(super) fn receive(&self, bytes: &[u8]) -> usize {
        let mut uart = lock(&self.uart);
        // The only error left is a full FIFO, as the line's errors end at it.
        let count = uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        uart.events().shut.store(count < bytes.len(), Ordering::Relaxed);
        count
    }

    fn write_register(&self, register: u8, value: u8) {
        if let (DATA, Some(output)) = (register, &self.output) {
            output.wait_for_room();
        }
        let mut uart = lock(&self.uart);
        // Neither the transmitter nor the line returns errors.
        let _ = uart.write(register, value);
        if register == MODEM_CONTROL {
            // The guest may have left loopback mode, in which nothing is received.
            uart.events().open();
        }
    }
}

fn read_register(uart: &mut Uart, register: u8) -> u8 {
    let value = uart.read(register);
    // With the divisor latch on, there is no interrupt enable register to go by.
    if register != INTERRUPT_IDENTIFICATION || uart.read(LINE_CONTROL) & DIVISOR_LATCH != 0 {
        return value;
    }
    let enabled = uart.read(INTERRUPT_ENABLE);
    if enabled & ENABLE_RECEIVED_DATA == 0 || uart.read(LINE_STATUS) & DATA_READY == 0 {
        return value;
    }
    if value & TRANSMITTER_EMPTY != 0 {
        // Raises again what is there and enabled.
        let _ = uart.write(INTERRUPT_ENABLE, enabled);
    }
    value & !(NO_CAUSE | TRANSMITTER_EMPTY) | RECEIVED_DATA
}

/// A wide access is one access per byte, to registers that follow each other.
impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = lock(&self.uart);
        for (offset, byte) in bytes_at_mut(offset, data).take_while(|(offset, _)| *offset < SERIAL_PORTS) {
            *byte = read_register(&mut uart, offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, value) in bytes_at(offset, data).take_while(|(offset, _)| *offset < SERIAL_PORTS) {
            self.write_register(offset as u8, value);
        }
    }
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // The interrupt controller logs it; for the UART there is nothing to do.
        let _ = self.0.trigger();
        Ok(())
    }
}

struct Transmitter(Option<Arc<OutputQueue>>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(queue) = &self.0 {
            bytes.iter().for_each(|&byte| queue.push(byte));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shut while input waits that the UART did not take. Used under the UART's lock.
struct InputGate {
    shut: AtomicBool,
    wake: Arc<EventFd>,
    metrics: Arc<UartMetrics>,
}

impl InputGate {
    fn open(&self) {
        if self.shut.swap(false, Ordering::Relaxed) {
            // Fails only when the counter is at its end, and then the loop is awake.
            let _ = self.wake.write(1);
        }
    }
}

impl SerialEvents for InputGate {
    fn buffer_read(&self) {
        self.metrics.read_count.count();
    }
    fn out_byte(&self) {
        self.metrics.write_count.count();
    }
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.open();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::*;
    use crate::rate_limiter::RateLimiter;
    use proptest::prelude::*;

    struct Port {
        port: SerialPort,
        queue: Arc<OutputQueue>,
        edges: Arc<Edges>,
        wake: Arc<EventFd>,
    }

    impl Port {
        fn new() -> Self {
            let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
            let queue = Arc::new(OutputQueue::new(wake.clone(), RateLimiter::default()));
            let edges = Arc::new(Edges::default());
            let port = SerialPort::new(edges.clone(), Some(queue.clone()), wake.clone());
            Self { port, queue, edges, wake }
        }

        fn read(&self, register: u8) -> u8 {
            read_byte(&self.port, register.into())
        }

        fn write(&self, register: u8, value: u8) {
            self.port.write(register.into(), &[value]);
        }

        fn cause(&self) -> u8 {
            self.read(INTERRUPT_IDENTIFICATION) & 0x0F
        }
    }

    #[test]
    fn what_the_guest_sends_is_queued() {
        let port = Port::new();
        for byte in 0..=u8::MAX {
            assert_eq!(port.read(LINE_STATUS) & 0x60, 0x60);
            port.write(DATA, byte);
        }
        let mut bytes = [0; 512];
        assert_eq!(port.queue.peek(&mut bytes), 256);
        assert!(bytes.iter().zip(0..=u8::MAX).all(|(&byte, expected)| byte == expected));
        port.write(LINE_CONTROL, DIVISOR_LATCH);
        port.write(DATA, 1);
        port.write(LINE_CONTROL, 0);
        port.write(MODEM_CONTROL, 0x10);
        port.write(DATA, 1);
        assert_eq!(port.queue.peek(&mut bytes), 256, "divisor and loopback are no output");
        assert_eq!(port.port.metrics().write_count.total(), 256);
        port.queue.discard();
        assert_eq!(port.port.metrics().lost_bytes.total(), 256);
    }

    #[test]
    fn interrupts_of_the_transmitter() {
        let port = Port::new();
        port.write(DATA, 1);
        assert_eq!((port.edges.take(), port.cause()), (0, NO_CAUSE));
        port.write(INTERRUPT_ENABLE, 2);
        assert_eq!((port.edges.take(), port.cause(), port.cause()), (1, TRANSMITTER_EMPTY, NO_CAUSE));
        // Linux sends up to 16 bytes per interrupt.
        (0..16).for_each(|byte| port.write(DATA, byte));
        assert_eq!((port.edges.take(), port.cause()), (1, TRANSMITTER_EMPTY));
    }

    #[test]
    fn received_data_is_reported_until_it_is_read() {
        let port = Port::new();
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!(port.port.receive(b"abc"), 3);
        assert_eq!(port.edges.take(), 1);
        for byte in *b"abc" {
            assert_eq!((port.cause(), port.cause()), (RECEIVED_DATA, RECEIVED_DATA));
            assert_eq!(port.read(LINE_STATUS) & DATA_READY, 1);
            assert_eq!(port.read(DATA), byte);
        }
        assert_eq!(port.port.metrics().read_count.total(), 3);
        assert_eq!((port.cause(), port.read(LINE_STATUS) & DATA_READY), (NO_CAUSE, 0));
        assert_eq!(port.port.receive(b"d"), 1);
        assert_eq!((port.edges.take(), port.cause()), (1, RECEIVED_DATA));
    }

    #[test]
    fn an_empty_transmitter_is_not_forgotten_for_received_data() {
        let port = Port::new();
        port.write(INTERRUPT_ENABLE, 3);
        port.port.receive(b"a");
        assert_eq!((port.edges.take(), port.cause()), (2, RECEIVED_DATA));
        assert!(port.edges.take() >= 1, "raised again");
        port.read(DATA);
        assert_eq!((port.cause(), port.cause()), (TRANSMITTER_EMPTY, NO_CAUSE));
    }

    /// Linux masks the port's interrupts while it prints a message to its console.
    #[test]
    fn data_received_while_masked_is_raised_on_unmask() {
        let port = Port::new();
        port.write(INTERRUPT_ENABLE, 0);
        port.port.receive(b"a");
        assert_eq!((port.edges.take(), port.cause()), (0, NO_CAUSE));
        port.write(INTERRUPT_ENABLE, 1);
        assert_eq!((port.edges.take(), port.cause()), (1, RECEIVED_DATA));
    }

    #[test]
    fn a_full_fifo_asks_for_more_when_it_is_empty() {
        let port = Port::new();
        assert_eq!(port.port.receive(&[1; 100]), 64);
        assert_eq!(port.port.receive(&[1; 36]), 0);
        (0..63).for_each(|_| {
            port.read(DATA);
        });
        port.wake.read().unwrap_err();
        port.read(DATA);
        assert_eq!(port.wake.read().unwrap(), 1);
        assert_eq!(port.port.receive(&[1; 36]), 36);
        (0..40).for_each(|_| {
            port.read(DATA);
        });
        port.wake.read().unwrap_err();
    }

    #[test]
    fn input_waits_while_the_guest_tests_loopback() {
        let port = Port::new();
        port.write(MODEM_CONTROL, 0x10);
        assert_eq!(port.port.receive(b"a"), 0);
        port.write(DATA, b'x');
        assert_eq!(port.read(DATA), b'x');
        port.wake.read().unwrap();
        assert_eq!(port.port.receive(b"a"), 0);
        port.write(MODEM_CONTROL, 0);
        port.wake.read().unwrap();
        assert_eq!(port.port.receive(b"a"), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics(rounds in prop::collection::vec((accesses(SERIAL_PORTS), 0..100_usize), 1..4)) {
            let port = Port::new();
            for (accesses, input) in rounds {
                perform(&port.port, &accesses);
                prop_assert!(port.port.receive(&[7; 100][..input]) <= input);
            }
        }
    }
}
