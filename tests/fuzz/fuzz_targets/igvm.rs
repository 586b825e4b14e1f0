//! IGVM files: the reader, the walk for each platform, and the writer with what was read.
//!
//! Holds: a file is refused in words, or its memory is bounded by its size, no two pages of a platform overlap, each
//! content lies in the file, and what a walk over all platforms gives can be written and read again.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use cofferdam_confidential::igvm::reader::Igvm;
use cofferdam_confidential::igvm::writer::{WriteError, Writer};
use cofferdam_confidential::image::importer::{Importer, Item, PlatformInfo};
use cofferdam_confidential::image::walk::{Selection, walk};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// Bytes as they are.
    Raw(&'a [u8]),
    /// Variable headers and file data, with a fixed header that fits them.
    Headers { first_version: bool, aarch64: bool, headers: &'a [u8], data: &'a [u8] },
    /// Headers with lengths that their types have, of platforms and then of other things.
    Built { first_version: bool, platforms: Vec<Platform>, headers: Vec<Header<'a>>, pages: u8 },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Platform {
    bit: u8,
    kind: u8,
    vtl: bool,
}

/// A guest-physical address.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Gpa {
    Page(u8),
    Any(u64),
}

/// Where content lies.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Offset {
    None,
    Page(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Header<'a> {
    Policy { mask: u8, policy: u64 },
    Page { gpa: Gpa, mask: u8, offset: Offset, flags: u8, kind: u8 },
    Large { gpa: u8, mask: u8, offset: Offset, flags: u8 },
    Area { length: Gpa, index: u8, offset: Offset },
    Insert { gpa: Gpa, mask: u8, index: u8 },
    Parameter { kind: u8, index: u8, offset: u16 },
    Context { gpa: Gpa, mask: u8, offset: Offset, index: u8 },
    Memory { gpa: Gpa, mask: u8, length: u32 },
    Corim { signature: bool, mask: u8, offset: Offset, length: u16 },
    Any { header_type: u16, optional: bool, content: &'a [u8] },
}

const FIXED: usize = 32;
/// Where the data of a built file begin.
const DATA: u32 = 0x8000;

impl Gpa {
    fn value(self) -> u64 {
        match self {
            Self::Page(page) => u64::from(page) << 12,
            Self::Any(value) => value,
        }
    }
}

impl Offset {
    fn value(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Page(page) => DATA + (u32::from(page) << 12),
            Self::Any(value) => value,
        }
    }
}

impl Header<'_> {
    fn bytes(&self) -> (u32, Vec<u8>) {
        let mut content = Vec::new();
        let mut put = |bytes: &[u8]| content.extend_from_slice(bytes);
        let header_type = match *self {
            Self::Policy { mask, policy } => {
                put(&policy.to_le_bytes());
                put(&u64::from(mask).to_le_bytes());
                0x101
            }
            Self::Page { gpa, mask, offset, flags, kind } => {
                put(&gpa.value().to_le_bytes());
                put(&words([mask.into(), offset.value(), flags.into(), u32::from(kind)]));
                0x302
            }
            Self::Large { gpa, mask, offset, flags } => {
                put(&(u64::from(gpa) << 21).to_le_bytes());
                put(&words([mask.into(), offset.value(), u32::from(flags) & 6 | 1, 0]));
                0x302
            }
            Self::Area { length, index, offset } => {
                put(&length.value().to_le_bytes());
                put(&words([index.into(), offset.value()]));
                0x301
            }
            Self::Insert { gpa, mask, index } => {
                put(&gpa.value().to_le_bytes());
                put(&words([mask.into(), index.into()]));
                0x303
            }
            Self::Parameter { kind, index, offset } => {
                put(&words([index.into(), offset.into()]));
                const KINDS: [u32; 10] =
                    [0x307, 0x308, 0x309, 0x30a, 0x30c, 0x30e, 0x30f, 0x310, 0x312, 0x313];
                KINDS[usize::from(kind) % KINDS.len()]
            }
            Self::Context { gpa, mask, offset, index } => {
                put(&gpa.value().to_le_bytes());
                put(&words([mask.into(), offset.value(), index.into()]));
                0x304
            }
            Self::Memory { gpa, mask, length } => {
                put(&gpa.value().to_le_bytes());
                put(&words([mask.into(), length, 0, 0]));
                0x305
            }
            Self::Corim { signature, mask, offset, length } => {
                put(&words([mask.into(), offset.value(), length.into(), 0]));
                0x104 + u32::from(signature)
            }
            Self::Any { header_type, optional, content } => {
                put(content);
                u32::from(header_type) | u32::from(optional) << 31
            }
        };
        (header_type, content)
    }
}

/// 32-bit fields.
fn words<const N: usize>(fields: [u32; N]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn append(section: &mut Vec<u8>, header_type: u32, content: &[u8]) {
    section.extend(header_type.to_le_bytes());
    section.extend((content.len() as u32).to_le_bytes());
    section.extend(content);
    section.resize(section.len().next_multiple_of(8), 0);
}

/// A file with a good fixed header.
fn file(first_version: bool, aarch64: bool, headers: &[u8], data: &[u8], data_start: usize) -> Vec<u8> {
    let total = data_start.max(FIXED + headers.len()) + data.len();
    let version = if first_version { 1_u32 } else { 2 };
    let mut fixed = b"IGVM".to_vec();
    for field in [version, FIXED as u32, headers.len() as u32, total as u32, 0, u32::from(aarch64), 4096] {
        fixed.extend(field.to_le_bytes());
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&fixed[..if first_version { 24 } else { FIXED }]);
    hasher.update(headers);
    fixed[20..24].copy_from_slice(&hasher.finalize().to_le_bytes());
    fixed.extend(headers);
    fixed.resize(total - data.len(), 0);
    fixed.extend(data);
    fixed
}

/// Checks what a walk gives, and writes it down.
struct Sink<'a> {
    file: &'a [u8],
    pages: u64,
    /// Platform's bit, first address → end.
    ranges: BTreeMap<(u32, u64), u64>,
    written: u64,
    writer: Writer<'a>,
}

impl<'a> Sink<'a> {
    fn new(file: &'a [u8]) -> Self {
        Self { file, pages: 0, ranges: BTreeMap::new(), written: 0, writer: Writer::default() }
    }

    fn range(&mut self, mask: u32, gpa: u64, length: u64, bytes: &[u8]) {
        assert!(bytes.len() as u64 <= length && length > 0);
        let inside = bytes.is_empty() || {
            let (all, part) = (self.file.as_ptr_range(), bytes.as_ptr_range());
            all.start <= part.start && part.end <= all.end
        };
        assert!(inside);
        self.pages += length / 4096;
        let end = gpa.checked_add(length).unwrap();
        for bit in (0..32).map(|bit| mask & 1 << bit).filter(|bit| *bit != 0) {
            let before = self.ranges.range((bit, 0)..(bit, end)).next_back();
            assert!(before.is_none_or(|before| *before.1 <= gpa));
            self.ranges.insert((bit, gpa), end);
        }
    }
}

impl<'a> Importer<'a> for Sink<'a> {
    type Error = WriteError;

    fn platform(&mut self, platform: &PlatformInfo) -> Result<(), WriteError> {
        self.writer.platform(platform)
    }

    fn import(&mut self, mask: u32, item: &Item<'a>) -> Result<(), WriteError> {
        assert_ne!(mask, 0);
        match item {
            Item::Pages(run) => self.range(mask, run.gpa, run.length(), run.content.bytes),
            Item::Parameters(area) => {
                assert!(area.values.iter().all(|value| u64::from(value.offset) < area.length()));
                self.range(mask, area.gpa, area.length(), area.initial.bytes);
            }
            _ => {}
        }
        self.written += 1;
        self.writer.import(mask, item)
    }
}

fn check(file: &[u8]) {
    let image = match Igvm::new(file) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let limit = (16 << 20) + 256 * file.len() as u64;
    for info in image.platforms() {
        let mut sink = Sink::new(file);
        let result = walk(&image, Selection::One(info.platform), &mut sink);
        assert!(sink.pages * 4096 <= limit && sink.written <= file.len() as u64 / 8);
        assert!(result.is_ok() || !result.unwrap_err().to_string().is_empty());
    }
    let mut sink = Sink::new(file);
    if walk(&image, Selection::All, &mut sink).is_err() {
        return;
    }
    let (pages, items) = (sink.pages, sink.written);
    let mut written = Vec::new();
    sink.writer.write(&mut written).unwrap();
    let read = Igvm::new(&written).unwrap();
    let mut again = Sink::new(&written);
    walk(&read, Selection::All, &mut again).unwrap();
    // Neighbours may have come to lie together, and be one run now.
    assert!(again.pages == pages && again.written <= items);
}

fuzz_target!(|input: Input| {
    match input {
        Input::Raw(bytes) => check(bytes),
        Input::Headers { first_version, aarch64, headers, data } => {
            check(&file(first_version, aarch64, headers, data, 0));
        }
        Input::Built { first_version, platforms, headers, pages } => {
            let mut section = Vec::new();
            for platform in platforms.iter().take(8) {
                let mut content = (1_u32 << (platform.bit % 8)).to_le_bytes().to_vec();
                content.extend([if platform.vtl { 2 } else { 0 }, platform.kind % 7, 1, 0]);
                content.extend([0; 8]);
                append(&mut section, 1, &content);
            }
            let aarch64 = platforms.first().is_some_and(|platform| platform.kind % 7 == 6);
            for header in headers.iter().take(256) {
                let (header_type, content) = header.bytes();
                append(&mut section, header_type, &content[..content.len().min(64)]);
            }
            let data: Vec<u8> = (0..pages % 8).flat_map(|page| [page; 4096]).collect();
            check(&file(first_version, aarch64, &section, &data, DATA as usize));
        }
    }
});
