//! Keeps numbers in the private memory of a SEV-SNP domain of 64 MiB until it is sent a byte, and looks whether they are still there;
//! then asks for more such memory, and for shared memory, and uses both. What it finds wrong is a panic.
#![no_std]
#![no_main]

use core::ops::Range;

use cofferdam_firmware::layout::{MIB, PAGE_SIZE};
use cofferdam_firmware::snp::page_state::State;
use cofferdam_payloads::hostile::checkpoint;
use cofferdam_payloads::{payload, println, snp};

payload!(main);

const HELD: Range<u64> = 16 * MIB..24 * MIB;
const MORE: Range<u64> = 32 * MIB..34 * MIB;
const SHARED: Range<u64> = 36 * MIB..38 * MIB;

fn main() -> u8 {
    assert!(snp::is_active(), "this is for SEV-SNP");
    snp::make_private(HELD);
    fill(HELD, State::Private);
    checkpoint("holds");
    check(HELD, State::Private);
    println!("the same");
    snp::make_private(MORE);
    fill(MORE, State::Private);
    snp::make_shared(SHARED);
    fill(SHARED, State::Shared);
    check(MORE, State::Private);
    check(SHARED, State::Shared);
    println!("all is right");
    0
}

fn fill(range: Range<u64>, side: State) {
    range.step_by(PAGE_SIZE as usize).for_each(|page| snp::write(page, side, !page));
}

fn check(mut range: Range<u64>, side: State) {
    let is_right = |page| snp::read(page, side) == !page;
    while range.start < range.end {
        assert!(is_right(range.start), "{:#x} is wrong", range.start);
        range.start += PAGE_SIZE;
    }
}
