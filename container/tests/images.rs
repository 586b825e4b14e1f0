//! Images, as the tools of EROFS and cryptsetup and the kernel see them.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use cofferdam_container::erofs::{ErofsError, Image};
use cofferdam_container::spool::{Content, PIECE, Spool};
use cofferdam_container::tree::{Attributes, Folder, Kind, Leaf, Node};
use cofferdam_container::verity::{VerityWriter, Written};
use rustix::fs::lgetxattr;
use rustix::process::geteuid;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

fn attributes(mode: u16) -> Attributes {
    // Who runs the tests can extract only files of its own.
    let id = |own: u32, other: u32| if geteuid().is_root() { other } else { own };
    Attributes {
        mode,
        uid: id(rustix::process::getuid().as_raw(), 1000),
        gid: id(rustix::process::getgid().as_raw(), 100_000),
        mtime: 1_000_000_007,
        xattrs: BTreeMap::new(),
    }
}

fn leaf(mode: u16, kind: Kind) -> Node {
    Node::Leaf(Rc::new(Leaf { attributes: attributes(mode), kind }))
}

fn folder(children: impl IntoIterator<Item = (String, Node)>) -> Folder {
    let children = children.into_iter().map(|(name, node)| (name.into_bytes(), node)).collect();
    Folder { attributes: attributes(0o755), opaque: false, children }
}

fn bytes(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at * 7 % 251) as u8 + 1).collect()
}

fn add(spool: &mut Spool, content: &[u8]) -> Content {
    let mut adding = spool.add();
    adding.write(content).unwrap();
    adding.finish().unwrap()
}

fn spool() -> Spool {
    Spool::create(&std::env::temp_dir()).unwrap()
}

fn write(root: &Folder, spool: &Spool, path: &Path) -> Result<Written, ErofsError> {
    let image = Image::new(root)?;
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    let mut out = VerityWriter::new(&file, image.blocks());
    image.write(spool, &mut out)?;
    Ok(out.finish()?)
}

/// Sizes around those where a layout begins.
const SIZES: [usize; 14] =
    [0, 1, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 6145, 8192, PIECE - 1, PIECE, 3 * PIECE + 5];

fn all_kinds(spool: &mut Spool) -> Folder {
    let mut sparse = spool.add();
    sparse.zeros(10 << 20).unwrap();
    sparse.write(b"middle").unwrap();
    sparse.zeros(5 << 30).unwrap();
    sparse.write(b"end").unwrap();
    let sparse = leaf(0o600, Kind::File(sparse.finish().unwrap()));
    let mut holes = spool.add();
    holes.zeros(1 << 20).unwrap();
    let holes = leaf(0o600, Kind::File(holes.finish().unwrap()));

    let sized = SIZES.map(|size| (format!("{size}"), leaf(0o644, Kind::File(add(spool, &bytes(size))))));
    let twice = leaf(0o755, Kind::File(add(spool, b"linked")));
    let links = folder([("one".to_owned(), twice.clone()), ("two".to_owned(), twice.clone())]);
    // As many names as need several blocks, some of the longest.
    let many = (0..600).map(|at| {
        let name = if at % 50 == 0 { format!("{at:0>255}") } else { format!("file-{at}") };
        (name, leaf(0o444, Kind::File(Content::default())))
    });
    let mut marked = leaf(0o644, Kind::Fifo);
    if let Node::Leaf(leaf) = &mut marked {
        let leaf = Rc::get_mut(leaf).unwrap();
        leaf.attributes.xattrs.insert(b"user.note".to_vec(), bytes(300));
        leaf.attributes.xattrs.insert(b"security.capability".to_vec(), CAPABILITY.to_vec());
    }
    if let (Node::Leaf(marked), content) = (&mut marked, add(spool, b"capable")) {
        Rc::get_mut(marked).unwrap().kind = Kind::File(content);
    }
    let mut big = folder([]);
    for at in 0..3 {
        big.attributes.xattrs.insert(format!("user.{at}").into_bytes(), bytes(3000));
    }
    let mut hiding = folder([]);
    hiding.attributes.mode = 0o1777;
    hiding.opaque = true;
    folder([
        ("capable".to_owned(), marked),
        ("deep".to_owned(), Node::Folder(folder([("deeper".to_owned(), Node::Folder(folder([])))]))),
        ("fifo".to_owned(), leaf(0o622, Kind::Fifo)),
        ("holes".to_owned(), holes),
        ("link".to_owned(), leaf(0o777, Kind::Symlink(b"../../etc/passwd".to_vec()))),
        ("links".to_owned(), Node::Folder(links)),
        ("long-link".to_owned(), leaf(0o777, Kind::Symlink(bytes(4000)))),
        ("many".to_owned(), Node::Folder(folder(many))),
        ("sized".to_owned(), Node::Folder(folder(sized))),
        ("sparse".to_owned(), sparse),
        ("!first".to_owned(), Node::Folder(big)),
        ("opaque".to_owned(), Node::Folder(hiding)),
    ])
}

/// `cap_net_raw=ep`, as a version 2 attribute.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Compares a folder of the host with the tree that it was made of.
fn compare(at: &Path, folder: &Folder, spool: &Spool) {
    let mut names: Vec<_> =
        fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected: Vec<_> =
        folder.children.keys().map(|name| String::from_utf8(name.clone()).unwrap()).collect();
    assert_eq!(names, expected, "{}", at.display());
    for (name, node) in expected.iter().zip(folder.children.values()) {
        let path = at.join(name);
        let metadata = path.symlink_metadata().unwrap();
        let attributes = match node {
            Node::Folder(child) => {
                assert!(metadata.is_dir());
                compare(&path, child, spool);
                &child.attributes
            }
            Node::Leaf(leaf) => {
                compare_leaf(&path, leaf, spool);
                &leaf.attributes
            }
            Node::Whiteout => {
                assert!(metadata.file_type().is_char_device() && metadata.rdev() == 0, "{}", path.display());
                continue;
            }
        };
        if !metadata.is_symlink() {
            assert_eq!(metadata.mode() & 0o7777, u32::from(attributes.mode), "{}", path.display());
        }
        assert_eq!((metadata.uid(), metadata.gid()), (attributes.uid, attributes.gid), "{}", path.display());
        assert_eq!(metadata.mtime(), attributes.mtime as i64, "{}", path.display());
    }
}

fn compare_leaf(path: &Path, leaf: &Leaf, spool: &Spool) {
    let metadata = path.symlink_metadata().unwrap();
    match &leaf.kind {
        Kind::File(content) => {
            assert_eq!(metadata.len(), content.size(), "{}", path.display());
            // Of large files the beginning and the end.
            let length = content.size().min(11 << 20);
            for at in [0, content.size() - length] {
                let mut expected = vec![0; length as usize];
                spool.read(content, at, &mut expected).unwrap();
                let mut found = vec![0; length as usize];
                let file = File::open(path).unwrap();
                std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, at).unwrap();
                assert!(expected == found, "{}", path.display());
            }
        }
        Kind::Symlink(target) => {
            assert_eq!(fs::read_link(path).unwrap().as_os_str().as_encoded_bytes(), target);
        }
        Kind::Fifo => assert!(metadata.file_type().is_fifo()),
    }
}

#[test]
fn the_tools_of_erofs_and_cryptsetup_accept_images() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("layer.erofs");
    let mut spool = spool();
    let mut root = all_kinds(&mut spool);
    let written = write(&root, &spool, &path).unwrap();
    let name = path.to_str().unwrap();
    // Holes and repeated content cost nothing: 5 GiB of zeros are in it.
    assert!(fs::metadata(&path).unwrap().len() < 2 << 20);
    run(
        "/usr/sbin/veritysetup",
        &["verify", name, name, &written.root_hash.to_string(), &format!("--hash-offset={}", written.size)],
    );
    run("fsck.erofs", &[name]);
    let extracted = place.path().join("extracted");
    run("fsck.erofs", &[&format!("--extract={}", extracted.to_str().unwrap()), "--preserve", name]);
    // erofs-utils 1.5 checks files with holes, but closes the holes when it extracts; the kernel does not.
    for name in ["holes", "sparse"] {
        root.children.remove(name.as_bytes());
        fs::remove_file(extracted.join(name)).unwrap();
    }
    compare(&extracted, &root, &spool);
}

#[test]
fn equal_trees_make_equal_images() {
    let place = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = place.path().join(name);
        let mut spool = spool();
        // What came before in the spool does not matter.
        add(&mut spool, name.as_bytes());
        let root = all_kinds(&mut spool);
        (write(&root, &spool, &path).unwrap(), fs::read(path).unwrap())
    };
    let (first, second) = (make("first"), make("second, longer"));
    assert_eq!(first.0, second.0);
    assert!(first.1 == second.1);
}

#[test]
fn the_smallest_image_is_one_block() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("layer.erofs");
    let written = write(&folder([]), &spool(), &path).unwrap();
    assert_eq!(written.size, 4096);
    run("fsck.erofs", &[path.to_str().unwrap()]);
}

#[test]
fn attributes_that_the_format_cannot_hold() {
    let refused = |name: &str, value: usize| {
        let mut root = folder([("a".to_owned(), Node::Folder(folder([])))]);
        let Some(Node::Folder(child)) = root.children.get_mut(b"a".as_slice()) else { unreachable!() };
        child.attributes.xattrs.insert(name.as_bytes().to_vec(), bytes(value));
        write(&root, &spool(), Path::new("/dev/null")).unwrap_err().to_string()
    };
    assert_eq!(
        refused("system.other", 1),
        r#"/a: the extended attribute "system.other" is of no kind that EROFS knows"#
    );
    assert_eq!(refused("user.", 1), r#"/a: the extended attribute "user." is of no kind that EROFS knows"#);
    assert_eq!(refused("user.a", 65_536), r#"/a: the extended attribute "user.a" is too long"#);
    let long = format!("user.{}", "a".repeat(256));
    assert!(refused(&long, 1).contains("too long"));
}

/// What only a kernel shows: extended attributes, and that overlayfs hides what it shall. Run by `make test-all`.
#[test]
#[ignore = "needs root, and EROFS and overlayfs in the kernel"]
fn the_kernel_mounts_images() {
    struct Mounted<'a>(&'a str);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let mut spool = spool();
    let mut lower = all_kinds(&mut spool);
    // fsck.erofs would lose this bit, as it changes the owner last.
    lower.children.insert(b"set-user-id".to_vec(), leaf(0o4755, Kind::Fifo));
    let mut opaque = folder([("new".to_owned(), leaf(0o600, Kind::Fifo))]);
    opaque.opaque = true;
    let upper = folder([
        ("fifo".to_owned(), Node::Whiteout),
        ("many".to_owned(), Node::Folder(opaque)),
        ("deep".to_owned(), Node::Folder(folder([]))),
    ]);
    for name in ["lower", "upper", "both"] {
        fs::create_dir(at(name)).unwrap();
    }
    write(&lower, &spool, Path::new(&at("lower.erofs"))).unwrap();
    write(&upper, &spool, Path::new(&at("upper.erofs"))).unwrap();
    let (lower_at, upper_at, both_at) = (at("lower"), at("upper"), at("both"));
    run("mount", &["-t", "erofs", "-o", "loop,ro", &at("lower.erofs"), &lower_at]);
    let _lower = Mounted(&lower_at);
    run("mount", &["-t", "erofs", "-o", "loop,ro", &at("upper.erofs"), &upper_at]);
    let _upper = Mounted(&upper_at);
    let layers = format!("lowerdir={upper_at}:{lower_at}");
    run("mount", &["-t", "overlay", "-o", &layers, "none", &both_at]);
    let _both = Mounted(&both_at);

    compare(Path::new(&lower_at), &lower, &spool);
    let number = |name: &str| fs::metadata(format!("{lower_at}/links/{name}")).unwrap().ino();
    assert_eq!(number("one"), number("two"));
    assert_eq!(fs::metadata(format!("{lower_at}/links/one")).unwrap().nlink(), 2);
    let mut value = vec![0; 4096];
    let mut get = |path: &str, name: &str| {
        let length = lgetxattr(format!("{lower_at}/{path}"), name, &mut value).unwrap();
        value[..length].to_vec()
    };
    assert_eq!(get("capable", "security.capability"), CAPABILITY);
    assert_eq!(get("capable", "user.note"), bytes(300));
    assert_eq!(get("!first", "user.2"), bytes(3000));
    assert_eq!(get("opaque", "trusted.overlay.opaque"), b"y");

    let both = Path::new(&both_at);
    assert!(both.join("fifo").symlink_metadata().is_err());
    let names: Vec<_> =
        fs::read_dir(both.join("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["new"]);
    assert!(both.join("deep/deeper").is_dir());
}
