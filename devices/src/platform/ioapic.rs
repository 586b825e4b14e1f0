//! The I/O APIC, in user space: it turns a device's edge on a pin into an MSI.
//!
//! Two 32-bit registers are mapped, a window onto the others (Intel 82093AA
//! datasheet, 3.0; the numbers below are its):
//!
//! ```text
//! MMIO 0x00  IOREGSEL  index of the register seen through IOWIN
//! MMIO 0x10  IOWIN     that register
//! MMIO 0x40  EOI       of version 0x20 and later; see below
//!
//! index 0x00  ID, bits 27..24
//! index 0x01  version 0x20 in bits 7..0, index of the last pin in bits 23..16
//! index 0x02  arbitration ID, equal to the ID
//! index 0x10 + 2n, 0x11 + 2n  redirection entry of pin n, low and high half
//! ```
//!
//! A redirection entry *is* an MSI in another order of bits, which is what the
//! hardware makes of it too (Intel SDM volume 3, 11.11 "Message Signalled
//! Interrupts"; Linux commit 51130d21881d "x86/ioapic: Handle Extended
//! Destination ID field in RTE"):
//!
//! ```text
//! entry bit   what                            MSI
//!  7..0       vector                          data 7..0
//! 10..8       delivery mode                   data 10..8
//! 11          destination mode (1 = logical)  address 2
//! 12          delivery status, read-only
//! 13          polarity                        (says nothing to a virtual pin)
//! 14          remote IRR, read-only, 0
//! 15          trigger mode (1 = level)        data 15, and 14 ("assert")
//! 16          mask
//! 55..49      destination ID 14..8            address 11..5
//! 63..56      destination ID 7..0             address 19..12
//! ```
//!
//! Bits 14..8 of the destination ID are the extension that a hypervisor may
//! offer as `KVM_FEATURE_MSI_EXT_DEST_ID`; without it they are 0. The other
//! bits of an entry are reserved and read as 0.
//!
//! # Edges only
//! [`InterruptLine`] knows edges, no levels. A pin that the guest programs as
//! level-triggered gets one MSI per edge all the same: the local APIC is told
//! "level", so that the guest's handler finds what it expects there, but nothing
//! is remembered until its EOI: remote IRR stays 0, and the EOI register has
//! nothing to do.
//!
//! # No edge is lost
//! A device raises one edge for any number of events and no other until its
//! driver has looked. So an edge that meets a masked pin is latched, where
//! hardware would forget it, and shows as delivery status 1 ("send pending")
//! until the guest unmasks the pin and it is delivered. Latch and entry are one
//! atomic word, hence no moment between "is it masked?" and "then latch it".

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cofferdam_firmware::layout::IO_APIC_PINS;
use cofferdam_metrics::{Counter, group};
use tracing::warn;

use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;
use crate::tally::Tally;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

const ID: u32 = 0x00;
const VERSION: u32 = 0x01;
const ARBITRATION: u32 = 0x02;
const REDIRECTION_TABLE: u32 = 0x10;

const ID_BITS: u32 = 0x0F00_0000;
/// With an EOI register, which spares the guest tricks to clear the remote IRR.
const VERSION_NUMBER: u32 = 0x20;

const LOGICAL: u64 = 1 << 11;
const SEND_PENDING: u64 = 1 << 12;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// The bits of an entry that the guest can write.
const WRITABLE: u64 = 0xFFFE_0000_0001_AFFF;

const MSI_BASE: u64 = 0xFEE0_0000;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

/// Takes MSIs to the local APICs.
pub trait MsiSink: Send + Sync {
    /// Delivers the MSI that writing `data` to `address` is. `address` has the architectural format, with
    /// bits 14..8 of the destination ID in its bits 11..5 (`KVM_SIGNAL_MSI` ignores these and wants them in
    /// bits 46..40). The guest chooses both freely, so an error may be of its making.
    fn signal(&self, address: u64, data: u32) -> io::Result<()>;
}

group! {
    /// Of the interrupts of all devices.
    pub struct InterruptMetrics {
        /// Interrupts that were delivered
        pub triggers: Counter,
        /// Writes of the guest to the redirection table
        pub config_updates: Counter,
        /// Interrupts that the host refused to deliver
        pub trigger_fails: Counter,
        /// Messages about these that were not logged, because there were too many
        pub rate_limited_log_count: Counter,
    }
}

/// An I/O APIC with as many pins as it is used with: a guest that sets it up makes some 27 accesses for each.
pub struct IoApic {
    sink: Arc<dyn MsiSink>,
    select: AtomicU32,
    id: AtomicU32,
    /// The redirection entries. Bit 12 is the latch of an edge that met a masked pin.
    entries: Box<[AtomicU64]>,
    metrics: Arc<InterruptMetrics>,
    /// Lines about interrupts that the host refused to deliver.
    failures: Tally,
}

impl IoApic {
    /// An I/O APIC after reset, with `pins` pins, 1 to [`IO_APIC_PINS`], all masked, that delivers to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>, pins: u8) -> Self {
        Self {
            sink,
            select: AtomicU32::new(0),
            id: AtomicU32::new(0),
            entries: (0..pins.clamp(1, IO_APIC_PINS)).map(|_| AtomicU64::new(MASKED)).collect(),
            metrics: Arc::default(),
            failures: Tally::default(),
        }
    }

    /// What is counted here.
    pub fn metrics(&self) -> Arc<InterruptMetrics> {
        self.metrics.clone()
    }

    /// The line that raises `pin`; none if there is no such pin.
    pub fn line(self: &Arc<Self>, pin: u8) -> Option<Arc<dyn InterruptLine>> {
        self.entries.get(usize::from(pin))?;
        Some(Arc::new(Pin { io_apic: self.clone(), pin }))
    }

    fn raise(&self, entry: &AtomicU64) -> io::Result<()> {
        let latched = entry.try_update(Ordering::AcqRel, Ordering::Acquire, |e| {
            (e & MASKED != 0).then_some(e | SEND_PENDING)
        });
        match latched {
            Ok(_) => Ok(()),
            Err(unmasked) => self.deliver(unmasked),
        }
    }

    /// Replaces the writable ones of the entry's `bits`, and delivers the latched edge if that unmasks the pin.
    fn program(&self, entry: &AtomicU64, bits: u64, value: u64) {
        let bits = bits & WRITABLE;
        let change = |old: u64| {
            let new = (old & !bits) | (value & bits);
            if new & MASKED == 0 { new & !SEND_PENDING } else { new }
        };
        let old = entry.update(Ordering::AcqRel, Ordering::Acquire, change);
        let new = change(old);
        if (old & !new) & SEND_PENDING != 0 {
            // What fails here was logged, and there is no device to tell.
            let _ = self.deliver(new);
        }
    }

    fn deliver(&self, entry: u64) -> io::Result<()> {
        let (address, data) = compose(entry);
        let delivered = self.sink.signal(address, data);
        match &delivered {
            Ok(()) => self.metrics.triggers.count(),
            Err(error) => {
                self.metrics.trigger_fails.count();
                if let Some(line) = self.failures.count(&self.metrics.rate_limited_log_count) {
                    warn!(dropped = line.dropped, %error, address, data, "cannot deliver an interrupt");
                }
            }
        }
        delivered
    }

    /// The redirection entry that register `index` is a half of, and the shift of that half.
    fn entry(&self, index: u32) -> Option<(&AtomicU64, u32)> {
        let half = index.checked_sub(REDIRECTION_TABLE)?;
        let entry = self.entries.get(usize::try_from(half / 2).ok()?)?;
        Some((entry, if half.is_multiple_of(2) { 0 } else { u32::BITS }))
    }

    fn read_register(&self, index: u32) -> u32 {
        match index {
            ID | ARBITRATION => self.id.load(Ordering::Relaxed),
            VERSION => VERSION_NUMBER | (self.entries.len().saturating_sub(1) as u32) << 16,
            _ => match self.entry(index) {
                Some((entry, shift)) => (entry.load(Ordering::Acquire) >> shift) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&self, index: u32, value: u32) {
        if index == ID {
            self.id.store(value & ID_BITS, Ordering::Relaxed);
        } else if let Some((entry, shift)) = self.entry(index) {
            self.metrics.config_updates.count();
            self.program(entry, u64::from(u32::MAX) << shift, u64::from(value) << shift);
        }
    }
}

/// The MSI, address and data, that a redirection entry stands for.
fn compose(entry: u64) -> (u64, u32) {
    // Destination ID and its extension keep their order; bit 48 of an entry is always 0.
    let mut address = MSI_BASE | (entry >> 48) << 4;
    if entry & LOGICAL != 0 {
        address |= MSI_LOGICAL;
    }
    let mut data = (entry & 0x7FF) as u32;
    if entry & LEVEL != 0 {
        data |= MSI_LEVEL | MSI_ASSERT;
    }
    (address, data)
}

/// Only aligned 32-bit accesses reach a register; others read 0 and write nothing.
impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (SELECT, 4) => self.select.load(Ordering::Relaxed),
            (WINDOW, 4) => self.read_register(self.select.load(Ordering::Relaxed)),
            _ => return data.fill(0),
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.select.store(value & 0xFF, Ordering::Relaxed),
            WINDOW => self.write_register(self.select.load(Ordering::Relaxed), value),
            _ => {}
        }
    }
}

struct Pin {
    io_apic: Arc<IoApic>,
    pin: u8,
}

impl InterruptLine for Pin {
    fn trigger(&self) -> io::Result<()> {
        match self.io_apic.entries.get(usize::from(self.pin)) {
            Some(entry) => self.io_apic.raise(entry),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Recorder {
        messages: Mutex<Vec<(u64, u32)>>,
        refuse: AtomicBool,
    }

    impl MsiSink for Recorder {
        fn signal(&self, address: u64, data: u32) -> io::Result<()> {
            if self.refuse.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.messages.lock().unwrap().push((address, data));
            Ok(())
        }
    }

    fn new() -> (Arc<Recorder>, Arc<IoApic>) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), Arc::new(IoApic::new(recorder, IO_APIC_PINS)))
    }

    fn write(io_apic: &IoApic, index: u32, value: u32) {
        io_apic.write(SELECT, &index.to_le_bytes());
        io_apic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(io_apic: &IoApic, index: u32) -> u32 {
        let mut data = [0xFF; 4];
        io_apic.write(SELECT, &index.to_le_bytes());
        io_apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    /// As Linux does: high half first.
    fn program(io_apic: &IoApic, pin: u32, entry: u64) {
        write(io_apic, REDIRECTION_TABLE + 2 * pin + 1, (entry >> 32) as u32);
        write(io_apic, REDIRECTION_TABLE + 2 * pin, entry as u32);
    }

    #[test]
    fn identification_registers() {
        let (_, io_apic) = new();
        assert_eq!(read(&io_apic, VERSION), 0x0057_0020);
        write(&io_apic, ID, u32::MAX);
        assert_eq!(read(&io_apic, ID), 0x0F00_0000);
        assert_eq!(read(&io_apic, ARBITRATION), 0x0F00_0000);
        write(&io_apic, VERSION, 0);
        write(&io_apic, ARBITRATION, 0);
        assert_eq!(read(&io_apic, VERSION), 0x0057_0020);
        assert_eq!(read(&io_apic, ARBITRATION), 0x0F00_0000);
    }

    #[test]
    fn there_are_as_many_pins_as_are_wanted() {
        for (wanted, pins) in [(0, 1), (1, 1), (27, 27), (u8::MAX, IO_APIC_PINS)] {
            let io_apic = Arc::new(IoApic::new(Arc::new(Recorder::default()), wanted));
            assert_eq!(read(&io_apic, VERSION), 0x20 | (u32::from(pins) - 1) << 16);
            assert!(io_apic.line(pins - 1).is_some() && io_apic.line(pins).is_none());
            let behind = REDIRECTION_TABLE + 2 * u32::from(pins);
            write(&io_apic, behind, u32::MAX);
            assert_eq!(read(&io_apic, behind), 0);
        }
    }

    #[test]
    fn entries_start_masked_and_keep_only_writable_bits() {
        let (recorder, io_apic) = new();
        for pin in 0..u32::from(IO_APIC_PINS) {
            assert_eq!(read(&io_apic, REDIRECTION_TABLE + 2 * pin), 0x0001_0000);
            assert_eq!(read(&io_apic, REDIRECTION_TABLE + 2 * pin + 1), 0);
            program(&io_apic, pin, u64::MAX);
            assert_eq!(read(&io_apic, REDIRECTION_TABLE + 2 * pin), 0x0001_AFFF);
            assert_eq!(read(&io_apic, REDIRECTION_TABLE + 2 * pin + 1), 0xFFFE_0000);
        }
        let behind = REDIRECTION_TABLE + 2 * u32::from(IO_APIC_PINS);
        write(&io_apic, behind, u32::MAX);
        assert_eq!(read(&io_apic, behind), 0);
        assert!(recorder.messages.lock().unwrap().is_empty());
    }

    #[test]
    fn messages_have_the_architectural_format() {
        let cases: [(u64, u64, u32); 5] = [
            (0x0000_0000_0000_0030, 0xFEE0_0000, 0x0030),
            (0xFF00_0000_0000_00EF, 0xFEEF_F000, 0x00EF),
            (0x0300_0000_0000_0931, 0xFEE0_3004, 0x0131),
            (0x0100_0000_0000_A032, 0xFEE0_1000, 0xC032),
            (0x12FE_0000_0000_0433, 0xFEE1_2FE0, 0x0433),
        ];
        for (entry, address, data) in cases {
            assert_eq!(compose(entry), (address, data), "{entry:#x}");
        }
    }

    #[test]
    fn each_edge_is_one_message() {
        let (recorder, io_apic) = new();
        program(&io_apic, 87, 0x0200_0000_0000_0041);
        let line = io_apic.line(87).unwrap();
        line.trigger().unwrap();
        line.trigger().unwrap();
        assert_eq!(*recorder.messages.lock().unwrap(), [(0xFEE0_2000, 0x41), (0xFEE0_2000, 0x41)]);
        assert!(io_apic.line(88).is_none());
        assert!(io_apic.line(255).is_none());
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_delivered_on_unmask_once() {
        let (recorder, io_apic) = new();
        let line = io_apic.line(5).unwrap();
        line.trigger().unwrap();
        line.trigger().unwrap();
        assert_eq!(read(&io_apic, 0x1A), 0x0001_1000, "latched, seen as delivery status");
        write(&io_apic, 0x1A, 0x0001_0055);
        assert_eq!(read(&io_apic, 0x1A), 0x0001_1055, "a write that keeps the mask keeps the latch");
        assert!(recorder.messages.lock().unwrap().is_empty());
        write(&io_apic, 0x1A, 0x0000_1055);
        assert_eq!(read(&io_apic, 0x1A), 0x0000_0055);
        write(&io_apic, 0x1A, 0x0001_0055);
        write(&io_apic, 0x1A, 0x0000_0055);
        assert_eq!(*recorder.messages.lock().unwrap(), [(0xFEE0_0000, 0x55)]);
    }

    #[test]
    fn a_guest_cannot_forge_an_edge() {
        let (recorder, io_apic) = new();
        program(&io_apic, 7, 0x0001_5060);
        program(&io_apic, 7, 0x0000_5060);
        assert!(recorder.messages.lock().unwrap().is_empty());
    }

    #[test]
    fn failures_of_the_sink_reach_the_device_and_no_one_else() {
        let (recorder, io_apic) = new();
        let line = io_apic.line(4).unwrap();
        line.trigger().unwrap();
        recorder.refuse.store(true, Ordering::Relaxed);
        program(&io_apic, 4, 0x44);
        assert_eq!(line.trigger().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        recorder.refuse.store(false, Ordering::Relaxed);
        line.trigger().unwrap();
        assert_eq!(recorder.messages.lock().unwrap().len(), 1);
        let metrics = io_apic.metrics();
        assert_eq!((metrics.triggers.total(), metrics.trigger_fails.total()), (1, 2));
        assert_eq!(metrics.config_updates.total(), 2);
    }

    #[test]
    fn odd_accesses_read_zero_and_write_nothing() {
        let (_, io_apic) = new();
        write(&io_apic, ID, 0x0500_0000);
        for (offset, length) in
            [(0, 1), (0x10, 1), (0x10, 2), (0x10, 8), (0x11, 4), (0x12, 2), (0x40, 4), (0xFFC, 4)]
        {
            io_apic.write(offset, &vec![0; length]);
            let mut data = vec![0xFF; length];
            io_apic.read(offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0), "{offset:#x}, {length}");
        }
        assert_eq!(read(&io_apic, ID), 0x0500_0000);
    }

    struct Counter(AtomicUsize);

    impl MsiSink for Counter {
        fn signal(&self, _address: u64, _data: u32) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    /// In each round one thread unmasks a pin while another raises an edge; either order must deliver it.
    #[test]
    fn no_edge_is_lost_between_trigger_and_unmask() {
        const ROUNDS: usize = 10_000;
        let counter = Arc::new(Counter(AtomicUsize::new(0)));
        let io_apic = Arc::new(IoApic::new(counter.clone(), IO_APIC_PINS));
        let (begun, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let unmasker = std::thread::spawn({
            let (io_apic, begun, ended) = (io_apic.clone(), begun.clone(), ended.clone());
            move || {
                for round in 1..=ROUNDS {
                    while begun.load(Ordering::SeqCst) < round {
                        std::thread::yield_now();
                    }
                    io_apic.write_register(0x22, 0x50);
                    ended.store(round, Ordering::SeqCst);
                }
            }
        });
        let line = io_apic.line(9).unwrap();
        let mut delivered = Vec::with_capacity(ROUNDS);
        for round in 1..=ROUNDS {
            io_apic.write_register(0x22, 0x0001_0050);
            begun.store(round, Ordering::SeqCst);
            // Meets the other thread at different places.
            (0..round % 128).for_each(|_| std::hint::spin_loop());
            line.trigger().unwrap();
            while ended.load(Ordering::SeqCst) < round {
                std::thread::yield_now();
            }
            delivered.push(counter.0.swap(0, Ordering::SeqCst));
        }
        unmasker.join().unwrap();
        assert_eq!(delivered.iter().position(|&count| count != 1), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_access_panics_or_sets_reserved_bits(accesses in prop::collection::vec(
            (prop_oneof![Just(0_u64), Just(0x10), any::<u64>(), 0..0x50_u64], 0..4_usize, any::<u64>()), 1..64)) {
            let (_, io_apic) = new();
            for (offset, width, value) in accesses {
                let bytes = value.to_le_bytes();
                io_apic.write(offset, &bytes[..1 << width]);
                io_apic.read(offset, &mut [0xFF; 8][..1 << width]);
                io_apic.line(value as u8).map(|line| line.trigger());
            }
            for entry in &io_apic.entries {
                prop_assert_eq!(entry.load(Ordering::Relaxed) & !(WRITABLE | SEND_PENDING), 0);
            }
        }
    }
}
