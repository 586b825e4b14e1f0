//! Certificate tables, which a guest gets with its attestation reports (`--snp-certs`).
//!
//! Holds: a table is refused in words, or each of its entries names bytes of the file that follow the table, by rules that are written
//! here a second time; and it is refused for nothing else.
#![no_main]

use arbitrary::Arbitrary;
use cofferdam_confidential::snp::certificates::{MAX_SIZE, check};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Raw(&'a [u8]),
    Table { entries: Vec<Entry>, ends: bool, content: u32 },
}

#[derive(Arbitrary, Debug)]
struct Entry {
    guid: [u8; 16],
    /// From the end of the table, or else from the start of the file.
    behind_table: bool,
    offset: u32,
    length: u32,
}

fn written(entries: &[Entry], ends: bool, content: u32) -> Vec<u8> {
    let table = (entries.len() + usize::from(ends)) * 24;
    let mut bytes = Vec::new();
    for Entry { guid, behind_table, offset, length } in entries {
        let start = if *behind_table { table as u32 } else { 0 };
        bytes.extend(guid);
        bytes.extend(start.wrapping_add(*offset).to_le_bytes());
        bytes.extend(length.to_le_bytes());
    }
    bytes.resize(table, 0);
    bytes.resize(table + content as usize % (MAX_SIZE + 2), 0xCC);
    bytes
}

/// Whether all is as it should be.
fn is_table(bytes: &[u8]) -> bool {
    if bytes.len() > MAX_SIZE {
        return false;
    }
    let mut at = 0;
    let mut named = Vec::new();
    loop {
        let Some(entry) = bytes.get(at..at + 24) else { return false };
        at += 24;
        if entry == [0; 24] {
            break;
        }
        let number = |from: usize| u32::from_le_bytes(entry[from..from + 4].try_into().unwrap()) as usize;
        named.push((number(16), number(20)));
    }
    let is_inside =
        |&(offset, length): &(usize, usize)| length > 0 && offset >= at && offset + length <= bytes.len();
    !named.is_empty() && named.iter().all(is_inside)
}

fuzz_target!(|input: Input| {
    let table;
    let bytes = match &input {
        Input::Raw(bytes) => bytes,
        Input::Table { entries, ends, content } => {
            table = written(entries, *ends, *content);
            table.as_slice()
        }
    };
    let checked = check(bytes);
    assert_eq!(checked.is_ok(), is_table(bytes), "{checked:?}");
    if let Err(error) = checked {
        assert!(!error.to_string().is_empty());
    }
});
