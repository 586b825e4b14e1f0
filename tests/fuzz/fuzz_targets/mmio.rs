//! Register sequences against the transport, with the real block and vsock devices behind it.
//!
//! Holds: status bits come in their order and go by a reset only, a device that needs one says so until then, and
//! whatever the guest did before, a reset leaves a device that a well-behaved driver can use.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cofferdam_devices::bus::BusDevice;
use cofferdam_devices::virtio::block::{Block, BlockFile, BlockOptions, BlockSource, Engine};
use cofferdam_devices::virtio::mmio::{MMIO_SIZE, MmioTransport, QUEUE_NOTIFY};
use cofferdam_devices::virtio::testing::{Line, Ring};
use cofferdam_devices::virtio::vsock::{SocketFile, Vsock, bind};
use cofferdam_devices::virtio::{Memory, VirtioDevice, status};
use cofferdam_fuzz::{Address, DATA, Length, clear_rings, three_regions};
use event_manager::{EventManager, EventSubscriber, SubscriberOps};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const MAGIC_VALUE: u64 = 0x00;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DEVICE_LOW: u64 = 0xA0;

/// The registers that a driver may write.
const REGISTERS: [u64; 17] = [
    DEVICE_FEATURES_SELECT,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SELECT,
    QUEUE_SELECT,
    QUEUE_SIZE,
    QUEUE_READY,
    QUEUE_NOTIFY,
    INTERRUPT_ACK,
    STATUS,
    QUEUE_DESC_LOW,
    0x84,
    QUEUE_DRIVER_LOW,
    0x94,
    QUEUE_DEVICE_LOW,
    0xA4,
    0xAC,
    0xB0,
];

const FEATURES_OK: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
const ALL: u32 = FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET | status::FAILED;
/// Length of the drive's content and of one request, bytes.
const DISK: usize = 8192;
/// Waits of 100 ms for a device that has work.
const PATIENCE: u32 = 100;

#[derive(Arbitrary, Debug)]
struct Input {
    device: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Register { register: u8, value: u32 },
    Small { register: u8, value: u8 },
    Raw { offset: u16, width: u8, value: u64 },
    Read { offset: u16, width: u8 },
    Negotiate(Option<u64>),
    SetUpQueue { index: u8, size: Option<u16> },
    Place { part: u8, address: Address },
    Start,
    Offer { queue: u8, head: u8, parts: Vec<(Address, Length, bool)> },
    Index { queue: u8, index: u16 },
    Scribble(u16, u64),
    Notify(u8),
    Run,
}

struct Machine {
    transport: Arc<MmioTransport>,
    memory: Memory,
    /// Holders of `memory` while the device has none.
    holders: usize,
    queues: usize,
    is_vsock: bool,
    events: EventManager<Arc<dyn EventSubscriber>>,
}

impl Machine {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = three_regions();
        let (queues, is_vsock) = (device.queue_sizes().len(), device.device_type() == 19);
        let transport =
            Arc::new(MmioTransport::new(device, memory.clone(), None, Arc::new(Line::default())).unwrap());
        let mut events = EventManager::<Arc<dyn EventSubscriber>>::new().unwrap();
        events.add_subscriber(transport.clone());
        let holders = Arc::strong_count(&memory);
        Self { transport, memory, holders, queues, is_vsock, events }
    }

    fn ring(&self, queue: u8) -> Ring {
        Ring::new(&self.memory, 0x1000 + 0x4000 * (u64::from(queue) % self.queues as u64), 256)
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Goes to `FEATURES_OK`, with all that is offered or with something else.
    fn negotiate(&self, features: Option<u64>) {
        for step in [0, status::ACKNOWLEDGE, status::ACKNOWLEDGE | status::DRIVER] {
            self.set(STATUS, step);
        }
        for half in [0, 1] {
            self.set(DEVICE_FEATURES_SELECT, half);
            self.set(DRIVER_FEATURES_SELECT, half);
            let chosen = features.map(|features| (features >> (32 * half)) as u32);
            self.set(DRIVER_FEATURES, chosen.unwrap_or_else(|| self.get(DEVICE_FEATURES)));
        }
        self.set(STATUS, FEATURES_OK);
    }

    fn set_up_queue(&self, index: u8, size: u16) {
        let ring = self.ring(index);
        self.set(QUEUE_SELECT, u32::from(index) % self.queues as u32);
        self.set(QUEUE_SIZE, size.into());
        for (register, address) in [
            (QUEUE_DESC_LOW, ring.table()),
            (QUEUE_DRIVER_LOW, ring.available()),
            (QUEUE_DEVICE_LOW, ring.used()),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, 0);
        }
        self.set(QUEUE_READY, 1);
    }

    fn run(&mut self) {
        for _ in 0..16 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                break;
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let width = |width: u8| usize::from(width % 8) + 1;
        match *step {
            Step::Register { register, value } => {
                self.set(REGISTERS[usize::from(register) % REGISTERS.len()], value)
            }
            Step::Small { register, value } => {
                self.set(REGISTERS[usize::from(register) % REGISTERS.len()], value.into());
            }
            Step::Raw { offset, width: bytes, value } => {
                let data = &value.to_le_bytes()[..width(bytes)];
                self.transport.write(u64::from(offset) % MMIO_SIZE, data);
            }
            Step::Read { offset, width: bytes } => {
                self.transport.read(u64::from(offset) % MMIO_SIZE, &mut [0xFF; 8][..width(bytes)]);
            }
            Step::Negotiate(features) => self.negotiate(features),
            Step::SetUpQueue { index, size } => self.set_up_queue(index, size.unwrap_or(256)),
            Step::Place { part, address } => {
                let register = [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW][usize::from(part) % 3];
                self.set(register, address.get() as u32);
                self.set(register + 4, (address.get() >> 32) as u32);
            }
            Step::Start => {
                (0..self.queues as u8).for_each(|index| self.set_up_queue(index, 256));
                self.set(STATUS, FEATURES_OK | status::DRIVER_OK);
            }
            Step::Offer { queue, head, ref parts } => {
                let parts: Vec<_> = parts
                    .iter()
                    .take(usize::from(255 - head).min(8))
                    .map(|(address, length, writes)| (address.get(), length.get(), *writes))
                    .collect();
                if !parts.is_empty() {
                    self.ring(queue).offer_chain(head.into(), &parts);
                }
            }
            Step::Index { queue, index } => self.ring(queue).set_index(index),
            Step::Scribble(offset, value) => {
                self.memory.write_obj(value, GuestAddress((offset & !7).into())).unwrap();
            }
            Step::Notify(queue) => self.set(QUEUE_NOTIFY, u32::from(queue % 4)),
            Step::Run => self.run(),
        }
    }

    /// What holds after every step; `before` is the status before it.
    fn check(&self, before: u32) -> u32 {
        assert_eq!(self.get(MAGIC_VALUE), 0x7472_6976);
        assert!(self.get(INTERRUPT_STATUS) <= 3 && self.get(QUEUE_READY) <= 1);
        let now = self.get(STATUS);
        assert_eq!(now & !ALL, 0);
        let has = |bit: u32| now & bit != 0;
        assert!(!has(status::DRIVER) || has(status::ACKNOWLEDGE));
        assert!(!has(status::FEATURES_OK) || has(status::DRIVER));
        assert!(!has(status::DRIVER_OK) || has(status::FEATURES_OK));
        let lost = before & !now;
        assert!(lost == 0 || now & (status::NEEDS_RESET | status::FAILED) == 0, "{before:#x} to {now:#x}");
        let holds = Arc::strong_count(&self.memory) - self.holders;
        assert_eq!(holds > 0, has(status::DRIVER_OK) && !self.gave_up(now), "status {now:#x}");
        now
    }

    /// Whether a device with this status may have let go of memory.
    fn gave_up(&self, now: u32) -> bool {
        now & status::NEEDS_RESET != 0 && Arc::strong_count(&self.memory) == self.holders
    }

    /// A well-behaved driver comes, and finds what it expects.
    fn serves(&mut self) {
        self.set(STATUS, 0);
        assert_eq!((self.get(STATUS), self.get(INTERRUPT_STATUS)), (0, 0));
        assert_eq!(Arc::strong_count(&self.memory), self.holders, "a reset left memory with the device");
        clear_rings(&self.memory);
        self.negotiate(None);
        (0..self.queues as u8).for_each(|index| self.set_up_queue(index, 256));
        self.set(STATUS, FEATURES_OK | status::DRIVER_OK);
        assert_eq!(self.get(STATUS), FEATURES_OK | status::DRIVER_OK);
        if self.is_vsock {
            self.refuses_a_packet()
        } else {
            self.reads_the_disk()
        }
        self.set(STATUS, 0);
        assert_eq!(Arc::strong_count(&self.memory), self.holders);
    }

    fn wait_for_one(&mut self, ring: &Ring) {
        for _ in 0..PATIENCE {
            if ring.u16(ring.used() + 2) == 1 {
                return;
            }
            self.events.run_with_timeout(100).unwrap();
        }
        panic!("no answer, status {:#x}", self.get(STATUS));
    }

    fn reads_the_disk(&mut self) {
        let ring = self.ring(0);
        ring.write(DATA, &[0; 16]);
        ring.write(DATA + 0x100, &[0xFF; DISK + 1]);
        ring.offer_chain(0, &[(DATA, 16, false), (DATA + 0x100, DISK as u32 + 1, true)]);
        self.set(QUEUE_NOTIFY, 0);
        self.wait_for_one(&ring);
        assert_eq!(ring.completed(), [(0, DISK as u32 + 1)]);
        let mut data = [0xFF; DISK + 1];
        self.memory.read_slice(&mut data, GuestAddress(DATA + 0x100)).unwrap();
        assert_eq!(data[DISK], 0);
    }

    /// A packet of a connection that does not exist is answered by RST.
    fn refuses_a_packet(&mut self) {
        let (rx, tx) = (self.ring(0), self.ring(1));
        rx.offer_chain(0, &[(DATA + 0x1000, 0x1000, true)]);
        let mut header = [0; 44];
        (header[0], header[8], header[28], header[30]) = (3, 2, 1, 5);
        tx.write(DATA, &header);
        tx.offer_chain(0, &[(DATA, 44, false)]);
        self.set(QUEUE_NOTIFY, 1);
        self.wait_for_one(&rx);
        assert_eq!(rx.completed(), [(0, 44)]);
        assert_eq!(rx.u16(DATA + 0x1000 + 30), 3);
    }
}

fn block(engine: Engine) -> Machine {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&[0x5A; DISK], 0).unwrap();
    let options =
        BlockOptions { engine, ..BlockOptions::new(BlockSource::File(file, "memfd".into()), "fuzz") };
    Machine::new(Box::new(Block::new(BlockFile::open(options).unwrap()).unwrap()))
}

fn vsock(directory: &TempDir) -> (Machine, SocketFile) {
    let path = directory.path().join("v");
    let (listener, file) = bind(&path).unwrap();
    (Machine::new(Box::new(Vsock::new(3, Some(listener), Some(path)).unwrap())), file)
}

struct Machines {
    machines: [Machine; 3],
    _file: SocketFile,
    _directory: TempDir,
}

impl Machines {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (vsock, file) = vsock(&directory);
        Self {
            machines: [block(Engine::Sync), block(Engine::Async), vsock],
            _file: file,
            _directory: directory,
        }
    }
}

fuzz_target!(|input: Input| {
    thread_local!(static MACHINES: RefCell<Machines> = RefCell::new(Machines::new()));
    MACHINES.with_borrow_mut(|machines| {
        let machine = &mut machines.machines[usize::from(input.device) % 3];
        clear_rings(&machine.memory);
        let mut status = machine.check(0);
        for step in &input.steps {
            machine.step(step);
            status = machine.check(status);
        }
        machine.serves();
    });
});
