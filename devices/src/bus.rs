//! Dispatch of port and MMIO accesses to devices.
//!
//! A bus is filled once, before the first vCPU runs, and never changes: a look-up
//! takes no lock. Each device decides on its own locking.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device that vCPUs read and write. Called from any vCPU thread, also from
/// several at once.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range. `data` comes filled
    /// with 0xFF, what a bus without a device returns; a device that ignores the access leaves it so.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be added to a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("device range {base:#x} + {length:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Length, addresses.
        length: u64,
    },
    /// The range overlaps another.
    #[error("device range {base:#x} + {length:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length, addresses.
        length: u64,
        /// First address of the range that is there.
        other: u64,
    },
}

struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// How many addresses without a device are remembered.
const MOST_ABSENT: usize = 8;

/// Address ranges and the devices behind them, sorted by address.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
    absent: Absent,
}

/// The first different addresses that were accessed and have no device, in the order of the accesses.
#[derive(Default)]
struct Absent {
    /// How many are known. What lies behind them is 0.
    count: AtomicUsize,
    addresses: Mutex<[u64; MOST_ABSENT]>,
}

impl Absent {
    /// Costs a look at one number once there are enough.
    fn note(&self, address: u64) {
        if self.count.load(Ordering::Relaxed) >= MOST_ABSENT {
            return;
        }
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.count.load(Ordering::Relaxed);
        let (known, free) = addresses.split_at_mut(count.min(MOST_ABSENT));
        if let Some(place) = free.first_mut()
            && !known.contains(&address)
        {
            *place = address;
            self.count.store(count.saturating_add(1), Ordering::Relaxed);
        }
    }
}

impl Bus {
    /// Puts `device` at `base`, `length` addresses long.
    pub fn add(&mut self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = length
            .checked_sub(1)
            .and_then(|rest| base.checked_add(rest))
            .ok_or(BusError::BadRange { base, length })?;
        if let Some(other) = self.entries.iter().find(|e| base <= e.last && e.base <= last) {
            return Err(BusError::Overlap { base, length, other: other.base });
        }
        let place = self.entries.partition_point(|e| e.base < base);
        self.entries.insert(place, Entry { base, last, device });
        Ok(())
    }

    /// Reads from the device at `address`; without one, `data` is all ones. An access that starts in a
    /// device's range and ends outside it has no device.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => self.absent.note(address),
        }
    }

    /// Writes to the device at `address`; without one, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => self.absent.note(address),
        }
    }

    /// The first few different addresses at which the guest looked for a device and there was none.
    pub fn absent(&self) -> Vec<u64> {
        let addresses = self.absent.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        addresses.iter().copied().take(self.absent.count.load(Ordering::Relaxed)).collect()
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn BusDevice, u64)> {
        let index = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = self.entries.get(index)?;
        let last = address.checked_add(u64::try_from(length).ok()?.checked_sub(1)?)?;
        (last <= entry.last).then_some((&*entry.device, address.checked_sub(entry.base)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_of_their_address() {
        let (a, b) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.add(0x100, 0x10, b.clone()).unwrap();
        bus.add(0x10, 0x10, a.clone()).unwrap();
        bus.write(0x1f, &[1]);
        bus.write(0x100, &[2, 3]);
        bus.write(0x110, &[4]);
        assert_eq!(*a.0.lock().unwrap(), [(0xf, vec![1])]);
        assert_eq!(*b.0.lock().unwrap(), [(0, vec![2, 3])]);
        let mut data = [0; 2];
        bus.read(0x105, &mut data);
        assert_eq!(data, [5, 5]);
    }

    #[test]
    fn accesses_without_a_device_read_ones() {
        let mut bus = Bus::default();
        bus.add(0x10, 0x10, Arc::new(Recorder::default())).unwrap();
        for (address, length) in [(0, 1), (0x0f, 2), (0x1f, 2), (0x20, 8), (u64::MAX, 2)] {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            assert!(data.iter().all(|&byte| byte == 0xFF), "{address:#x}");
        }
    }

    #[test]
    fn the_first_addresses_without_a_device_are_remembered_once_each() {
        let mut bus = Bus::default();
        bus.add(0x10, 0x10, Arc::new(Recorder::default())).unwrap();
        assert!(bus.absent().is_empty());
        for address in [0x70, 0x71, 0x10, 0x70, 0, 0] {
            bus.write(address, &[0]);
            bus.read(address, &mut [0]);
        }
        assert_eq!(bus.absent(), [0x70, 0x71, 0]);
        (0x20..0x1000).for_each(|address| bus.write(address, &[0]));
        assert_eq!(bus.absent(), [0x70, 0x71, 0, 0x20, 0x21, 0x22, 0x23, 0x24]);
    }

    #[test]
    fn bad_ranges_are_refused() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.add(0x10, 0x10, device.clone()).unwrap();
        assert_eq!(bus.add(0, 0, device.clone()), Err(BusError::BadRange { base: 0, length: 0 }));
        assert_eq!(
            bus.add(u64::MAX, 2, device.clone()),
            Err(BusError::BadRange { base: u64::MAX, length: 2 })
        );
        assert_eq!(bus.add(0x1f, 1, device), Err(BusError::Overlap { base: 0x1f, length: 1, other: 0x10 }));
    }
}
