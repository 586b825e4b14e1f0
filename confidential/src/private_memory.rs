//! The memory of a domain that keeps some of it from the host: who may see which
//! page, and how a page changes sides.
//!
//! Each slot of RAM has two backings: a guest_memfd, which only the guest can reach, and a memfd that the
//! monitor maps and the devices use. KVM's memory attributes say on which side a page is. When a page changes sides
//! what was on the other one is punched out, so that no page is held twice.
//!
//! A page is *shared* once the guest has asked for it, *private* once the image or the guest has, and *unclaimed*
//! before that. KVM counts an unclaimed page as shared, as marking all of a domain's memory at its start would take
//! time that grows with the memory; a device is kept from it all the same.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cofferdam_firmware::layout::{MIB, PAGE_SIZE};
use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::{FallocateFlags, fallocate};
use thiserror::Error;
use vm_memory::FileOffset;

use crate::sys;

/// Bytes that are converted at a time: KVM holds its locks meanwhile, and takes a time that grows with them.
const CHUNK: u64 = 64 * MIB;
/// Bytes that become private at an access of the guest which did not ask before: what page tables map at once.
const STEP: u64 = 2 * MIB;
/// Pages of a word of a bitmap.
const WORD: u64 = u64::BITS as u64;

/// A side of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host sees it.
    Shared,
    /// Only the guest sees it.
    Private,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Private => "private",
        })
    }
}

/// A change that was not made.
#[derive(Debug, Error)]
pub enum ConversionError {
    /// The guest asked for something that cannot be.
    #[error("{length:#x} bytes at {gpa:#x} are not whole pages of this domain's RAM")]
    Range {
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        length: u64,
    },
    /// The host refused.
    #[error("{call} of {length:#x} bytes at {gpa:#x}: {source}")]
    Host {
        /// The call.
        call: &'static str,
        /// Guest-physical address.
        gpa: u64,
        /// Length, bytes.
        length: u64,
        /// What it answered.
        #[source]
        source: io::Error,
    },
}

/// A slot of RAM.
#[derive(Debug)]
pub struct PrivateSlot {
    /// Guest-physical addresses.
    range: Range<u64>,
    /// What of it is shared.
    shared: FileOffset,
    /// What of it is private, from the same start.
    private: File,
    /// A bit for each page that is shared.
    is_shared: Bitmap,
    /// A bit for each page that is private.
    is_private: Bitmap,
}

impl PrivateSlot {
    /// A slot with nothing but unclaimed pages at `range`, which are whole pages.
    pub fn new(range: Range<u64>, shared: FileOffset, private: File) -> Self {
        let pages = range.end.saturating_sub(range.start) / PAGE_SIZE;
        Self { range, shared, private, is_shared: Bitmap::new(pages), is_private: Bitmap::new(pages) }
    }

    /// The numbers of the pages of a range inside.
    fn pages(&self, range: &Range<u64>) -> Range<u64> {
        let page = |address: u64| address.saturating_sub(self.range.start) / PAGE_SIZE;
        page(range.start)..page(range.end)
    }

    /// As much around the page at `gpa`, in its [`STEP`], as is unclaimed: what may become private with it.
    fn unclaimed_around(&self, gpa: u64) -> Range<u64> {
        let start = (gpa & !STEP.wrapping_sub(1)).max(self.range.start);
        let end = (gpa | STEP.wrapping_sub(1)).saturating_add(1).min(self.range.end);
        let step = self.pages(&(start..end));
        let page = self.pages(&(gpa..gpa)).start;
        let next = page.saturating_add(1);
        let is_unclaimed = |page: &u64| !self.is_shared.contains(*page) && !self.is_private.contains(*page);
        let first = (step.start..page).rev().take_while(is_unclaimed).last().unwrap_or(page);
        let last = (next..step.end).take_while(is_unclaimed).last().unwrap_or(page);
        let address = |page: u64| self.range.start.saturating_add(page.saturating_mul(PAGE_SIZE));
        address(first)..address(last.saturating_add(1))
    }
}

/// The memory of a domain that keeps some of it from the host.
#[derive(Debug)]
pub struct PrivateMemory {
    slots: Vec<PrivateSlot>,
    /// Held while pages change sides.
    changing: Mutex<()>,
}

impl PrivateMemory {
    /// That of these slots.
    pub fn new(slots: Vec<PrivateSlot>) -> Self {
        Self { slots, changing: Mutex::new(()) }
    }

    /// Whether all these bytes are shared, so that a device may use them. None at all are.
    pub fn is_shared(&self, gpa: u64, length: u64) -> bool {
        let Some(last) = length.checked_sub(1) else { return true };
        let Some(end) = gpa.checked_add(last) else { return false };
        let Some(slot) = self.slots.iter().find(|slot| slot.range.contains(&gpa)) else { return false };
        if !slot.range.contains(&end) {
            return false;
        }
        let pages = slot.pages(&(gpa..end));
        slot.is_shared.contains_all(pages.start..pages.end.saturating_add(1))
    }

    /// Moves whole pages to a side, in chunks. After each, and before the next, `go_on` is told of it, and may stop.
    ///
    /// # Errors
    /// Of the range nothing has changed; of the host, some may have.
    pub fn convert(
        &self,
        vm: &VmFd,
        gpa: u64,
        length: u64,
        side: Side,
        mut go_on: impl FnMut(&Range<u64>) -> bool,
    ) -> Result<(), ConversionError> {
        let (slot, range) = self.find(gpa, length)?;
        for chunk in chunks(range) {
            self.change(vm, slot, &chunk, side)?;
            if !go_on(&chunk) {
                break;
            }
        }
        Ok(())
    }

    /// The guest accessed memory on the side `side`, where it is not. Moves it there: if it becomes private, together with
    /// the unclaimed pages around it; if it becomes shared, alone, as private content is lost. Returns what was moved.
    pub fn fault(&self, vm: &VmFd, gpa: u64, length: u64, side: Side) -> Result<Range<u64>, ConversionError> {
        let start = gpa & !PAGE_SIZE.wrapping_sub(1);
        let end = gpa.checked_add(length.max(1)).and_then(|end| end.checked_next_multiple_of(PAGE_SIZE));
        let bytes =
            end.and_then(|end| end.checked_sub(start)).ok_or(ConversionError::Range { gpa, length })?;
        let (slot, mut range) = self.find(start, bytes)?;
        if side == Side::Private && bytes == PAGE_SIZE {
            range = slot.unclaimed_around(start);
        }
        self.change(vm, slot, &range, side)?;
        Ok(range)
    }

    /// Lets KVM map `range` for the guest through `vcpu`, which is not in the guest, before the guest touches it page by
    /// page. What KVM does not map now it maps then.
    pub fn populate(&self, vcpu: &VcpuFd, range: &Range<u64>) {
        let mut gpa = range.start;
        while gpa < range.end {
            let size = range.end.saturating_sub(gpa);
            match sys::pre_fault(vcpu, gpa, size) {
                Ok(left) if left < size => gpa = range.end.saturating_sub(left),
                _ => return,
            }
        }
    }

    fn find(&self, gpa: u64, length: u64) -> Result<(&PrivateSlot, Range<u64>), ConversionError> {
        let wrong = || ConversionError::Range { gpa, length };
        let aligned = gpa.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE) && length != 0;
        let range = gpa..gpa.checked_add(length).filter(|_| aligned).ok_or_else(wrong)?;
        let inside = |slot: &&PrivateSlot| slot.range.start <= range.start && range.end <= slot.range.end;
        let slot = self.slots.iter().find(inside).ok_or_else(wrong)?;
        Ok((slot, range))
    }

    fn change(
        &self,
        vm: &VmFd,
        slot: &PrivateSlot,
        range: &Range<u64>,
        side: Side,
    ) -> Result<(), ConversionError> {
        let (gpa, length) = (range.start, range.end.saturating_sub(range.start));
        let offset = gpa.saturating_sub(slot.range.start);
        let failed = |call| move |source: io::Error| ConversionError::Host { call, gpa, length, source };
        let attributes = |attributes: u32| {
            let attributes =
                kvm_memory_attributes { address: gpa, size: length, attributes: attributes.into(), flags: 0 };
            vm.set_memory_attributes(attributes)
                .map_err(|error| failed("KVM_SET_MEMORY_ATTRIBUTES")(error.into()))
        };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let pages = slot.pages(range);
        let _changing = self.lock();
        match side {
            Side::Private => {
                // Devices first: what they still write is gone with the hole.
                slot.is_shared.set(pages.clone(), false);
                attributes(KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
                let offset = slot.shared.start().saturating_add(offset);
                fallocate(slot.shared.file(), hole, offset, length)
                    .map_err(|error| failed("a hole in the shared side")(error.into()))?;
                slot.is_private.set(pages, true);
            }
            Side::Shared => {
                slot.is_private.set(pages.clone(), false);
                attributes(0)?;
                fallocate(&slot.private, hole, offset, length)
                    .map_err(|error| failed("a hole in the private side")(error.into()))?;
                slot.is_shared.set(pages, true);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a range at multiples of [`CHUNK`].
fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        let start = next;
        next = (start | CHUNK.wrapping_sub(1)).saturating_add(1).min(range.end);
        (start < range.end).then_some(start..next)
    })
}

/// A set of pages.
#[derive(Debug)]
struct Bitmap(Vec<AtomicU64>);

impl Bitmap {
    fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The words with a part of `pages`, and the bits of it in each.
    fn words(&self, pages: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = pages.start / WORD;
        let words = self.0.get(usize::try_from(first).unwrap_or(usize::MAX)..).unwrap_or_default();
        (first..pages.end.div_ceil(WORD)).zip(words).map(move |(number, word)| {
            let start = number.saturating_mul(WORD);
            let from = pages.start.saturating_sub(start);
            let to = pages.end.saturating_sub(start).min(WORD);
            // Up to 64 bits, from 0 to 63 on.
            let others = WORD.saturating_sub(to.saturating_sub(from)) as u32;
            (word, u64::MAX.checked_shr(others).unwrap_or(0) << from.min(63))
        })
    }

    fn set(&self, pages: Range<u64>, to: bool) {
        for (word, bits) in self.words(pages) {
            if to {
                word.fetch_or(bits, Ordering::SeqCst);
            } else {
                word.fetch_and(!bits, Ordering::SeqCst);
            }
        }
    }

    fn contains_all(&self, pages: Range<u64>) -> bool {
        let mut words = self.words(pages);
        words.all(|(word, bits)| word.load(Ordering::SeqCst) & bits == bits)
    }

    fn contains(&self, page: u64) -> bool {
        self.contains_all(page..page.saturating_add(1))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::host;
    use proptest::prelude::*;

    /// Slots with these starts and lengths.
    fn memory(slots: &[(u64, u64)]) -> PrivateMemory {
        let file = || File::open("/dev/null").unwrap();
        let slot =
            |&(start, length)| PrivateSlot::new(start..start + length, FileOffset::new(file(), 0), file());
        PrivateMemory::new(slots.iter().map(slot).collect())
    }

    #[test]
    fn ranges_are_whole_pages_of_one_slot() {
        let memory = memory(&[(0, 8 * MIB), (1 << 32, MIB)]);
        for (gpa, length) in [(0, 4096), (0, 8 * MIB), (8 * MIB - 4096, 4096), (1 << 32, MIB)] {
            assert_eq!(memory.find(gpa, length).unwrap().1, gpa..gpa + length);
        }
        for (gpa, length) in [
            (0, 0),
            (1, 4096),
            (0, 4095),
            (8 * MIB, 4096),
            (8 * MIB - 4096, 8192),
            (u64::MAX - 4095, 4096),
            (u64::MAX - 4095, 8192),
            (0, u64::MAX - 4095),
            (0xC000_0000, 4096),
        ] {
            let error = memory.find(gpa, length).unwrap_err();
            assert!(matches!(error, ConversionError::Range { .. }), "{gpa:#x} {length:#x}");
        }
    }

    #[test]
    fn large_ranges_are_cut() {
        let cut = |range| chunks(range).map(|chunk| (chunk.start, chunk.end)).collect::<Vec<_>>();
        assert_eq!(cut(MIB..2 * MIB), [(MIB, 2 * MIB)]);
        assert_eq!(cut(MIB..CHUNK), [(MIB, CHUNK)]);
        let end = 2 * CHUNK + 4096;
        assert_eq!(cut(MIB..end), [(MIB, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, end)]);
        assert_eq!(cut(5..5), []);
    }

    #[test]
    fn devices_see_what_is_shared_and_nothing_else() {
        let memory = memory(&[(0, MIB), (1 << 32, MIB)]);
        assert!(!memory.is_shared(0, 1), "unclaimed");
        memory.slots[0].is_shared.set(2..5, true);
        memory.slots[1].is_shared.set(0..256, true);
        for (gpa, length, shared) in [
            (0x2000, 0x3000, true),
            (0x2000, 0x3001, false),
            (0x1fff, 2, false),
            (0x4fff, 1, true),
            (0x5000, 1, false),
            (0x5000, 0, true),
            (1 << 32, MIB, true),
            (1 << 32, MIB + 1, false),
            (0xC000_0000, 1, false),
            (u64::MAX, 2, false),
            (0x2000, u64::MAX, false),
        ] {
            assert_eq!(memory.is_shared(gpa, length), shared, "{gpa:#x} {length:#x}");
        }
    }

    #[test]
    fn a_fault_takes_no_page_that_somebody_has() {
        let memory = memory(&[(0, 5 * MIB)]);
        let slot = &memory.slots[0];
        assert_eq!(slot.unclaimed_around(0x3000), 0..STEP);
        assert_eq!(slot.unclaimed_around(STEP), STEP..2 * STEP);
        assert_eq!(slot.unclaimed_around(5 * MIB - 4096), 2 * STEP..5 * MIB);
        slot.is_shared.set(2..3, true);
        slot.is_private.set(7..8, true);
        assert_eq!(slot.unclaimed_around(0x5000), 0x3000..0x7000);
        assert_eq!(slot.unclaimed_around(0x1000), 0..0x2000);
        // The page itself changes, whoever had it.
        assert_eq!(slot.unclaimed_around(0x2000), 0..0x7000);
        assert_eq!(slot.unclaimed_around(0x8000), 0x8000..STEP);
    }

    /// A VM whose KVM knows nothing of private memory: each change fails, and says of what it was.
    fn vm() -> VmFd {
        host::require(Path::new("/dev/kvm")).unwrap().create_vm().unwrap()
    }

    /// Where a change was tried.
    fn tried(error: ConversionError) -> Option<Range<u64>> {
        match error {
            ConversionError::Host { call: "KVM_SET_MEMORY_ATTRIBUTES", gpa, length, .. } => {
                Some(gpa..gpa + length)
            }
            _ => None,
        }
    }

    #[test]
    fn a_fault_that_takes_from_the_guest_takes_one_page() {
        let (memory, vm) = (memory(&[(0, 5 * MIB)]), vm());
        let moved = |gpa, length, side| tried(memory.fault(&vm, gpa, length, side).unwrap_err());
        assert_eq!(moved(0x3456, 1, Side::Private), Some(0..STEP));
        assert_eq!(moved(0x3456, 1, Side::Shared), Some(0x3000..0x4000));
        assert_eq!(moved(0x3000, 0, Side::Shared), Some(0x3000..0x4000));
        assert_eq!(moved(0x3fff, 2, Side::Private), Some(0x3000..0x5000));
        for (gpa, length) in
            [(5 * MIB, 4096), (5 * MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 4096, 4096), (8, u64::MAX)]
        {
            for side in [Side::Private, Side::Shared] {
                assert_eq!(moved(gpa, length, side), None, "{gpa:#x} {length:#x}");
            }
        }
    }

    /// A device must not see a page for a moment that the guest takes for its own.
    #[test]
    fn a_page_that_changes_sides_is_no_device_s_meanwhile() {
        let (memory, vm) = (memory(&[(0, MIB)]), vm());
        let slot = &memory.slots[0];
        slot.is_shared.set(0..4, true);
        slot.is_private.set(8..12, true);
        assert_eq!(
            tried(memory.convert(&vm, 0x1000, 0x1000, Side::Private, |_| true).unwrap_err()),
            Some(0x1000..0x2000)
        );
        assert!(memory.is_shared(0, 0x1000) && memory.is_shared(0x2000, 0x2000));
        assert!(!memory.is_shared(0x1000, 1) && !slot.is_private.contains(1));
        memory.convert(&vm, 0x8000, 0x1000, Side::Shared, |_| true).unwrap_err();
        assert!(!memory.is_shared(0x8000, 1) && !slot.is_private.contains(8) && slot.is_private.contains(9));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_bitmap_is_a_set(changes in proptest::collection::vec((0..200_u64, 0..200_u64, any::<bool>()), 1..8)) {
            let (bitmap, mut model) = (Bitmap::new(200), [false; 200]);
            for (a, b, to) in changes {
                let (start, end) = (a.min(b), a.max(b));
                bitmap.set(start..end, to);
                model[start as usize..end as usize].fill(to);
                prop_assert_eq!(bitmap.contains_all(start..end), to || start == end);
            }
            for page in 0..200 {
                prop_assert_eq!(bitmap.contains(page), model[page as usize]);
            }
        }
    }
}
