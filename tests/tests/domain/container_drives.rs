//! What a host does to the drives of containers: wrong, swapped and missing blocks of layers, and what is on its disk of a scratch
//! device.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;

use cofferdam_container_manifest::{Mount, OnVerityFailure, Protection, Scratch, ScratchVolume};
use cofferdam_tests::container::{Container, layer};

use super::container::{check_refused, swap, tmpfs};

/// Size of a block, in bytes, and of a hash of one.
const BLOCK: usize = 4096;
const HASH: usize = 32;

/// Flips a bit in a drive's file, at the place that is found in its bytes.
fn flip(container: &mut Container, id: &str, place: impl FnOnce(&[u8]) -> usize) {
    let path = container.own_file(id);
    let mut bytes = fs::read(&path).unwrap();
    let at = place(&bytes);
    bytes[at] ^= 4;
    fs::write(path, bytes).unwrap();
}

/// Where something is in a file.
fn position(bytes: &[u8], of: &[u8]) -> usize {
    bytes.windows(of.len()).position(|window| window == of).unwrap()
}

/// Where the number `at` of the content of /large is, which the highest layer has.
fn in_large(bytes: &[u8], at: u32) -> usize {
    let numbers: Vec<u8> = (at..at + 100).flat_map(u32::to_le_bytes).collect();
    position(bytes, &numbers)
}

/// Where the hash tree of a layer begins: after the file system and a block with the superblock.
fn tree(container: &Container, layer: usize) -> usize {
    usize::try_from(container.manifest.layers[layer].size).unwrap() + BLOCK
}

/// The layer's block of data is wrong; so is the superblock of another's tree, which nobody believes anyway.
#[test]
fn a_wrong_block_is_never_served() {
    let mut container = Container::new("cat /which; sha256sum /large 2>&1; exit 5");
    flip(&mut container, "layer2", |bytes| in_large(bytes, 100_000));
    let superblock = tree(&container, 1) - BLOCK;
    flip(&mut container, "layer1", |bytes| superblock + position(&bytes[superblock..], b"verity"));
    let ended = container.finish();
    assert_eq!(ended.text(), "highest\nsha256sum: can't read '/large': Input/output error\n", "{ended}");
    assert_eq!(ended.done.code(), 5, "{ended}");
}

/// As the manifest says: nobody waits for what the reader makes of it.
#[test]
fn a_wrong_block_ends_the_domain_if_the_manifest_says_so() {
    let mut container = Container::new("echo up; cat /large > /dev/null; exec sleep 1000");
    container.manifest.on_verity_failure = OnVerityFailure::Kill;
    flip(&mut container, "layer2", |bytes| in_large(bytes, 100_000));
    let ended = container.finish();
    assert_eq!(ended.done.code(), 120, "{ended}");
    assert!(ended.done.outcome().message.contains("layer 2 verity failure"), "{ended}");
}

/// A hash is wrong at the end of the tree; then the drive ends in the middle of another layer's file.
#[test]
fn neither_a_wrong_hash_nor_a_truncated_drive_is_served() {
    let script = "cat /which; sha256sum /large 2>&1; sha256sum /bin/busybox > /dev/null; echo cached; read line; \
        sha256sum /bin/test-guest 2>&1; exit 5";
    let mut container = Container::new(script);
    container.manifest.host.stdin = true;
    // After the root block the tree has two blocks of hashes; nothing but the end of /large hangs on the second.
    let hashes = tree(&container, 2) + BLOCK;
    flip(&mut container, "layer2", |bytes| {
        let block = in_large(bytes, 180_000) / BLOCK;
        assert!(block >= BLOCK / HASH, "block {block}");
        hashes + block * HASH
    });
    let lowest = container.own_file("layer0");
    let started = container.start();
    started.wait_for("cached");
    let program = fs::read(cofferdam_tests::place::test_guest()).unwrap();
    let at = position(&fs::read(&lowest).unwrap(), &program[program.len() / 2..][..BLOCK]);
    OpenOptions::new().write(true).open(&lowest).unwrap().set_len(at as u64 / 512 * 512).unwrap();
    started.send(b"go on\n");
    let ended = started.finish();
    let failed = |path: &str| format!("sha256sum: can't read '{path}': Input/output error\n");
    let expected = format!("highest\n{}cached\n{}", failed("/large"), failed("/bin/test-guest"));
    assert_eq!((ended.text(), ended.done.code()), (expected, 5), "{ended}");
}

#[test]
fn a_wrong_root_of_a_tree_is_refused() {
    let mut container = Container::new("echo it runs");
    let root = tree(&container, 0);
    flip(&mut container, "layer0", |_| root + 9);
    check_refused(&container.finish(), "root: layer 0 verity_failure");
}

/// A layer of the same size as the one that the manifest names in its place: the other of two, in swapped order, or another image's.
#[test]
fn another_layer_of_the_same_size_is_refused() {
    for swapped in [true, false] {
        let mut container = Container::new("echo it runs");
        let mut other = |name: &str| {
            let content = container.file(name);
            fs::create_dir(&content).unwrap();
            fs::write(content.join("which"), name).unwrap();
            layer(&container.file(""), &content)
        };
        let [(first, first_file), (second, second_file)] = ["first", "other"].map(&mut other);
        assert_eq!(first.size, second.size);
        container.manifest.layers[0] = first;
        container.drives[0].1 = if swapped { first_file } else { second_file.clone() };
        if swapped {
            container.manifest.layers[2] = second;
            container.drives[2].1 = second_file;
            swap(&mut container);
        }
        check_refused(&container.finish(), "root: layer 0 verity_failure");
    }
}

fn scratch(protection: Protection, size: u64) -> Scratch {
    Scratch { protection, size }
}

/// Uses a file system so that blocks of all kinds come and go, and looks whether one was read that was never written.
const USE: &str = "mkdir /v/d; for i in $(seq 1 300); do echo $i > /v/d/file-with-a-long-name-$i; done; rm /v/d/*7*; \
    for i in $(seq 1 20); do mkdir -p /v/e$i/f/g; ln -s x /v/e$i/l; dd if=/dev/zero of=/v/e$i/s bs=1k seek=$((i * 3000)) count=3 2> /dev/null; done; \
    test-guest pattern 3000000 9 > /v/data; test-guest pattern 100000 9 > /root-file; sync; \
    mount -t proc proc /mnt; echo 3 > /mnt/sys/vm/drop_caches; rm -r /v/e1*; for i in $(seq 1 50); do echo $i > /v/d/again-$i; done; sync; \
    echo 3 > /mnt/sys/vm/drop_caches; test-guest check 3000000 9 < /v/data && test-guest check 100000 9 < /root-file && echo checked; \
    ls /v/d | wc -l; mount | grep -c ext4";

fn on_scratch(script: &str, scratch: Scratch) -> Container {
    let mut container = Container::new(&format!("exec 2>&1; {script}")).with_scratch(scratch);
    container.manifest.mounts = vec![Mount::Scratch(ScratchVolume { path: "/v".to_owned() }), tmpfs("/mnt")];
    container.manifest.process.capabilities =
        ["CAP_DAC_OVERRIDE", "CAP_SYSLOG", "CAP_SYS_ADMIN"].map(str::to_owned).into();
    container
}

#[test]
fn a_scratch_device_is_used_and_nothing_is_read_that_was_not_written() {
    for protection in [Protection::Authenticated, Protection::Encrypted, Protection::None] {
        let ended = on_scratch(USE, scratch(protection, 256 << 20)).finish();
        assert_eq!(ended.text(), "checked\n293\n1\n", "{protection:?}: {ended}");
        // The kernel says it on the console.
        let console = ended.done.console();
        assert!(!console.contains("INTEGRITY AEAD") && !console.contains("I/O error"), "{ended}");
        // The content is on the host's disk, where only that of an unprotected device can be read.
        let bytes = fs::read(ended.container.file("scratch")).unwrap();
        let mut start = vec![0; BLOCK];
        Read::read_exact(&mut cofferdam_test_guest::Pattern::new(9), &mut start).unwrap();
        let seen = bytes.chunks(BLOCK).any(|chunk| chunk == start);
        assert_eq!(seen, protection == Protection::None, "{protection:?}");
        assert_ne!(bytes.iter().filter(|byte| **byte != 0).count(), 0);
    }
}

/// Compares what is written, not time: how many blocks of the host's file there are afterwards.
#[test]
fn a_larger_scratch_device_takes_no_longer_to_make() {
    use std::os::unix::fs::MetadataExt;
    let blocks = |size| {
        let ended = on_scratch("echo x > /v/x; df -m /v | tail -1", scratch(Protection::Authenticated, size))
            .finish();
        assert_eq!(ended.done.code(), 0, "{ended}");
        fs::metadata(ended.container.file("scratch")).unwrap().blocks() / 2
    };
    let (small, large) = (blocks(256 << 20), blocks(1 << 40));
    // KiB: descriptors of 8,000 groups, and tags in as many places as before.
    assert!(small < 1024 && large < small + 1024, "{small} KiB, {large} KiB");
}

/// The host changes blocks while the container runs.
#[test]
fn a_changed_block_of_an_authenticated_device_fails_to_be_read() {
    let script = "test-guest pattern 8000000 9 > /v/data; sync; mount -t proc proc /mnt; echo written; read line; \
        echo 3 > /mnt/sys/vm/drop_caches; cat /v/data > /dev/null; echo $?";
    let mut container = on_scratch(script, scratch(Protection::Authenticated, 64 << 20));
    container.manifest.host.stdin = true;
    let path = container.file("scratch");
    let started = container.start();
    started.wait_for("written");
    let bytes = fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    // Of the longest run of written blocks, which has the data: one in the middle.
    let written: Vec<bool> = bytes.chunks(BLOCK).map(|block| block.iter().any(|byte| *byte != 0)).collect();
    let runs = written.split(|written| !written).map(|run| (run.len(), run.as_ptr()));
    let (length, start) = runs.max_by_key(|(length, _)| *length).unwrap();
    let block = (start as usize - written.as_ptr() as usize) + length / 2;
    file.write_all_at(&[bytes[block * BLOCK] ^ 1], (block * BLOCK) as u64).unwrap();
    started.send(b"go on\n");
    let ended = started.finish();
    assert_eq!(ended.text(), "written\ncat: read error: Input/output error\n1\n", "{ended}");
}

#[test]
fn the_drive_of_a_scratch_device_must_be_as_the_manifest_says() {
    let mut container = on_scratch("echo it runs", scratch(Protection::None, 64 << 20));
    container.manifest.scratch = Some(scratch(Protection::None, 128 << 20));
    check_refused(&container.finish(), "layers: drive 3 wrong_size");
    let tiny = on_scratch("echo it runs", scratch(Protection::Authenticated, 64 << 10));
    check_refused(&tiny.finish(), "scratch: format_failed");
}
