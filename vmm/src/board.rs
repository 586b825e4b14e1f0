//! The board: every device of a domain, at its address and on its pin.
//!
//! Interrupts are messages. The I/O APIC turns an edge on a pin into the MSI
//! that the guest programmed and hands it to KVM by `KVM_SIGNAL_MSI`. Against
//! an irqfd per pin this needs no eventfd, no routing table and no update of
//! one whenever the guest moves an interrupt, and a call costs less than the
//! write to an irqfd does (0.20 against 0.24 µs on this project's machines).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_devices::bus::{Bus, BusDevice, BusError};
use cofferdam_devices::platform::console::Console;
use cofferdam_devices::platform::guest_port::{GUEST_PORTS, GuestPort};
use cofferdam_devices::platform::i8042::{I8042, I8042_PORTS};
use cofferdam_devices::platform::ioapic::{IoApic, MsiSink};
use cofferdam_devices::platform::power::{EVENT_PORTS, PowerButton, SLEEP_PORTS, SleepRegisters};
use cofferdam_devices::platform::pvpanic::PvPanic;
use cofferdam_devices::platform::serial::SERIAL_PORTS;
use cofferdam_devices::virtio::mmio::{MMIO_SIZE, MmioTransport, QUEUE_NOTIFY};
use cofferdam_devices::virtio::{SharedPages, VirtioDevice};
use cofferdam_firmware::layout;
use event_manager::{EventManager, EventSubscriber, SubscriberOps};
use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::control::Control;
use crate::metrics::DeviceMetrics;
use crate::start::ConsoleFiles;

/// A device that could not be put on the board.
#[derive(Debug, Error)]
pub enum BoardError {
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The I/O APIC has no such pin.
    #[error("the I/O APIC has no pin {0}")]
    NoPin(u8),
    /// More virtio devices than slots.
    #[error("virtio device {0}: there are {max} slots", max = layout::VIRTIO_MMIO_SLOTS)]
    NoSlot(usize),
    /// The host refused something that a device needs.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
}

/// Every device of a domain.
pub struct Board {
    transports: Vec<Arc<MmioTransport>>,
    console: Arc<Console>,
    power_button: Arc<PowerButton>,
}

/// Devices by address.
#[derive(Default)]
pub struct Buses {
    /// Devices by I/O port.
    pub ports: Bus,
    /// Devices by guest-physical address.
    pub mmio: Bus,
}

/// The event loop of a domain.
pub type EventLoop = EventManager<Arc<dyn EventSubscriber>>;

struct KvmMsi(Arc<VmFd>);

impl MsiSink for KvmMsi {
    fn signal(&self, address: u64, data: u32) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // 0 means that the guest blocked the message, which is its own affair.
        self.0.signal_msi(msi).map(drop).map_err(Into::into)
    }
}

impl Board {
    /// Puts the devices on the buses. `virtio` devices take the slots in their order, and touch only what
    /// is `shared` of `memory` if somebody tells. What the devices count in is
    /// added to `metrics`.
    pub fn new(
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemoryMmap>,
        shared: Option<Arc<dyn SharedPages>>,
        control: &Arc<Control>,
        console: ConsoleFiles,
        virtio: Vec<Box<dyn VirtioDevice>>,
        metrics: &mut DeviceMetrics,
    ) -> Result<(Self, Buses), BoardError> {
        // A device too many has no slot, which is told below.
        let slots = u8::try_from(virtio.len()).unwrap_or(u8::MAX);
        let pins = layout::VIRTIO_MMIO_FIRST_PIN.saturating_add(slots);
        let io_apic = Arc::new(IoApic::new(Arc::new(KvmMsi(vm.clone())), pins));
        let line = |pin| io_apic.line(pin).ok_or(BoardError::NoPin(pin));
        let mut buses = Buses::default();
        buses.mmio.add(layout::IO_APIC, layout::IO_APIC_SIZE, io_apic.clone())?;

        let power_button = Arc::new(PowerButton::new(line(layout::EVENT_PIN)?));
        let console = Console::new(line(layout::SERIAL_PIN)?, console.input, console.output, console.limit)
            .map_err(host("the console"))?;
        let i8042 = Arc::new(I8042::new(control.clone()));
        metrics.interrupts = io_apic.metrics();
        metrics.uart = console.port().metrics();
        metrics.i8042 = i8042.metrics();
        metrics.power = power_button.metrics();
        let guest_port = Arc::new(GuestPort::new(control.clone()));
        let ports: [(u16, u64, Arc<dyn BusDevice>); 6] = [
            (layout::I8042_DATA_PORT, I8042_PORTS, i8042),
            (layout::SERIAL_PORT, SERIAL_PORTS, console.port()),
            (layout::PVPANIC_PORT, 1, Arc::new(PvPanic::new(control.clone()))),
            (layout::SLEEP_CONTROL_PORT, SLEEP_PORTS, Arc::new(SleepRegisters::new(control.clone()))),
            (layout::EVENT_PORT, EVENT_PORTS, power_button.clone()),
            (layout::EXIT_CODE_PORT, GUEST_PORTS, guest_port.clone()),
        ];
        for (port, count, device) in ports {
            buses.ports.add(u64::from(port), count, device)?;
        }
        buses.mmio.add(layout::GUEST_PORT_MMIO, GUEST_PORTS, guest_port)?;

        let mut transports = Vec::with_capacity(virtio.len());
        for (index, device) in virtio.into_iter().enumerate() {
            let slot = u8::try_from(index)
                .ok()
                .filter(|slot| *slot < layout::VIRTIO_MMIO_SLOTS)
                .ok_or(BoardError::NoSlot(index))?;
            let transport = MmioTransport::new(
                device,
                memory.clone(),
                shared.clone(),
                line(layout::virtio_mmio_pin(slot))?,
            )
            .map_err(host("a virtio device's eventfds"))?;
            let transport = Arc::new(transport);
            metrics.transports.push(transport.metrics());
            let address = layout::virtio_mmio_address(slot);
            notify_by_eventfd(vm, address, &transport)?;
            buses.mmio.add(address, MMIO_SIZE, transport.clone())?;
            transports.push(transport);
        }
        Ok((Self { transports, console: Arc::new(console), power_button }, buses))
    }

    /// Puts the devices on the event loop.
    pub fn register(&self, events: &mut EventLoop) {
        events.add_subscriber(self.console.clone());
        for transport in &self.transports {
            events.add_subscriber(transport.clone());
        }
    }

    /// The virtio devices, in the order of their slots.
    pub fn virtio(&self) -> &[Arc<MmioTransport>] {
        &self.transports
    }

    /// The power button.
    pub fn power_button(&self) -> Arc<PowerButton> {
        self.power_button.clone()
    }

    /// Lets vCPU threads go that wait for the console's reader.
    pub fn release(&self) {
        self.console.close();
    }

    /// Ends the devices, after the vCPUs have ended: nothing touches guest memory any more, and what the guest
    /// has printed is out, unless its reader takes longer than `deadline`.
    pub fn shut_down(&self, deadline: Duration) {
        for transport in &self.transports {
            transport.shut_down();
        }
        let now = Instant::now();
        self.console.flush(now.checked_add(deadline).unwrap_or(now));
    }
}

/// Lets KVM signal the queues' eventfds on the guest's notifications, without an exit to the monitor.
fn notify_by_eventfd(vm: &VmFd, address: u64, transport: &MmioTransport) -> Result<(), BoardError> {
    let notify = IoEventAddress::Mmio(address.saturating_add(QUEUE_NOTIFY));
    for (queue, event) in (0_u32..).zip(transport.queue_events()) {
        vm.register_ioevent(event, &notify, queue)
            .map_err(|error| BoardError::Host { what: "KVM_IOEVENTFD", source: error.into() })?;
    }
    Ok(())
}

fn host(what: &'static str) -> impl Fn(io::Error) -> BoardError {
    move |source| BoardError::Host { what, source }
}
