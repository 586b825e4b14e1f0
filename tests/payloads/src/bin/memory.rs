//! Writes to a page in every `step=N` MiB of RAM, and to its last one, each page its own address, then checks them all.
//! The command line says by `mib=N` how much RAM there is; without a step it is every page. Prints "PAGES pages"; exits
//! with 0, or with 1 if one of them has changed.
#![no_std]
#![no_main]

use cofferdam_firmware::layout::{GAP_END, GIB, MIB, PAGE_SIZE, ram_ranges};
use cofferdam_payloads::{entry, paging, payload, println, ram};

payload!(main);

fn main() -> u8 {
    let size = entry::number("mib").unwrap_or(32) * MIB;
    let step = entry::number("step").map_or(PAGE_SIZE, |mib| mib * MIB);
    for start in (GAP_END..GAP_END + ram_ranges(size)[1].1).step_by(GIB as usize) {
        paging::map_gib(start, ram::START + (start - GAP_END) / GIB * PAGE_SIZE);
    }
    pages(size, step).for_each(|page| paging::write(page, page));
    println!("{} pages", pages(size, step).count());
    u8::from(!pages(size, step).all(|page| paging::read(page) == page))
}

/// Addresses of the pages: of both ranges those at the same offsets, so that ranges which share memory are found out.
fn pages(size: u64, step: u64) -> impl Iterator<Item = u64> {
    ram_ranges(size).into_iter().filter(|(_, length)| *length != 0).flat_map(move |(start, length)| {
        let end = start + length;
        (start + ram::END..end - PAGE_SIZE).step_by(step as usize).chain([end - PAGE_SIZE])
    })
}
