//! The devices that every domain has, at their addresses on the buses: I/O APIC, serial port, power management,
//! i8042, pvpanic, the guest's ports.
//!
//! Holds: an edge on an unmasked pin is one MSI at once, one on a masked pin is one MSI when the pin is unmasked, and
//! nothing else makes an MSI; bytes beyond a device read as ones; a request of the guest comes only from a write.
#![no_main]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use cofferdam_devices::bus::{Bus, BusDevice};
use cofferdam_devices::platform::GuestRequests;
use cofferdam_devices::platform::console::Console;
use cofferdam_devices::platform::guest_port::{GUEST_PORTS, GuestPort};
use cofferdam_devices::platform::i8042::{I8042, I8042_PORTS};
use cofferdam_devices::platform::ioapic::{IoApic, MsiSink};
use cofferdam_devices::platform::power::{EVENT_PORTS, PowerButton, SLEEP_PORTS, SleepRegisters};
use cofferdam_devices::platform::pvpanic::PvPanic;
use cofferdam_devices::platform::serial::SERIAL_PORTS;
use cofferdam_firmware::layout;
use event_manager::{EventManager, EventSubscriber, SubscriberOps};
use libfuzzer_sys::fuzz_target;

/// Accesses of one input; each sends at most eight bytes, so that the console's queue never makes the guest wait.
const MOST_STEPS: usize = 4096;
const PINS: usize = layout::IO_APIC_PINS as usize;

#[derive(Arbitrary, Debug)]
enum Step {
    Port { place: u8, offset: u8, width: u8, value: Option<u64> },
    AnyPort { port: u16, width: u8, value: Option<u64> },
    IoApic { offset: u16, width: u8, value: Option<u64> },
    Entry { index: u8, value: u32 },
    ReadEntry { index: u8 },
    Edge(u8),
    Input(u8),
    Button,
    Loop,
}

#[derive(Default)]
struct Sink(Mutex<Vec<(u64, u32)>>);

impl MsiSink for Sink {
    fn signal(&self, address: u64, data: u32) -> io::Result<()> {
        self.0.lock().unwrap().push((address, data));
        // A guest chooses what fails.
        if data & 0xFF < 16 { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
}

#[derive(Default)]
struct Requests(AtomicU64);

impl GuestRequests for Requests {
    fn power_off(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn reset(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn panicked(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn exit_code(&self, _code: u8) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn user_space(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn refused(&self, _reason: u8) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn step(&self, _report: u32) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

const PORTS: [(u16, u64); 6] = [
    (layout::I8042_DATA_PORT, I8042_PORTS),
    (layout::SERIAL_PORT, SERIAL_PORTS),
    (layout::PVPANIC_PORT, 1),
    (layout::SLEEP_CONTROL_PORT, SLEEP_PORTS),
    (layout::EVENT_PORT, EVENT_PORTS),
    (layout::EXIT_CODE_PORT, GUEST_PORTS),
];

struct Rig {
    ports: Bus,
    mmio: Bus,
    io_apic: Arc<IoApic>,
    sink: Arc<Sink>,
    requests: Arc<Requests>,
    button: Arc<PowerButton>,
    events: EventManager<Arc<dyn EventSubscriber>>,
    input: io::PipeWriter,
    /// Edges that met a masked pin.
    latched: [bool; PINS],
}

impl Rig {
    fn new() -> Self {
        let sink = Arc::new(Sink::default());
        let requests = Arc::new(Requests::default());
        let io_apic = Arc::new(IoApic::new(sink.clone(), layout::IO_APIC_PINS));
        let line = |pin| io_apic.line(pin).unwrap();
        let button = Arc::new(PowerButton::new(line(layout::EVENT_PIN)));
        let (reader, input) = io::pipe().unwrap();
        let output = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        let console = Arc::new(
            Console::new(line(layout::SERIAL_PIN), Some(reader.into()), Some(output.into()), None).unwrap(),
        );
        let devices: [Arc<dyn BusDevice>; 6] = [
            Arc::new(I8042::new(requests.clone())),
            console.port(),
            Arc::new(PvPanic::new(requests.clone())),
            Arc::new(SleepRegisters::new(requests.clone())),
            button.clone(),
            Arc::new(GuestPort::new(requests.clone())),
        ];
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        for ((port, count), device) in PORTS.into_iter().zip(devices) {
            ports.add(port.into(), count, device).unwrap();
        }
        mmio.add(layout::IO_APIC, layout::IO_APIC_SIZE, io_apic.clone()).unwrap();
        let mut events = EventManager::<Arc<dyn EventSubscriber>>::new().unwrap();
        events.add_subscriber(console);
        let latched = [false; PINS];
        Self { ports, mmio, io_apic, sink, requests, button, events, input, latched }
    }

    fn port(&self, port: u64, width: u8, value: Option<u64>) {
        let width = 1 << (width % 4);
        let before = self.requests.0.load(Ordering::SeqCst);
        match value {
            Some(value) => self.ports.write(port, &value.to_le_bytes()[..width]),
            None => {
                let mut data = [0x55; 8];
                self.ports.read(port, &mut data[..width]);
                assert_eq!(before, self.requests.0.load(Ordering::SeqCst), "a read asked for something");
                let last = port + width as u64 - 1;
                if !PORTS
                    .iter()
                    .any(|&(base, count)| (u64::from(base)..u64::from(base) + count).contains(&port))
                {
                    assert!(data[..width].iter().all(|&byte| byte == 0xFF), "{port:#x} to {last:#x}");
                }
            }
        }
    }

    fn register(&self, index: u32) -> u32 {
        let mut data = [0; 4];
        self.mmio.write(layout::IO_APIC, &index.to_le_bytes());
        self.mmio.read(layout::IO_APIC + 0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_register(&self, index: u32, value: u32) {
        self.mmio.write(layout::IO_APIC, &index.to_le_bytes());
        self.mmio.write(layout::IO_APIC + 0x10, &value.to_le_bytes());
    }

    fn is_masked(&self, pin: usize) -> bool {
        self.register(0x10 + 2 * pin as u32) & 1 << 16 != 0
    }

    /// The MSIs since the last look; each must be one for the local APICs.
    fn messages(&self) -> usize {
        let messages = std::mem::take(&mut *self.sink.0.lock().unwrap());
        for (address, data) in &messages {
            assert_eq!(address & !0xF_FFFF, 0xFEE0_0000);
            assert_eq!(data & !0xC7FF, 0);
        }
        messages.len()
    }

    /// After writes to the I/O APIC: the latched edges of pins that are unmasked now were delivered.
    fn check_latches(&mut self) {
        let mut due = 0;
        for pin in 0..PINS {
            if self.latched[pin] && !self.is_masked(pin) {
                self.latched[pin] = false;
                due += 1;
            }
        }
        assert_eq!(self.messages(), due);
    }

    fn edge(&mut self, pin: u8) {
        let masked = self.is_masked(usize::from(pin));
        let _ = self.io_apic.line(pin).unwrap().trigger();
        assert_eq!(self.messages(), usize::from(!masked));
        self.latched[usize::from(pin)] |= masked;
    }

    /// A device may have raised edges on its own pin.
    fn note(&mut self, pin: u8) {
        self.messages();
        let pending = self.register(0x10 + 2 * u32::from(pin)) & 1 << 12 != 0;
        assert!(pending || !self.latched[usize::from(pin)] || !self.is_masked(usize::from(pin)));
        self.latched[usize::from(pin)] = pending;
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Port { place, offset, width, value } => {
                let (base, count) = PORTS[usize::from(place) % PORTS.len()];
                self.port(u64::from(base) + u64::from(offset) % (count + 2), width, value);
                self.note(layout::SERIAL_PIN);
            }
            Step::AnyPort { port, width, value } => {
                self.port(port.into(), width, value);
                self.note(layout::SERIAL_PIN);
            }
            Step::IoApic { offset, width, value } => {
                let (address, width) = (layout::IO_APIC + u64::from(offset), 1 << (width % 4));
                match value {
                    Some(value) => self.mmio.write(address, &value.to_le_bytes()[..width]),
                    None => self.mmio.read(address, &mut [0; 8][..width]),
                }
                self.check_latches();
            }
            Step::Entry { index, value } => {
                self.set_register(index.into(), value);
                self.check_latches();
            }
            Step::ReadEntry { index } => {
                self.register(index.into());
                self.check_latches();
            }
            Step::Edge(pin) => self.edge(pin % layout::IO_APIC_PINS),
            Step::Input(count) => {
                // The pipe has more room than the inputs of one run.
                let _ = io::Write::write(&mut self.input, &vec![b'x'; usize::from(count % 8)]);
            }
            Step::Button => {
                let _ = self.button.press();
                self.note(layout::EVENT_PIN);
            }
            Step::Loop => {
                self.events.run_with_timeout(0).unwrap();
                self.note(layout::SERIAL_PIN);
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut rig = Rig::new();
    for step in steps.iter().take(MOST_STEPS) {
        rig.step(step);
    }
    assert!(rig.io_apic.line(layout::IO_APIC_PINS).is_none());
    assert_eq!(rig.register(1), 0x20 | (u32::from(layout::IO_APIC_PINS) - 1) << 16);
});
