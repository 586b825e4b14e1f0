//! The state of the first vCPU at the kernel's first instruction.
//!
//! | register | Linux 64-bit protocol | PVH |
//! |---|---|---|
//! | CR0 | PE, ET, NE, PG | PE, ET |
//! | CR3, CR4, EFER | page tables, PAE, LME and LMA | 0 |
//! | CS | selector 0x10, flat 64-bit code | selector 0x10, flat 32-bit code |
//! | DS, ES, FS, GS, SS | selector 0x18, flat data | the same |
//! | TR | busy 32/64-bit TSS, base 0, limit 0x67 | the same |
//! | RSI or EBX | address of `boot_params` (RSI) | address of `hvm_start_info` (EBX) |
//! | RFLAGS | interrupts off | the same |
//!
//! The page tables map the first GiB onto itself by 2 MiB pages. The protocol asks for the
//! kernel up to `init_size`, the zero page and the command line; all of them lie there,
//! as kernels that do not are refused.

use cofferdam_firmware::layout;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::Protocol;
use crate::arch::EntryState;

/// End of what the page tables at entry map.
pub(super) const IDENTITY_MAP_END: u64 = layout::GIB;

const CR0_PROTECTED_MODE: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// `__BOOT_CS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS` of the Linux boot protocol.
const DATA_SELECTOR: u16 = 0x18;

/// Segment types (Intel SDM, volume 3, 3.4.5.1 and 3.5).
const TYPE_CODE_READ_ACCESSED: u8 = 11;
const TYPE_DATA_WRITE_ACCESSED: u8 = 3;
const TYPE_TSS_BUSY: u8 = 11;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 * layout::MIB;
const ENTRIES_PER_TABLE: usize = 512;

/// Entries of the GDT: null, unused, code, data.
const GDT_ENTRIES: usize = 4;
const GDT_LIMIT: u16 = (GDT_ENTRIES * size_of::<u64>()) as u16 - 1;

/// Where and how the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    mode: Mode,
    instruction: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// 32-bit, paging off.
    Pvh,
    /// 64-bit, identity map.
    Linux64,
}

impl Entry {
    pub(super) const fn pvh(instruction: u64) -> Self {
        Self { mode: Mode::Pvh, instruction }
    }

    pub(super) const fn linux64(instruction: u64) -> Self {
        Self { mode: Mode::Linux64, instruction }
    }

    /// The protocol that was chosen; never [`Protocol::Auto`].
    pub const fn protocol(&self) -> Protocol {
        match self.mode {
            Mode::Pvh => Protocol::Pvh,
            Mode::Linux64 => Protocol::Linux64,
        }
    }

    /// Guest-physical address of the first instruction.
    pub const fn instruction(&self) -> u64 {
        self.instruction
    }

    /// The GDT for [`layout::BOOT_GDT`], with the segments of [`Self::sregs`].
    pub(super) fn gdt(&self) -> [u64; GDT_ENTRIES] {
        [
            0,
            0,
            descriptor(&self.code_segment()),
            descriptor(&flat_segment(DATA_SELECTOR, TYPE_DATA_WRITE_ACCESSED)),
        ]
    }

    fn code_segment(&self) -> kvm_segment {
        let code = flat_segment(CODE_SELECTOR, TYPE_CODE_READ_ACCESSED);
        match self.mode {
            Mode::Pvh => code,
            Mode::Linux64 => kvm_segment { l: 1, db: 0, ..code },
        }
    }
}

impl EntryState for Entry {
    fn regs(&self, _: u8) -> Option<kvm_regs> {
        let regs = kvm_regs { rip: self.instruction, rflags: RFLAGS_FIXED, ..kvm_regs::default() };
        Some(match self.mode {
            Mode::Pvh => kvm_regs { rbx: layout::PVH_START_INFO, ..regs },
            Mode::Linux64 => kvm_regs { rsi: layout::BOOT_PARAMS, ..regs },
        })
    }

    fn sregs(&self, _: u8, base: kvm_sregs) -> kvm_sregs {
        let data = flat_segment(DATA_SELECTOR, TYPE_DATA_WRITE_ACCESSED);
        let flat = kvm_sregs {
            cs: self.code_segment(),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task_segment(),
            gdt: table(layout::BOOT_GDT, GDT_LIMIT),
            // No entries: an exception before the kernel has its own table is a triple fault.
            idt: table(layout::BOOT_IDT, 0),
            ..base
        };
        match self.mode {
            Mode::Pvh => {
                kvm_sregs { cr0: CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE, cr3: 0, cr4: 0, efer: 0, ..flat }
            }
            Mode::Linux64 => kvm_sregs {
                cr0: CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE | CR0_NUMERIC_ERROR | CR0_PAGING,
                cr3: layout::BOOT_PAGE_TABLES,
                cr4: CR4_PHYSICAL_ADDRESS_EXTENSION,
                efer: EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE,
                ..flat
            },
        }
    }
}

/// PML4, PDPT and page directory for [`layout::BOOT_PAGE_TABLES`], a page each.
pub(super) fn page_tables() -> Vec<u64> {
    let mut tables = vec![0; 2 * ENTRIES_PER_TABLE];
    let nexts = (layout::BOOT_PAGE_TABLES..).step_by(layout::PAGE_SIZE as usize).skip(1);
    for (slot, next) in tables.iter_mut().step_by(ENTRIES_PER_TABLE).zip(nexts) {
        *slot = next | PAGE_PRESENT | PAGE_WRITABLE;
    }
    let pages = (0..IDENTITY_MAP_END).step_by(LARGE_PAGE_SIZE as usize);
    tables.extend(pages.map(|page| page | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE));
    tables
}

fn flat_segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: TYPE_TSS_BUSY, present: 1, ..kvm_segment::default() }
}

fn table(base: u64, limit: u16) -> kvm_dtable {
    kvm_dtable { base, limit, ..kvm_dtable::default() }
}

/// The descriptor of a segment (Intel SDM, volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let pages = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let (limit, base) = (u64::from(pages), segment.base);
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux64_state() {
        let entry = Entry::linux64(0x100_0200);
        let regs = entry.regs(0).unwrap();
        assert_eq!((regs.rip, regs.rsi, regs.rbx, regs.rflags), (0x100_0200, 0x7000, 0, 2));
        let base = kvm_sregs { apic_base: 0xfee0_0900, cr4: 0x40, ..kvm_sregs::default() };
        let sregs = entry.sregs(0, base);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0031, 0x9000, 0x20, 0x500));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector, sregs.ss.selector), (1, 0, 0x10, 0x18));
        assert_eq!(entry.gdt(), [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    }

    #[test]
    fn pvh_state() {
        let entry = Entry::pvh(0x100_0070);
        let regs = entry.regs(0).unwrap();
        assert_eq!((regs.rip, regs.rsi, regs.rbx, regs.rflags), (0x100_0070, 0, 0x6000, 2));
        let base = kvm_sregs { cr0: 0x6000_0010, cr3: 1, cr4: 0x40, efer: 1, ..kvm_sregs::default() };
        let sregs = entry.sregs(0, base);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit, sregs.cs.base), (0, 1, u32::MAX, 0));
        assert_eq!((sregs.tr.base, sregs.tr.limit, sregs.tr.type_, sregs.tr.s), (0, 0x67, 11, 0));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit, sregs.idt.limit), (0x500, 31, 0));
        assert_eq!(entry.gdt(), [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    }

    #[test]
    fn page_tables_map_the_first_gib_onto_itself() {
        let tables = page_tables();
        assert_eq!(tables.len(), 3 * 512);
        assert_eq!((tables[0], tables[512]), (0xa003, 0xb003));
        assert!(tables[1..512].iter().chain(&tables[513..1024]).all(|&entry| entry == 0));
        for (index, entry) in tables[1024..].iter().enumerate() {
            assert_eq!(*entry, (index as u64) << 21 | 0x83);
        }
    }
}
