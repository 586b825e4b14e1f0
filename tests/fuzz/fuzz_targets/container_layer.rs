//! Layers of container images, as tar archives say them.
//!
//! Holds: what is accepted can be put on top of a lower layer and becomes an image of the announced size, and no name
//! in it leads anywhere else.
#![no_main]

use std::path::Path;

use arbitrary::Arbitrary;
use cofferdam_container::archive::read_layer;
use cofferdam_container::budget::Budget;
use cofferdam_container::erofs::Image;
use cofferdam_container::files::{Entry, entries};
use cofferdam_container::layer::{Reading, Warnings};
use cofferdam_container::spool::Spool;
use cofferdam_container::tree::{Folder, Node};
use cofferdam_container::verity::VerityWriter;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

const NAMES: [&str; 15] = [
    "a",
    "a/b",
    "a/b/c",
    "a/",
    "./a",
    "../a",
    ".wh.a",
    "a/.wh.b",
    "a/.wh..wh..opq",
    ".wh..wh..opq",
    "/",
    "",
    "blobs/sha256/a",
    "manifest.json",
    "index.json",
];
const RECORDS: [&str; 8] = [
    "path",
    "linkpath",
    "size",
    "SCHILY.xattr.user.a",
    "SCHILY.xattr.trusted.overlay.opaque",
    "GNU.sparse.map",
    "GNU.sparse.size",
    "GNU.sparse.major",
];

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Raw(&'a [u8]),
    Entry { kind: u8, name: Name<'a>, target: Name<'a>, content: &'a [u8], size: Option<u16> },
    Records(Vec<(u8, &'a str)>),
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Usual(u8),
    Any(&'a [u8]),
}

impl Name<'_> {
    fn get(&self) -> &[u8] {
        match self {
            Self::Usual(index) => NAMES[usize::from(*index) % NAMES.len()].as_bytes(),
            Self::Any(name) => &name[..name.len().min(99)],
        }
    }
}

fn entry(kind: u8, name: &[u8], target: &[u8], content: &[u8], size: usize) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..name.len()].copy_from_slice(name);
    bytes[100..107].copy_from_slice(b"0000644");
    bytes[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    bytes[148..156].fill(b' ');
    bytes[156] = kind;
    bytes[157..157 + target.len()].copy_from_slice(target);
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

impl Piece<'_> {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Raw(bytes) => bytes.to_vec(),
            Self::Entry { kind, name, target, content, size } => {
                let kind = b"01234567SgLKV"[usize::from(*kind) % 13];
                entry(kind, name.get(), target.get(), content, size.map_or(content.len(), usize::from))
            }
            Self::Records(records) => {
                let mut text = Vec::new();
                for (name, value) in records {
                    let name = RECORDS[usize::from(*name) % RECORDS.len()];
                    let rest = name.len() + value.len() + 3;
                    let length = (1..).find(|length: &usize| *length == rest + length.to_string().len());
                    text.extend(format!("{} {name}={value}\n", length.unwrap_or(0)).bytes());
                }
                entry(b'x', b"pax", b"", &text, text.len())
            }
        }
    }
}

fn check(folder: &Folder) {
    for (name, node) in &folder.children {
        assert!(!name.is_empty() && name != b"." && name != b".." && name.len() <= 255);
        assert!(!name.contains(&b'/') && !name.contains(&0));
        if let Node::Folder(folder) = node {
            check(folder);
        }
    }
}

fuzz_target!(|layers: [Vec<Piece<'_>>; 2]| {
    let mut spool = Spool::create(Path::new("/dev/shm")).unwrap();
    let budget = Budget::new(1 << 20);
    let mut warnings = Warnings::default();
    let mut base = Folder::default();
    for pieces in layers {
        let bytes: Vec<u8> = pieces.iter().flat_map(Piece::encode).collect();
        if let Ok(Some(entries)) = entries(&bytes[..], &Budget::new(1 << 20)) {
            for entry in entries.values() {
                let Entry::File(at, size) = entry else { continue };
                assert!(
                    at + size <= bytes.len() as u64,
                    "the content of a saved image's file is in the archive"
                );
            }
        }
        let mut reading = Reading::new(&base, true, &budget, &mut warnings);
        if read_layer(&bytes[..], &mut reading, &mut spool).is_err() {
            return;
        }
        let tree = reading.finish();
        base.put_on_top(&tree);
        check(&base);
        for tree in [&tree, &base] {
            // Attributes may be too long for the format.
            let Ok(image) = Image::new(tree) else { continue };
            let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap().into();
            let mut out = VerityWriter::new(&file, image.blocks());
            image.write(&spool, &mut out).unwrap();
            assert_eq!(out.finish().unwrap().size, image.blocks() * 4096);
        }
    }
});
