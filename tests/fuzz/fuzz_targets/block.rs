//! Requests through a live block device on a file in memory, by both engines.
//!
//! Holds: every chain comes back exactly once, or the device needs reset; the file keeps its size, and a read-only one
//! its content; after a reset the device holds nothing of the guest's memory.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cofferdam_devices::virtio::block::{Block, BlockFile, BlockOptions, BlockSource, Engine};
use cofferdam_devices::virtio::testing::{Line, Ring};
use cofferdam_devices::virtio::{Driver, Memory, VirtioDevice, VirtioInterrupt};
use cofferdam_fuzz::device::Looped;
use cofferdam_fuzz::{Address, DATA, Length, clear_rings, three_regions};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const RING: u64 = 0x1000;
const QUEUE_SIZE: u16 = 256;
/// Headers and status bytes of requests, 0x40 bytes each.
const HEADERS: u64 = 0x8000;
const DISK: u64 = 64 << 10;
/// Waits of 100 ms for a device that has work.
const PATIENCE: u32 = 100;

#[derive(Arbitrary, Debug)]
struct Input {
    drive: u8,
    event_idx: bool,
    flush: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// As drivers do it: data of whole sectors, in one piece.
    Good {
        kind: u8,
        sector: u8,
        sectors: u8,
    },
    Request {
        kind: Kind,
        sector: Sector,
        parts: Vec<Part>,
        header: bool,
        status: bool,
    },
    /// One of discard and write zeroes, with its segments.
    Ranges {
        kind: bool,
        segments: Vec<(Sector, Length, u8)>,
    },
    Again(u8),
    Index(u16),
    Scribble(u16, u64),
    Notify,
    Run,
    Reset,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Usual(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sector {
    Near(u8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Part {
    address: Address,
    length: Length,
    writes: bool,
}

impl Kind {
    fn get(self) -> u32 {
        match self {
            Self::Usual(kind) => u32::from(kind % 16),
            Self::Any(kind) => kind,
        }
    }
}

impl Sector {
    fn get(self) -> u64 {
        match self {
            Self::Near(sector) => sector.into(),
            Self::Any(sector) => sector,
        }
    }
}

struct Drive {
    device: Looped<Block>,
    file: File,
    read_only: bool,
}

fn content() -> Vec<u8> {
    (0..DISK).map(|at| ((at * 7) >> 3) as u8).collect()
}

impl Drive {
    fn new(engine: Engine, block_size: u32, read_only: bool) -> Self {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(&content(), 0).unwrap();
        let source = BlockSource::File(file.try_clone().unwrap(), "memfd".into());
        let options = BlockOptions { engine, block_size, read_only, ..BlockOptions::new(source, "fuzz") };
        let device = Block::new(BlockFile::open(options).unwrap()).unwrap();
        Self { device: Looped::new(device), file, read_only }
    }
}

struct Host {
    memory: Memory,
    drives: Vec<Drive>,
}

impl Host {
    fn new() -> Self {
        let mut drives = Vec::new();
        for engine in [Engine::Sync, Engine::Async] {
            for (block_size, read_only) in [(512, false), (4096, false), (512, true)] {
                drives.push(Drive::new(engine, block_size, read_only));
            }
        }
        Self { memory: three_regions(), drives }
    }
}

/// The guest from one reset to the next.
struct Guest<'a> {
    drive: &'a mut Drive,
    memory: &'a Memory,
    ring: Ring,
    interrupt: Arc<VirtioInterrupt>,
    features: u64,
    next: u16,
    heads: Vec<u32>,
    /// The guest has broken rules that make it impossible to say what should come back.
    wild: bool,
}

impl Guest<'_> {
    fn activate(&mut self) {
        clear_rings(self.memory);
        (self.next, self.wild) = (0, false);
        self.heads.clear();
        self.interrupt = Arc::new(VirtioInterrupt::new(Arc::new(Line::default())));
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let driver = Driver {
            shared: None,
            memory: self.memory.clone(),
            queues: vec![self.ring.queue(event_idx)],
            features: self.features,
            interrupt: self.interrupt.clone(),
        };
        self.drive.device.with(|device| device.activate(driver)).unwrap();
    }

    fn used(&self) -> u16 {
        self.ring.u16(self.ring.used() + 2)
    }

    /// Makes a chain available, while there are descriptors.
    fn offer(&mut self, parts: &[(u64, u32, bool)]) {
        let count = parts.len() as u16;
        if count == 0 || self.next + count > QUEUE_SIZE {
            return;
        }
        // What the device writes over rings, headers and status bytes of others is the guest's own fault.
        let over = |&(address, _, writes): &(u64, u32, bool)| writes && address < HEADERS;
        self.wild |= parts.iter().any(over);
        self.ring.offer_chain(self.next, parts);
        self.heads.push(self.next.into());
        self.next += count;
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)], header: bool, status: bool) {
        let place = HEADERS + self.heads.len() as u64 % 256 * 0x40;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.ring.write(place, &bytes);
        let mut parts = Vec::new();
        parts.extend(header.then_some((place, 16, false)));
        parts.extend(data.iter().take(32));
        parts.extend(status.then_some((place + 0x20, 1, true)));
        self.offer(&parts);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Good { kind, sector, sectors } => {
                let writes = kind % 2 == 0;
                let data = (DATA, u32::from(sectors % 9) * 512, writes);
                let data = if data.1 == 0 { &[][..] } else { &[data] };
                self.request(u32::from(!writes), (*sector % 140).into(), data, true, true);
            }
            Step::Request { kind, sector, parts, header, status } => {
                let mut data: Vec<_> =
                    parts.iter().map(|part| (part.address.get(), part.length.get(), part.writes)).collect();
                data.sort_by_key(|part| part.2);
                self.request(kind.get(), sector.get(), &data, *header, *status);
            }
            Step::Ranges { kind, segments } => {
                let mut bytes = Vec::new();
                for (sector, length, flags) in segments.iter().take(8) {
                    bytes.extend(sector.get().to_le_bytes());
                    bytes.extend(length.get().to_le_bytes());
                    bytes.extend(u32::from(flags % 4).to_le_bytes());
                }
                let place = DATA + self.heads.len() as u64 * 0x80;
                self.ring.write(place, &bytes);
                let parts = [(place, bytes.len() as u32, false)];
                let parts = if bytes.is_empty() { &[][..] } else { &parts };
                self.request(if *kind { 11 } else { 13 }, 0, parts, true, true);
            }
            Step::Again(head) => {
                self.wild = true;
                self.ring.offer((*head).into());
            }
            Step::Index(index) => {
                self.wild = true;
                self.ring.set_index(*index);
            }
            Step::Scribble(offset, value) => {
                self.wild = true;
                self.ring.write(u64::from(*offset % 0x4000), &value.to_le_bytes());
            }
            Step::Notify => self.drive.device.with(|device| device.notify(0)),
            Step::Run => {
                self.drive.device.run(0);
            }
            Step::Reset => {
                self.end();
                self.activate();
            }
        }
    }

    /// Lets the device finish, and takes it away.
    fn end(&mut self) {
        self.drive.device.with(|device| device.notify(0));
        let mut idle = 0;
        while !self.wild && !self.interrupt.is_broken() && usize::from(self.used()) != self.heads.len() {
            if !self.drive.device.run(100) {
                idle += 1;
                assert!(idle < PATIENCE, "the device stopped at {} of {}", self.used(), self.heads.len());
            }
        }
        if !self.wild {
            let mut heads: Vec<u32> = self.ring.completed().iter().map(|&(head, _)| head).collect();
            heads.sort_unstable();
            if self.interrupt.is_broken() {
                heads.dedup();
                assert_eq!(heads.len(), usize::from(self.used()), "answered twice");
                assert!(heads.iter().all(|head| self.heads.contains(head)));
            } else {
                assert_eq!(heads, self.heads);
            }
        }
        self.drive.device.with(|device| device.reset());
    }
}

fuzz_target!(|input: Input| {
    thread_local!(static HOST: RefCell<Host> = RefCell::new(Host::new()));
    HOST.with_borrow_mut(|host| {
        let count = host.drives.len();
        let drive = &mut host.drives[usize::from(input.drive) % count];
        if !drive.read_only {
            drive.file.write_all_at(&content(), 0).unwrap();
        }
        let memory = &host.memory;
        let offered = drive.device.with(|device| device.features());
        // Without flush, every write must be durable before it is answered.
        let own = if input.flush { offered } else { offered & !(1 << 9) };
        let features =
            own | u64::from(input.event_idx) << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let mut guest = Guest {
            drive,
            memory,
            ring: Ring::new(memory, RING, QUEUE_SIZE),
            interrupt: Arc::new(VirtioInterrupt::new(Arc::new(Line::default()))),
            features,
            next: 0,
            heads: Vec::new(),
            wild: false,
        };
        guest.activate();
        for step in &input.steps {
            guest.step(step);
        }
        guest.end();
        drop(guest);
        assert_eq!(Arc::strong_count(memory), 1, "the device kept guest memory");
        assert_eq!(drive.file.metadata().unwrap().len(), DISK);
        if drive.read_only {
            let mut now = vec![0; DISK as usize];
            drive.file.read_exact_at(&mut now, 0).unwrap();
            assert!(now == content(), "a read-only drive was written");
        }
    });
});
