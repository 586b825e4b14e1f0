//! What the first stage asks of the hypervisor and the processor, in which order, and what it makes of their answers.

use core::ops::Range;

use super::ghcb::{
    BUFFER, EXIT_CODE, EXIT_INFO_1, EXIT_INFO_2, EXIT_VALID, SCRATCH, VALID_LOWER, VALID_UPPER, VERSION,
    VERSION_AND_USAGE,
};
use super::page_state::{self, LIST_MAX, Page, Pages, Size, State, Validation};
use super::{cpuid_table, msr};
use crate::layout::SNP_GHCB;
use crate::page_tables::SNP_PRIVATE;
use crate::reason::Reason;

/// The instructions that there are for it.
pub trait Machine {
    /// Gives the hypervisor a number by the GHCB MSR, and returns the number that it leaves there.
    fn ask(&mut self, request: u64) -> u64;

    /// Reads a field of the GHCB. The hypervisor may change it at any time.
    fn read_ghcb(&self, offset: u64) -> u64;

    /// Writes a field of the GHCB.
    fn write_ghcb(&mut self, offset: u64, value: u64);

    /// PVALIDATE.
    fn pvalidate(&mut self, page: Page) -> Validation;
}

/// Negotiates with the hypervisor, and shares the GHCB with it.
///
/// # Errors
/// It does not speak as it must, or the CPUID page cannot be one.
pub fn begin(machine: &mut impl Machine, cpuid: &cpuid_table::Page) -> Result<(), Reason> {
    msr::check_information(machine.ask(msr::INFORMATION))?;
    msr::check_features(machine.ask(msr::FEATURES))?;
    cpuid_table::check(cpuid, SNP_PRIVATE)?;
    msr::check_page_state(machine.ask(msr::change_page_state(SNP_GHCB, State::Shared)))?;
    msr::check_registered(SNP_GHCB, machine.ask(msr::register(SNP_GHCB)))
}

/// Makes memory private that was never validated, and validates it. [`begin`] came before.
///
/// # Errors
/// The hypervisor refuses, or does not do what it says.
pub fn accept(machine: &mut impl Machine, memory: Range<u64>) -> Result<(), Reason> {
    let mut pages = Pages(memory);
    while !pages.0.is_empty() {
        make_private(machine, pages.clone().take(LIST_MAX))?;
        for page in pages.by_ref().take(LIST_MAX) {
            validate(machine, page)?;
        }
    }
    Ok(())
}

/// Makes the GHCB's page private again, and validates it. Comes last.
///
/// # Errors
/// As of [`accept`].
pub fn finish(machine: &mut impl Machine) -> Result<(), Reason> {
    msr::check_page_state(machine.ask(msr::change_page_state(SNP_GHCB, State::Private)))?;
    validate(machine, Page { address: SNP_GHCB, size: Size::Small })
}

#[inline(never)]
fn validate(machine: &mut impl Machine, page: Page) -> Result<(), Reason> {
    page_state::validate(page, |page| machine.pvalidate(page))
}

/// Has the hypervisor make up to [`LIST_MAX`] pages private, which it may do in several steps.
fn make_private(machine: &mut impl Machine, pages: impl Iterator<Item = Page>) -> Result<(), Reason> {
    let mut count = 0;
    for page in pages {
        count += 1;
        machine.write_ghcb(BUFFER + 8 * u64::from(count), page.entry());
    }
    machine.write_ghcb(BUFFER, page_state::header(count));
    machine.write_ghcb(VERSION_AND_USAGE, VERSION);
    let mut done = 0;
    while done < count {
        machine.write_ghcb(EXIT_CODE, page_state::EXIT_CODE);
        machine.write_ghcb(EXIT_INFO_1, 0);
        machine.write_ghcb(EXIT_INFO_2, 0);
        machine.write_ghcb(SCRATCH, SNP_GHCB + BUFFER);
        machine.write_ghcb(VALID_LOWER, 0);
        machine.write_ghcb(VALID_UPPER, EXIT_VALID);
        machine.ask(SNP_GHCB);
        if machine.read_ghcb(EXIT_INFO_1) as u32 != 0 || machine.read_ghcb(EXIT_INFO_2) != 0 {
            return Err(Reason::PageState);
        }
        done = page_state::done(machine.read_ghcb(BUFFER), count, done)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::layout::{MIB, PAGE_SIZE};

    /// A hypervisor that does what it is asked, but for its lies, and the processor's table of pages.
    #[derive(Default)]
    struct Model {
        ghcb: BTreeMap<u64, u64>,
        is_ghcb_shared: bool,
        is_ghcb_registered: bool,
        private: BTreeSet<(u64, bool)>,
        validated: BTreeSet<u64>,
        asked: Vec<u64>,
        /// Changes the answer to a request.
        answer: Option<(u64, u64)>,
        /// Writes a field after each exit.
        field: Option<(u64, u64)>,
        /// Entries that are done at an exit; 0: all.
        step: u64,
        /// Says that this page is private, and leaves it where it is.
        withheld: Option<u64>,
    }

    impl Model {
        fn that_answers(request: u64, answer: u64) -> Self {
            Self { answer: Some((request, answer)), ..Self::default() }
        }

        fn ready() -> Self {
            let mut model = Self::default();
            begin(&mut model, &cpuid(51)).unwrap();
            model
        }

        fn make_private(&mut self, address: u64, large: bool) {
            if self.withheld != Some(address) {
                self.private.insert((address, large));
            }
        }

        fn change_pages(&mut self) {
            assert!(self.is_ghcb_shared && self.is_ghcb_registered, "an exit without a GHCB");
            assert_eq!(self.ghcb[&VERSION_AND_USAGE], 2 << 16);
            assert_eq!((self.ghcb[&EXIT_CODE], self.ghcb[&SCRATCH]), (0x8000_0010, SNP_GHCB + 0x800));
            assert_eq!((self.ghcb[&VALID_LOWER], self.ghcb[&VALID_UPPER]), (0, 0xF << 50));
            let header = self.ghcb[&BUFFER];
            let (first, last) = (header & 0xffff, header >> 16);
            let end = if self.step == 0 { last + 1 } else { (first + self.step).min(last + 1) };
            for index in first..end {
                let entry = self.ghcb[&(BUFFER + 8 + 8 * index)];
                assert_eq!(entry >> 52 & 0xf, 1, "private");
                self.make_private(entry & 0xf_ffff_ffff_f000, entry >> 56 != 0);
            }
            self.ghcb.insert(BUFFER, last << 16 | end);
        }
    }

    impl Machine for Model {
        fn ask(&mut self, request: u64) -> u64 {
            self.asked.push(request);
            let page = request & !0xfff & !(0xf << 52);
            let answer = match request & 0xfff {
                0 => {
                    self.change_pages();
                    0
                }
                0x002 => 0x0002_0001_3300_0001,
                0x080 => 0x308_1081,
                0x012 => {
                    self.is_ghcb_registered = true;
                    page | 0x013
                }
                0x014 => {
                    self.is_ghcb_shared = request >> 52 == 2;
                    if !self.is_ghcb_shared {
                        self.make_private(page, false);
                    }
                    0x015
                }
                _ => panic!("{request:#x}"),
            };
            if let Some((field, value)) = self.field {
                self.ghcb.insert(field, value);
            }
            self.answer.filter(|(of, _)| *of == request).map_or(answer, |(_, other)| other)
        }

        fn read_ghcb(&self, offset: u64) -> u64 {
            self.ghcb[&offset]
        }

        fn write_ghcb(&mut self, offset: u64, value: u64) {
            assert!(self.is_ghcb_shared && self.is_ghcb_registered, "written before it is shared");
            self.ghcb.insert(offset, value);
        }

        fn pvalidate(&mut self, page: Page) -> Validation {
            let is_private = self.private.contains(&(page.address, page.size == Size::Large));
            let unchanged = is_private && !self.validated.insert(page.address);
            Validation { code: u32::from(!is_private), unchanged }
        }
    }

    /// A CPUID page whose one function says that this bit makes pages private.
    fn cpuid(bit: u32) -> cpuid_table::Page {
        let mut page = [0; PAGE_SIZE as usize];
        let words = [(0, 1), (16, 0x8000_001F), (16 + 24, 2), (16 + 28, bit)];
        for (offset, word) in words {
            page[offset..offset + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        page
    }

    /// Four lists, with pages of both sizes.
    const MEMORY: Range<u64> = 4 * MIB - 511 * PAGE_SIZE..8 * MIB + 300 * PAGE_SIZE;

    #[test]
    fn every_page_is_private_before_it_is_validated_once_and_the_ghcb_is_the_last() {
        for step in [0, 1, 100] {
            let mut model = Model { step, ..Model::ready() };
            accept(&mut model, MEMORY).unwrap();
            let pages: BTreeSet<u64> = Pages(MEMORY).map(|page| page.address).collect();
            assert_eq!(pages.len(), 813);
            assert_eq!(model.validated, pages);
            assert!(model.is_ghcb_shared);
            finish(&mut model).unwrap();
            assert!(!model.is_ghcb_shared && model.validated.contains(&SNP_GHCB));
        }
    }

    #[test]
    fn whoever_does_not_speak_as_it_must_is_asked_nothing_more() {
        let share = SNP_GHCB | 2 << 52 | 0x014;
        for (number, (request, answer, reason)) in [
            (msr::INFORMATION, 0x0001_0001_3300_0001, Reason::GhcbProtocol),
            (msr::FEATURES, 0x308_0081, Reason::GhcbProtocol),
            (share, 1 << 32 | 0x015, Reason::PageState),
            (SNP_GHCB | 0x012, u64::MAX << 12 | 0x013, Reason::GhcbPage),
        ]
        .into_iter()
        .enumerate()
        {
            let mut model = Model::that_answers(request, answer);
            assert_eq!(begin(&mut model, &cpuid(51)), Err(reason), "{request:#x}");
            assert_eq!(model.asked.len(), number + 1);
            assert!(model.ghcb.is_empty());
        }
    }

    #[test]
    fn nothing_is_shared_by_another_bit_than_the_image_s() {
        for (page, reason) in [(cpuid(47), Reason::PrivateBit), ([0; 4096], Reason::CpuidTable)] {
            let mut model = Model::default();
            assert_eq!(begin(&mut model, &page), Err(reason));
            assert!(!model.is_ghcb_shared);
        }
    }

    #[test]
    fn a_refusal_or_a_list_that_does_not_go_on_ends_the_domain() {
        let none_done = 252 << 16;
        for field in [(EXIT_INFO_1, 2), (EXIT_INFO_2, 1), (EXIT_INFO_2, 1 << 63), (BUFFER, none_done)] {
            let mut model = Model { field: Some(field), ..Model::ready() };
            assert_eq!(accept(&mut model, MEMORY), Err(Reason::PageState), "{field:x?}");
            assert!(model.validated.is_empty());
        }
    }

    #[test]
    fn a_page_that_is_not_given_or_was_there_before_ends_the_domain() {
        let last = MEMORY.end - PAGE_SIZE;
        for page in [MEMORY.start, 4 * MIB, last] {
            let mut model = Model { withheld: Some(page), ..Model::ready() };
            assert_eq!(accept(&mut model, MEMORY), Err(Reason::PageInvalid), "{page:#x}");
            let mut model = Model::ready();
            model.validated.insert(page);
            assert_eq!(accept(&mut model, MEMORY), Err(Reason::PageValid), "{page:#x}");
        }
    }

    #[test]
    fn the_kernel_is_not_entered_with_a_ghcb_that_the_host_sees() {
        let give_back = SNP_GHCB | 1 << 52 | 0x014;
        let mut refusing = Model { answer: Some((give_back, 0x014)), ..Model::ready() };
        assert_eq!(finish(&mut refusing), Err(Reason::PageState));
        let mut withholding = Model { withheld: Some(SNP_GHCB), ..Model::ready() };
        assert_eq!(finish(&mut withholding), Err(Reason::PageInvalid));
        let mut doubling = Model::ready();
        doubling.validated.insert(SNP_GHCB);
        assert_eq!(finish(&mut doubling), Err(Reason::PageValid));
    }
}
