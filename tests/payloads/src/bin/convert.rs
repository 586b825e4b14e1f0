//! Moves most of the memory of a SEV-SNP domain of 128 MiB from one side to the other and back, `rounds=N` times, and uses every page
//! on either.
#![no_std]
#![no_main]

use core::ops::Range;

use cofferdam_firmware::layout::{MIB, PAGE_SIZE};
use cofferdam_firmware::snp::page_state::State;
use cofferdam_payloads::{entry, payload, println, snp};

payload!(main);

const MOVED: Range<u64> = 16 * MIB..120 * MIB;

fn main() -> u8 {
    assert!(snp::is_active(), "this is for SEV-SNP");
    for round in 0..entry::number("rounds").unwrap_or(1) {
        snp::make_private(MOVED);
        uses(State::Private, round);
        snp::make_shared(MOVED);
        uses(State::Shared, round);
        println!("round {round}");
    }
    0
}

/// Writes to each page, and finds it there.
fn uses(side: State, round: u64) {
    let pages = || MOVED.step_by(PAGE_SIZE as usize);
    pages().for_each(|page| snp::write(page, side, page ^ round));
    assert!(pages().all(|page| snp::read(page, side) == page ^ round), "{side:?}");
}
