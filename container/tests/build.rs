//! Images from sources, and sources that are refused.
#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;

use cofferdam_container::build::{Options, build, make_ready};
use cofferdam_container::digest::Digest;
use cofferdam_container::image::{self, Image};
use cofferdam_container::source::Source;
use serde_json::{Value, json};

use crate::support::*;

/// Why an archive of these entries is refused.
fn refused(entries: &[Vec<u8>]) -> String {
    let layout = Layout::new();
    let plain = archive(entries);
    layout.image(&[(plain.clone(), plain)], json!({}));
    let error = layout.build().unwrap_err();
    assert!(!layout.path("out/manifest.json").exists());
    error.split_once(": ").unwrap().1.to_owned()
}

#[test]
fn a_layout_with_layers_packed_in_three_ways() {
    let layout = Layout::new();
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let lower = archive(&[
        entry(FOLDER, "etc/", "", b""),
        entry(FILE, "etc/passwd", "", b"root:x:0:0:::\nweb:x:33:34::/srv:\n"),
        entry(FILE, "etc/group", "", b"web:x:34:\nlog:x:7:web\n"),
        pax(&[("SCHILY.xattr.security.capability", &capability)], entry(FILE, "ping", "", b"ping")),
        entry(SYMLINK, "out", "../../../etc/shadow", b""),
        entry(FILE, "gone", "", b"1"),
        entry(FILE, "dir/old", "", b"2"),
    ]);
    let middle = archive(&[
        entry(FILE, "dir/.wh..wh..opq", "", b""),
        entry(FILE, "./dir/new", "", b"3"),
        entry(HARD_LINK, "dir/linked", "dir/new", b""),
        entry(FILE, ".wh.gone", "", b""),
        entry(DEVICE, "null", "", b""),
    ]);
    let upper = archive(&[entry(FILE, "/etc/motd", "", &vec![b'x'; 100_000])]);
    let config = json!({
        "Env": ["A=b"], "Entrypoint": ["/ping"], "Cmd": ["-c", "1"], "WorkingDir": "/etc/", "User": "web",
        "StopSignal": "SIGQUIT",
    });
    let layers = [
        (pack("gzip", &lower), lower.clone()),
        (pack("zstd", &middle), middle.clone()),
        (upper.clone(), upper.clone()),
    ];
    layout.image(&layers, config);
    let (summary, manifest) = layout.build().unwrap();
    assert_eq!(summary.layers.len(), 3);
    assert_eq!(summary.warnings.shown, [r#""null": device node: left out"#]);
    let process = &manifest.process;
    assert_eq!(process.args, ["/ping", "/bin/true"], "what is given replaces the image's command");
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(process.env, [path, "A=b", "HOME=/srv"]);
    assert_eq!((process.cwd.as_str(), process.uid, process.gid), ("/etc", 33, 34));
    assert_eq!(process.groups, [7]);
    let host = serde_json::to_value(&manifest.host).unwrap();
    let expected = json!({
        "exec": [], "signals": ["INT", "TERM"], "stderr": true, "stdin": false, "stdout": true,
        "stop": {"signal": "QUIT", "timeout_ms": 10_000},
    });
    assert_eq!(host, expected);

    let output = layout.path("out");
    for (index, layer) in manifest.layers.iter().enumerate() {
        extract(&output, &layer.root_hash.to_string(), &layout.path(&index.to_string()));
    }
    let at = |name: &str| layout.path(name);
    assert_eq!(fs::read(at("0/dir/old")).unwrap(), b"2");
    assert_eq!(fs::read_link(at("0/out")).unwrap(), Path::new("../../../etc/shadow"));
    assert_eq!(fs::read(at("1/dir/linked")).unwrap(), b"3");
    assert!(fs::symlink_metadata(at("1/gone")).unwrap().file_type().is_char_device());
    assert!(!at("1/null").exists());
    assert_eq!(fs::read(at("2/etc/motd")).unwrap().len(), 100_000);

    // Once more: the same, from the store.
    let (again, same) = layout.build().unwrap();
    assert_eq!((again.digest, same), (summary.digest, manifest));
    assert!(
        again.layers.iter().all(|layer| layer.reused) && summary.layers.iter().all(|layer| !layer.reused)
    );
}

#[test]
fn more_layers_than_devices_are_merged() {
    let layout = Layout::new();
    let mut layers: Vec<_> = (0..40)
        .map(|at| {
            archive(&[
                entry(FILE, &format!("{at}"), "", b""),
                entry(FILE, "same", "", format!("{at}").as_bytes()),
            ])
        })
        .collect();
    layers.push(archive(&[entry(FILE, ".wh.35", "", b""), entry(FILE, ".wh.3", "", b"")]));
    layout.image(&plain(&layers), json!({}));
    let (summary, manifest) = layout.build().unwrap();
    let sources: Vec<usize> = summary.layers.iter().map(|layer| layer.sources).collect();
    assert_eq!((sources.len(), sources[30], sources[31]), (32, 1, 10));
    let output = layout.path("out");
    let top = manifest.layers[31].root_hash.to_string();
    extract(&output, &top, &layout.path("top"));
    assert_eq!(fs::read(layout.path("top/same")).unwrap(), b"39");
    assert!(layout.path("top/34").is_file());
    for hidden in ["3", "35"] {
        let metadata = fs::symlink_metadata(layout.path("top").join(hidden)).unwrap();
        assert!(metadata.file_type().is_char_device(), "{hidden}");
    }
}

/// Layers that are not packed.
fn plain(layers: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    layers.iter().map(|layer| (layer.clone(), layer.clone())).collect()
}

#[test]
fn names_that_are_refused() {
    let file = |name: &str| entry(FILE, name, "", b"");
    let link = |name: &str, target: &str| entry(HARD_LINK, name, target, b"");
    assert_eq!(refused(&[file("../a")]), r#""../a": it leaves the tree"#);
    assert_eq!(refused(&[file("a/../../b")]), r#""a/../../b": it leaves the tree"#);
    assert_eq!(refused(&[entry(FOLDER, "..", "", b"")]), r#""..": it leaves the tree"#);
    assert_eq!(refused(&[file("./.")]), r#""./.": the root is a folder"#);
    assert_eq!(refused(&[link("a", "../b")]), r#""a": its target "../b" leaves the tree"#);
    assert_eq!(
        refused(&[link("a", "/etc/passwd")]),
        r#""a": its target "/etc/passwd" is not in the same layer before it"#
    );
    assert_eq!(refused(&[entry(FOLDER, "d", "", b""), link("a", "d")]), r#""a": its target "d" is a folder"#);
    let through = [entry(SYMLINK, "l", "/etc", b""), file("l/a")];
    assert_eq!(refused(&through), r#""l/a": "l" is not a folder, and links are not followed"#);
    let linked_through = [entry(SYMLINK, "l", "/etc", b""), link("a", "l/passwd")];
    assert_eq!(refused(&linked_through), r#""a": its target "l/passwd" is not in the same layer before it"#);
    assert_eq!(
        refused(&[file("f"), file("f/a")]),
        r#""f/a": "f" is not a folder, and links are not followed"#
    );
    assert_eq!(refused(&[file(".wh.")]), r#"".wh.": it is a whiteout of no name"#);
    assert_eq!(refused(&[file("a/.wh...")]), r#""a/.wh...": it is a whiteout of no name"#);
    assert_eq!(
        refused(&[entry(SYMLINK, "l", "", b"")]),
        r#""l": it is a symbolic link with a target of 0 bytes"#
    );
    assert_eq!(refused(&[entry(b'V', "v", "", b"")]), r#""v": it is of the unknown kind 'V'"#);
    let long = "a".repeat(256);
    let path = [("path", long.as_bytes())];
    assert!(refused(&[pax(&path, file("a"))]).ends_with("a part of it is longer than 255 bytes"));
    let deep = "a/".repeat(300);
    let path = [("path", deep.as_bytes())];
    assert!(refused(&[pax(&path, file("a"))]).ends_with("it lies in more than 256 folders"));
    let owner = [("uid", b"4294967296".as_slice())];
    assert_eq!(refused(&[pax(&owner, file("a"))]), r#""a": its owner 4294967296 is more than 32 bits"#);
}

#[test]
fn a_link_of_a_lower_layer_is_not_followed() {
    let layout = Layout::new();
    let lower = archive(&[entry(SYMLINK, "lib", "/etc", b"")]);
    let upper = archive(&[entry(FILE, "lib/a", "", b"")]);
    layout.image(&plain(&[lower, upper]), json!({}));
    assert!(
        layout
            .build()
            .unwrap_err()
            .ends_with(r#""lib/a": "lib" is not a folder, and links are not followed"#)
    );
}

#[test]
fn foreign_attributes_are_left_out() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("root.tar");
    let redirect =
        [("SCHILY.xattr.trusted.overlay.redirect", b"/".as_slice()), ("SCHILY.xattr.other.a", b"b")];
    fs::write(&path, archive(&[pax(&redirect, entry(FILE, "a", "", b""))])).unwrap();
    let source = path.to_str().unwrap().parse().unwrap();
    let (summary, _) = build_to(&source, &place.path().join("out"), 1 << 20).unwrap();
    let mut shown = summary.warnings.shown;
    shown.sort();
    assert_eq!(
        shown,
        [
            r#""a": extended attribute "other.a": left out"#,
            r#""a": extended attribute "trusted.overlay.redirect": left out"#,
        ]
    );
}

#[test]
fn what_does_not_match_its_digest() {
    let plain = archive(&[entry(FILE, "a", "", b"1")]);
    let other = archive(&[entry(FILE, "a", "", b"2")]);
    // The configuration says something else than is packed.
    let layout = Layout::new();
    layout.image(&[(pack("gzip", &plain), other.clone())], json!({}));
    assert!(layout.build().unwrap_err().contains("unpacked it does not match its digest"));
    // The layer was changed.
    let layout = Layout::new();
    layout.image(&[(plain.clone(), plain.clone())], json!({}));
    let name = layout.path("layout/blobs/sha256").join(Digest::of(&plain).hex());
    fs::write(&name, &other).unwrap();
    assert!(layout.build().unwrap_err().contains(": it does not match its digest: it is sha256:"));
    // It is a link to somewhere else.
    fs::remove_file(&name).unwrap();
    symlink("/etc/passwd", &name).unwrap();
    assert!(layout.build().unwrap_err().starts_with("cannot read "));
    // The manifest was changed.
    let layout = Layout::new();
    layout.image(&[(plain.clone(), plain.clone())], json!({}));
    for blob in fs::read_dir(layout.path("layout/blobs/sha256")).unwrap() {
        let mut bytes = fs::read(blob.as_ref().unwrap().path()).unwrap();
        bytes.push(b' ');
        fs::write(blob.unwrap().path(), bytes).unwrap();
    }
    assert!(layout.build().unwrap_err().starts_with("blob sha256:"));
    // A digest that would be a path.
    layout.index(json!([{"digest": "sha256:../../../../etc/passwd"}]));
    assert!(layout.build().unwrap_err().starts_with("index.json: "));
}

#[test]
fn bombs_and_broken_archives() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("root.tar");
    let build = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let source = path.to_str().unwrap().parse().unwrap();
        build_to(&source, &place.path().join("out"), 1 << 20).map(|_| ()).unwrap_err()
    };
    let limit = "it has more than 1048576 bytes when unpacked, which is the limit (--max-unpacked)";
    let big = archive(&[entry(FILE, "a", "", &vec![0; 1 << 20])]);
    assert!(build(&pack("gzip", &big)).ends_with(limit));
    assert!(build(&pack("zstd", &big)).ends_with(limit));
    // What follows the archive counts too.
    assert!(build(&pack("gzip", &[archive(&[]), vec![0; 2 << 20]].concat())).ends_with(limit));
    // A hole costs what it seems to be.
    let records = [
        ("GNU.sparse.major", b"1".as_slice()),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"hole"),
        ("GNU.sparse.realsize", b"1099511627776"),
    ];
    let mut map = b"0\n".to_vec();
    map.resize(512, 0);
    assert!(build(&archive(&[pax(&records, entry(FILE, "a", "", &map))])).ends_with(limit));
    let good = archive(&[entry(FILE, "a", "", b"content")]);
    assert!(build(&good[..515]).contains("ends in the middle"));
    assert!(build(&good[..100]).contains("ends in the middle"));
    let packed = pack("gzip", &good);
    assert!(!build(&packed[..packed.len() - 9]).is_empty());
    let mut changed = good;
    changed[0] = b'b';
    assert!(build(&changed).contains("the archive is broken"));
}

#[test]
fn which_image_is_meant() {
    let layout = Layout::new();
    let plain = archive(&[entry(FILE, "a", "", b"1")]);
    layout.image(&[(plain.clone(), plain.clone())], json!({}));
    let index: Value = serde_json::from_slice(&fs::read(layout.path("layout/index.json")).unwrap()).unwrap();
    let digest = &index["manifests"][0]["digest"];
    let other = Digest::of(b"other").to_string();
    let tagged = |tag: &str, digest: &Value| json!({"digest": digest, "annotations": {"org.opencontainers.image.ref.name": tag}});
    layout.index(json!([tagged("one", digest), tagged("two", &other.clone().into())]));
    assert_eq!(
        layout.build().unwrap_err(),
        "there are several images; choose one with oci:DIR:TAG or docker-archive:FILE:NAME: one, two"
    );
    let source: Source = format!("oci:{}:one", layout.path("layout").display()).parse().unwrap();
    build_to(&source, &layout.path("one"), 1 << 20).unwrap();
    let source: Source = format!("oci:{}:three", layout.path("layout").display()).parse().unwrap();
    let error = build_to(&source, &layout.path("three"), 1 << 20).map(|_| ()).unwrap_err();
    assert_eq!(error, "there is no image three for amd64 and linux; there are: one, two");
    // An index for several machines.
    let nested = json!({"manifests": [
        {"digest": other, "platform": {"architecture": "arm64", "os": "linux"}},
        {"digest": digest, "platform": {"architecture": "amd64", "os": "linux"}},
    ]});
    let nested = layout.blob(nested.to_string().as_bytes());
    layout.index(json!([{"digest": nested, "mediaType": "application/vnd.oci.image.index.v1+json"}]));
    layout.build().unwrap();
    // Layers and their digests.
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": []}});
    layout.manifest(&config, &[json!({"digest": layout.blob(&plain)})]);
    assert_eq!(layout.build().unwrap_err(), "the image has 1 layers and 0 digests of unpacked layers");
    let config = json!({"architecture": "arm64", "os": "linux", "rootfs": {"diff_ids": []}});
    layout.manifest(&config, &[]);
    assert_eq!(layout.build().unwrap_err(), "the image is for arm64 and linux, not for amd64 and linux");
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": []}});
    layout.manifest(&config, &[]);
    assert_eq!(layout.build().unwrap_err(), "the image's manifest: layers: 0 elements; 1 to 32 are allowed");
}

#[test]
fn a_store_is_shared_and_damage_is_seen() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    fs::write(at("root.tar"), archive(&[entry(FILE, "a", "", b"1")])).unwrap();
    let source: Source = at("root.tar").to_str().unwrap().parse().unwrap();
    let command = ["/a".to_owned()];
    let into = |output: &str, store: &str| {
        let (output, store) = (at(output), at(store));
        let options = Options { output: &output, store: Some(&store), max_unpacked: 1 << 20 };
        build(&source, &options, &command)
    };
    assert!(!into("one", "store").unwrap().layers[0].reused);
    let summary = into("two", "store").unwrap();
    assert!(summary.layers[0].reused);
    let entries = fs::read_dir(at("store/layers")).unwrap().count();
    assert_eq!(entries, 1, "nothing temporary stays");
    let layer = at("two/layers").join(summary.layers[0].written.root_hash.to_string()).join("layer.erofs");
    assert!(
        into("one", "other").unwrap_err().to_string().ends_with("is there already, and is not the store's")
    );
    fs::OpenOptions::new().write(true).open(&layer).unwrap().set_len(4096).unwrap();
    assert!(into("two", "store").unwrap_err().to_string().contains("is damaged"));
}

#[test]
fn what_is_kept_of_an_image_makes_other_manifests() {
    let layout = Layout::new();
    let passwd = entry(FILE, "etc/passwd", "", b"web:x:33:34::/:\n");
    let group = entry(FILE, "etc/group", "", b"log:x:7:web\n");
    let layer = plain(&[archive(&[entry(FOLDER, "etc", "", b""), passwd, group])]);
    layout.image(&layer, json!({"Entrypoint": ["/run"], "Cmd": ["it"], "User": "nobody", "Env": ["A=1"]}));
    let output = layout.path("out");
    let options = Options { output: &output, store: None, max_unpacked: 1 << 20 };

    assert!(build(&layout.source(), &options, &[]).unwrap_err().to_string().contains("no user \"nobody\""));
    let written = ["manifest.json", image::FILE].map(|name| output.join(name).exists());
    assert_eq!(written, [false, false], "a refused image leaves nothing to be taken for it");

    let ready = make_ready(&layout.source(), &options).unwrap();
    let image = Image::read(&output).unwrap().unwrap();
    assert_eq!(image, ready.image);
    assert!(!output.join("manifest.json").exists());
    let manifest = image.manifest(&["that".to_owned()], Some("web")).unwrap();
    assert_eq!(manifest.process.args, ["/run", "that"]);
    assert_eq!((manifest.process.uid, manifest.process.gid, manifest.process.groups), (33, 34, vec![7]));
    assert!(manifest.process.env.contains(&"A=1".to_owned()));
    assert_eq!(manifest.layers, image.layers);
}

#[test]
fn a_layout_is_identified_by_what_its_tag_means() {
    let layout = Layout::new();
    let image = |content: &[u8]| {
        layout.image(&plain(&[archive(&[entry(FILE, "a", "", content)])]), json!({"Cmd": ["/a"]}));
        layout.source().identity().unwrap()
    };
    let first = image(b"1");
    assert_ne!(image(b"2"), first);
    assert_eq!(image(b"1"), first);
}
