//! The limits of what a source may have.
#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

mod support;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::thread;

use cofferdam_container::source::Source;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};

use crate::support::*;

#[test]
fn layers() {
    let layout = Layout::new();
    let layer = archive(&[entry(FILE, "a", "", b"1")]);
    let many = |count: usize| vec![(layer.clone(), layer.clone()); count];
    layout.image(&many(512), json!({}));
    let (summary, _) = layout.build().unwrap();
    assert_eq!(summary.layers.iter().map(|layer| layer.sources).sum::<usize>(), 512);
    layout.image(&many(513), json!({}));
    assert_eq!(layout.build().unwrap_err(), "the image has 513 layers; at most 512 are possible");
}

#[test]
fn indexes_in_indexes() {
    let layout = Layout::new();
    let layer = archive(&[entry(FILE, "a", "", b"1")]);
    layout.image(&[(layer.clone(), layer)], json!({}));
    let index = std::fs::read(layout.path("layout/index.json")).unwrap();
    let mut index: Value = serde_json::from_slice(&index).unwrap();
    for depth in 1..=5 {
        let digest = layout.blob(index.to_string().as_bytes());
        let media_type = "application/vnd.oci.image.index.v1+json";
        index = json!({"manifests": [{"digest": digest, "mediaType": media_type}]});
        layout.index(index["manifests"].clone());
        match depth {
            5 => assert_eq!(layout.build().unwrap_err(), "indexes name indexes more than 4 deep"),
            _ => drop(layout.build().unwrap()),
        }
    }
}

/// Why the archive of so many entries, which comes through a pipe, is refused.
fn refused(count: usize, entry: impl Fn(usize) -> Vec<u8> + Send + 'static) -> String {
    let place = tempfile::tempdir().unwrap();
    let pipe = place.path().join("pipe");
    mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    let source: Source = pipe.to_str().unwrap().parse().unwrap();
    let writer = thread::spawn(move || {
        let mut pipe = BufWriter::new(File::create(pipe).unwrap());
        // Who has refused it reads no more.
        let _ = (0..count).try_for_each(|index| pipe.write_all(&entry(index))).and_then(|()| pipe.flush());
    });
    let error = build_to(&source, &place.path().join("out"), 32 << 30).map(|_| ()).unwrap_err();
    writer.join().unwrap();
    error.strip_prefix(&format!("{}: ", place.path().join("pipe").display())).unwrap().to_owned()
}

/// Exactly how many is tested where they are counted.
#[test]
#[ignore = "takes a minute, and half a GiB"]
fn names() {
    let said = refused(1_000_000, |index| entry(FILE, &format!("folder/{index}"), "", b""));
    assert_eq!(said, "it has more than 1000000 names", "the folder is one too");
}

#[test]
#[ignore = "takes a minute"]
fn metadata() {
    const EACH: usize = 240_000;
    let value = vec![b'x'; EACH / 4];
    let said = refused((256 << 20) / EACH + 1, move |index| {
        let names = [0, 1, 2, 3].map(|number| format!("SCHILY.xattr.user.{number}"));
        let records = names.each_ref().map(|name| (name.as_str(), &value[..]));
        pax(&records, entry(FILE, &index.to_string(), "", b""))
    });
    assert_eq!(said, "its names, links and extended attributes have more than 268435456 bytes");
}
