//! Archives of saved images, and folders, as sources.
#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

mod support;

use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam_container::digest::Digest;
use cofferdam_container::source::Source;
use rustix::fs::{CWD, Mode, XattrFlags, lgetxattr, lsetxattr, mkfifoat};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::*;

const LIMIT: u64 = 1 << 20;

/// Two layers.
fn layers() -> [Vec<u8>; 2] {
    let lower =
        [entry(FOLDER, "etc/", "", b""), entry(FILE, "etc/motd", "", b"hello"), entry(FILE, "gone", "", b"")];
    [archive(&lower), archive(&[entry(FILE, ".wh.gone", "", b""), entry(FILE, "b", "", b"2")])]
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/b"], "Env": ["A=1"]}, "rootfs": {"diff_ids": ids},
    });
    config.to_string().into_bytes()
}

/// An archive as Docker before 25 saves an image with these layers.
fn saved(config: &[u8], list: &Value, layers: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut entries = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let folder = format!("{index}").repeat(64);
        entries.push(entry(FOLDER, &format!("{folder}/"), "", b""));
        entries.push(entry(FILE, &format!("{folder}/VERSION"), "", b"1.0"));
        entries.push(entry(FILE, &format!("{folder}/layer.tar"), "", layer));
    }
    entries.push(entry(FILE, &format!("{}.json", Digest::of(config).hex()), "", config));
    entries.push(entry(FILE, "manifest.json", "", list.to_string().as_bytes()));
    entries.push(entry(FILE, "repositories", "", b"{}"));
    entries
}

fn list(config: &[u8], names: &[String]) -> Value {
    json!([{"Config": format!("{}.json", Digest::of(config).hex()), "RepoTags": ["two:1"], "Layers": names}])
}

fn names() -> [String; 2] {
    ["0", "1"].map(|digit| format!("{}/layer.tar", digit.repeat(64)))
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The digest of the manifest of a source, or why it is refused, both without the names of this place.
    fn build(&self, source: &str) -> Result<String, String> {
        let source = source.replace("PLACE", self.0.path().to_str().unwrap());
        let source: Source = source.parse()?;
        let out = self.path("out");
        let built = build_to(&source, &out, LIMIT).map(|(summary, _)| summary.digest.to_string());
        assert_eq!(built.is_ok(), out.join("manifest.json").exists());
        if out.exists() {
            fs::remove_dir_all(out).unwrap();
        }
        built.map_err(|error| error.replace(self.0.path().to_str().unwrap(), "PLACE"))
    }

    /// Why an archive of an image with these entries is refused.
    fn refused(&self, entries: &[Vec<u8>]) -> String {
        fs::write(self.path("a.tar"), archive(entries)).unwrap();
        self.build("PLACE/a.tar").unwrap_err()
    }
}

/// What an image layout of the same layers and configuration gives.
fn of_layout(layers: &[Vec<u8>]) -> String {
    let layout = Layout::new();
    let pairs: Vec<_> = layers.iter().map(|layer| (layer.clone(), layer.clone())).collect();
    layout.image(&pairs, json!({"Cmd": ["/b"], "Env": ["A=1"]}));
    layout.build().unwrap().0.digest.to_string()
}

#[test]
fn saved_images_are_the_same_as_layouts() {
    let place = Place::new();
    let layers = layers();
    let expected = of_layout(&layers);
    let config = config(&layers);
    let old = archive(&saved(&config, &list(&config, &names()), &layers));
    fs::write(place.path("old.tar"), &old).unwrap();
    fs::write(place.path("old.tar.gz"), pack("gzip", &old)).unwrap();
    fs::write(place.path("old.tar.zst"), pack("zstd", &old)).unwrap();
    for source in ["PLACE/old.tar", "PLACE/old.tar.gz", "PLACE/old.tar.zst", "docker-archive:PLACE/old.tar"] {
        assert_eq!(place.build(source).as_ref(), Ok(&expected), "{source}");
    }
    for name in ["two:1", "docker.io/library/two:1"] {
        assert_eq!(place.build(&format!("docker-archive:PLACE/old.tar:{name}")).as_ref(), Ok(&expected));
    }
    let error = place.build("docker-archive:PLACE/old.tar:two").unwrap_err();
    assert_eq!(error, "there is no image two for amd64 and linux; there are: two:1");

    // Podman names layers by their digests, and has links to them where Docker has them.
    let podman: Vec<String> = layers.iter().map(|layer| format!("{}.tar", Digest::of(layer).hex())).collect();
    let mut entries: Vec<_> =
        podman.iter().zip(&layers).map(|(name, layer)| entry(FILE, name, "", layer)).collect();
    for (name, target) in names().iter().zip(&podman) {
        entries.push(entry(SYMLINK, name, &format!("../{target}"), b""));
    }
    entries.push(entry(FILE, &format!("{}.json", Digest::of(&config).hex()), "", &config));
    for names in [&names()[..], &podman] {
        let list = entry(FILE, "manifest.json", "", list(&config, names).to_string().as_bytes());
        fs::write(place.path("podman.tar"), archive(&[entries.clone(), vec![list]].concat())).unwrap();
        assert_eq!(place.build("PLACE/podman.tar").as_ref(), Ok(&expected));
    }
}

/// What Docker 25 and later save.
fn as_layout(manifests: &[Value], blobs: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut entries = vec![entry(FOLDER, "blobs/", "", b""), entry(FOLDER, "blobs/sha256/", "", b"")];
    for blob in blobs {
        // Names of 76 bytes.
        entries.push(entry(FILE, &format!("blobs/sha256/{}", Digest::of(blob).hex()), "", blob));
    }
    entries.push(entry(FILE, "index.json", "", json!({"manifests": manifests}).to_string().as_bytes()));
    // What only older readers use.
    entries.push(entry(FILE, "manifest.json", "", b"[]"));
    entries.push(entry(FILE, "oci-layout", "", b"{}"));
    entries
}

fn descriptor(blob: &[u8]) -> Value {
    json!({"digest": Digest::of(blob).to_string(), "size": blob.len()})
}

#[test]
fn layouts_in_archives() {
    let place = Place::new();
    let layers = layers();
    let expected = of_layout(&layers);
    let config = config(&layers);
    let manifest =
        json!({"config": descriptor(&config), "layers": layers.each_ref().map(|layer| descriptor(layer))});
    let manifest = manifest.to_string().into_bytes();
    let named = |blob: &[u8], name: &str| {
        let mut named = descriptor(blob);
        named["annotations"] = json!({
            "io.containerd.image.name": format!("docker.io/library/{name}:latest"),
            "org.opencontainers.image.ref.name": "latest",
        });
        named
    };
    let blobs = [&layers[0][..], &layers[1], &config, &manifest];
    fs::write(place.path("a.tar"), archive(&as_layout(&[named(&manifest, "one")], &blobs))).unwrap();
    assert_eq!(place.build("PLACE/a.tar").as_ref(), Ok(&expected));

    let several = [named(&manifest, "one"), named(b"other", "two")];
    fs::write(place.path("a.tar"), archive(&as_layout(&several, &blobs))).unwrap();
    for name in ["one", "one:latest", "docker.io/library/one:latest"] {
        assert_eq!(place.build(&format!("docker-archive:PLACE/a.tar:{name}")).as_ref(), Ok(&expected));
    }
    assert_eq!(
        place.build("docker-archive:PLACE/a.tar:latest").unwrap_err(),
        "there are several images; choose one with oci:DIR:TAG or docker-archive:FILE:NAME: \
         docker.io/library/one:latest, docker.io/library/two:latest"
    );

    // Sizes, of the manifest and of a layer.
    let mut wrong = named(&manifest, "one");
    wrong["size"] = json!(manifest.len() + 1);
    let said = place.refused(&as_layout(&[wrong], &blobs));
    let (digest, size) = (Digest::of(&manifest), manifest.len());
    assert_eq!(said, format!("blob {digest} has {size} bytes, not {}", size + 1));
    let short = json!({"config": descriptor(&config), "layers": [
        descriptor(&layers[0]),
        {"digest": Digest::of(&layers[1]).to_string(), "size": 7},
    ]});
    let short = short.to_string().into_bytes();
    let said = place.refused(&as_layout(&[named(&short, "one")], &[&layers[0], &layers[1], &config, &short]));
    assert_eq!(said, format!("blob {} has 2560 bytes, not 7", Digest::of(&layers[1])));
    // A blob that is not there, and one that is something else.
    let said = place.refused(&as_layout(&[named(&manifest, "one")], &[&config, &manifest]));
    assert!(said.starts_with("PLACE/a.tar has no file \"blobs/sha256/"), "{said}");
    let mut entries = as_layout(&[named(&manifest, "one")], &blobs);
    let at = entries.iter().position(|entry| {
        entry.starts_with(format!("blobs/sha256/{digest}").replace("sha256:", "").as_bytes())
    });
    let length = entries[at.unwrap()].len();
    entries[at.unwrap()][length - 512..][..1].copy_from_slice(b" ");
    assert!(place.refused(&entries).starts_with(&format!("blob {digest} does not match its digest")));
}

#[test]
fn saved_images_that_are_refused() {
    let place = Place::new();
    let layers = layers();
    let config = config(&layers);
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut entries = saved(&config, &list(&config, &names()), &layers);
        change(&mut entries);
        place.refused(&entries)
    };
    let listed =
        |names: [&str; 2]| place.refused(&saved(&config, &list(&config, &names.map(str::to_owned)), &layers));
    let zeros = "0".repeat(64);
    let link = |target: &str| {
        let name = names()[0].clone();
        with(&|entries| entries[2] = entry(SYMLINK, &name, target, b""))
    };
    let missing = format!("PLACE/a.tar has no file {:?}", names()[0]);
    for target in ["nothing", "../../a", "/etc/passwd", "layer.tar", "../../../../../../etc/passwd", ""] {
        assert_eq!(link(target), missing, "{target}");
    }
    assert_eq!(listed(["../etc/passwd", "b"]), r#"PLACE/a.tar has no file "../etc/passwd""#);
    assert_eq!(listed(["/etc/passwd", "b"]), r#"PLACE/a.tar has no file "/etc/passwd""#);
    assert_eq!(
        with(&|entries| entries.insert(0, entry(FILE, "../x", "", b""))),
        r#"PLACE/a.tar: "../x": it leaves the tree"#
    );
    assert_eq!(
        with(&|entries| entries.push(entry(FILE, "manifest.json", "", b"[]"))),
        r#"PLACE/a.tar: "manifest.json": it is there twice"#
    );
    assert_eq!(
        with(&|entries| entries.push(entry(DEVICE, "repositories", "", b""))),
        r#"PLACE/a.tar: "repositories": it is of the unknown kind '3'"#
    );
    // One byte of the configuration, and of a layer.
    let name = format!("{}.json", Digest::of(&config).hex());
    let said = with(&|entries| entries[6] = entry(FILE, &name, "", &[&config[..], b" "].concat()));
    assert!(said.starts_with(&format!("{name} does not match its digest: it is sha256:")), "{said}");
    let other = archive(&[entry(FILE, "a", "", b"3")]);
    let said = with(&|entries| entries[5] = entry(FILE, &names()[1], "", &other));
    assert!(
        said.starts_with(&format!("layer {}: unpacked it does not match its digest", names()[1])),
        "{said}"
    );
    let one = list(&config, &names()[..1]);
    assert_eq!(
        place.refused(&saved(&config, &one, &layers)),
        "the image has 1 layers and 2 digests of unpacked layers"
    );
    let both = json!([one[0], one[0]]);
    assert!(place.refused(&saved(&config, &both, &layers)).starts_with("there are several images"));
    assert_eq!(
        place.refused(&saved(&config, &json!([]), &layers)),
        "there is no image at all for amd64 and linux; there are: "
    );
    assert!(place.refused(&saved(&config, &json!({}), &layers)).starts_with("manifest.json: "));
    let long = vec![b' '; (4 << 20) + 1];
    fs::write(place.path("long.tar"), archive(&[entry(FILE, "manifest.json", "", &long)])).unwrap();
    let source: Source = place.path("long.tar").to_str().unwrap().parse().unwrap();
    let error = build_to(&source, &place.path("long"), 16 << 20).map(|_| ()).unwrap_err();
    assert!(error.ends_with("manifest.json has more than 4194304 bytes"), "{error}");

    // Bombs, in the archive and in a layer.
    let limit = "it has more than 1048576 bytes when unpacked, which is the limit (--max-unpacked)";
    let bomb = archive(&[entry(FILE, &format!("{zeros}.tar"), "", &vec![0; 2 << 20])]);
    fs::write(place.path("bomb.tar.gz"), pack("gzip", &bomb)).unwrap();
    assert_eq!(place.build("PLACE/bomb.tar.gz").unwrap_err(), format!("PLACE/bomb.tar.gz: {limit}"));
    let bomb = pack("gzip", &archive(&[entry(FILE, "a", "", &vec![0; 2 << 20])]));
    let said = with(&|entries| entries[2] = entry(FILE, &names()[0], "", &bomb));
    assert!(said.ends_with(limit), "{said}");
    // Cut off in a layer.
    let whole = archive(&saved(&config, &list(&config, &names()), &layers));
    fs::write(place.path("cut.tar"), &whole[..3000]).unwrap();
    assert_eq!(
        place.build("PLACE/cut.tar").unwrap_err(),
        "PLACE/cut.tar: the archive ends in the middle of something"
    );
}

/// Names that images have do not make one.
#[test]
fn root_file_systems_with_such_names() {
    let place = Place::new();
    let entries = [entry(FILE, "manifest.json", "", b"[]"), entry(FOLDER, "bin/", "", b"")];
    fs::write(place.path("a.tar"), archive(&entries)).unwrap();
    place.build("PLACE/a.tar").unwrap();
    assert_eq!(
        place.build("docker-archive:PLACE/a.tar").unwrap_err(),
        "PLACE/a.tar has no image in it: neither manifest.json nor index.json, or other files too"
    );
    fs::write(place.path("a.tar"), archive(&[entry(FILE, "repositories", "", b"{}")])).unwrap();
    place.build("PLACE/a.tar").unwrap();
}

#[test]
fn names_of_sources() {
    let parse = |text: &str| text.parse::<Source>();
    let saved = |file: &str, name: Option<&str>| {
        Ok(Source::Saved { file: file.into(), name: name.map(str::to_owned) })
    };
    assert_eq!(parse("docker-archive:a.tar"), saved("a.tar", None));
    assert_eq!(parse("docker-archive:a.tar:debian:12"), saved("a.tar", Some("debian:12")));
    assert_eq!(parse("a.tar"), Ok(Source::Path("a.tar".into())));
    for bad in ["docker-archive:", "docker-archive::x", "docker-archive:a.tar:", "", "oci:"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

/// A folder with everything that one can have without being root.
fn folder(root: &Path) {
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    fs::write(root.join("dir/a"), "content").unwrap();
    fs::hard_link(root.join("dir/a"), root.join("b")).unwrap();
    fs::set_permissions(root.join("b"), Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(root.join("dir/empty"), Permissions::from_mode(0o1777)).unwrap();
    symlink("../../../etc/shadow", root.join("out")).unwrap();
    symlink("dir", root.join("link")).unwrap();
    let mut sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all(b"start").unwrap();
    sparse.seek(SeekFrom::Start(300_000)).unwrap();
    sparse.write_all(b"middle").unwrap();
    sparse.set_len(600_000).unwrap();
    mkfifoat(CWD, root.join("pipe"), Mode::RUSR).unwrap();
    lsetxattr(root.join("dir/a"), "user.note", b"\0value", XattrFlags::empty()).unwrap();
    lsetxattr(root.join("dir"), "user.note", b"of a folder", XattrFlags::empty()).unwrap();
    Command::new("find")
        .arg(root)
        .args(["-exec", "touch", "-h", "-d", "@1000000000", "{}", ";"])
        .status()
        .unwrap();
}

#[test]
fn a_folder_is_read_as_it_is() {
    // Not /tmp, whose file system may have no extended attributes.
    let place = Place(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let root = place.path("root");
    folder(&root);
    drop(UnixListener::bind(root.join("socket")).unwrap());
    let source: Source = root.to_str().unwrap().parse().unwrap();
    let (summary, manifest) = build_to(&source, &place.path("out"), LIMIT).unwrap();
    assert_eq!(summary.warnings.shown, [r#""socket": socket: left out"#]);
    let root_hash = manifest.layers[0].root_hash.to_string();
    extract(&place.path("out"), &root_hash, &place.path("x"));
    let at = |name: &str| fs::symlink_metadata(place.path("x").join(name)).unwrap();
    let original = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
    for name in ["dir", "dir/empty", "dir/a", "b", "pipe"] {
        let told = |metadata: fs::Metadata| {
            // Extracting changes the owner after the mode, which takes the setuid bit away.
            let (mode, size) =
                (metadata.mode() & !0o6000, if metadata.is_file() { metadata.size() } else { 0 });
            (mode, metadata.uid(), metadata.gid(), metadata.mtime(), size)
        };
        assert_eq!(told(at(name)), told(original(name)), "{name}");
    }
    assert!(at("pipe").file_type().is_fifo());
    assert_eq!(fs::read_link(place.path("x/out")).unwrap(), Path::new("../../../etc/shadow"));
    assert_eq!(fs::read_link(place.path("x/link")).unwrap(), Path::new("dir"));
    // fsck.erofs 1.5 knows neither holes nor hard links; those are compared by way of tar, below.
    let layer = place.path("out/layers").join(&root_hash).join("layer.erofs");
    assert!(fs::metadata(layer).unwrap().size() < 300_000, "holes are not stored");

    // A copy is the same, and so is what tar makes of it.
    let mut value = [0; 16];
    assert_eq!(lgetxattr(root.join("dir/a"), "user.note", &mut value).unwrap(), 6);
    fs::remove_file(root.join("socket")).unwrap();
    Command::new("touch").args(["-d", "@1000000000"]).arg(&root).status().unwrap();
    let digest = place.build("PLACE/root").unwrap();
    let copied = Command::new("cp").args(["-a", "--"]).args([&root, &place.path("copy")]).status().unwrap();
    assert!(copied.success());
    assert_eq!(place.build("PLACE/copy").unwrap(), digest);
    let tar = Command::new("tar")
        .args(["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "-cf"])
        .arg(place.path("a.tar"))
        .arg("-C")
        .args([&root, Path::new(".")])
        .status();
    assert!(tar.unwrap().success());
    assert_eq!(place.build("PLACE/a.tar").unwrap(), digest);
}

#[test]
fn folders_that_are_refused() {
    let place = Place::new();
    fs::create_dir_all(place.path("deep")).unwrap();
    let below = "d/".repeat(257);
    fs::create_dir_all(place.path("deep").join(below)).unwrap();
    let said = place.build("PLACE/deep").unwrap_err();
    assert!(said.ends_with("it lies in more than 256 folders"), "{said}");

    fs::create_dir_all(place.path("large")).unwrap();
    File::create(place.path("large/hole")).unwrap().set_len(LIMIT + 1).unwrap();
    let said = place.build("PLACE/large").unwrap_err();
    assert!(
        said.ends_with("it has more than 1048576 bytes when unpacked, which is the limit (--max-unpacked)"),
        "{said}"
    );

    // These files have content, although they are said to be empty: as one that grows.
    let source: Source = "/proc/sys/kernel/random".parse().unwrap();
    let error = build_to(&source, &place.path("out"), LIMIT).map(|_| ()).unwrap_err();
    assert_eq!(error, "/proc/sys/kernel/random: \"boot_id\" changed while it was read");

    fs::create_dir_all(place.path("own/out")).unwrap();
    let source: Source = place.path("own").to_str().unwrap().parse().unwrap();
    for out in ["own", "own/out", "own/new/out"] {
        let error = build_to(&source, &place.path(out), LIMIT).map(|_| ()).unwrap_err();
        assert!(error.ends_with(&format!("{out} lies in the folder that is to be read")), "{error}");
    }
    assert_eq!(fs::read_dir(place.path("own")).unwrap().count(), 1, "nothing was made there");
}
