//! Kernel, initrd and command line.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cofferdam_tests::kernels::{self, BZ_IMAGE_CODE, Segment, bz_image, elf, patched};
use cofferdam_tests::{Run, place};

use crate::table::{Table, hello, without_privilege};

const KERNEL: &str = "boot-source.kernel_image_path: kernel ";
const INITRD: &str = "boot-source.initrd_path: initrd ";
const MEMORY: &str = "machine-config.mem_size_mib: ";
const MIB: u64 = 1 << 20;

/// A row for a kernel file at `path`: the message must name the field, the file and `reason`.
fn refuse_kernel(table: &mut Table, path: &Path, reason: &str) {
    let named = format!("{KERNEL}{}: {reason}", path.display());
    table.refuses(&named, Run::new(path), &[&named]);
}

fn refuse_initrd(table: &mut Table, path: &Path, reason: &str) {
    let named = format!("{INITRD}{}: {reason}", path.display());
    table.refuses(&named, hello().with("initrd", path), &[&named]);
}

/// A row for the bytes of a kernel.
fn refuse_bytes(table: &mut Table, row: &str, bytes: &[u8], reason: &str) {
    let path = table.file(row, bytes);
    refuse_kernel(table, &path, reason);
    fs::remove_file(path).unwrap();
}

/// A file that its owner may not read.
fn unreadable(table: &Table) -> std::path::PathBuf {
    let path = table.file("unreadable", b"secret");
    fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
    path
}

#[test]
fn files_that_are_no_kernel() {
    let mut table = Table::new();
    let (missing, empty) = (table.path("missing"), table.file("empty", b""));
    let (directory, fifo) = (table.directory("directory"), table.fifo("fifo"));
    refuse_kernel(&mut table, &missing, "cannot be opened: No such file or directory");
    refuse_kernel(&mut table, &empty, "is empty");
    refuse_kernel(&mut table, &directory, "not a regular file");
    refuse_kernel(&mut table, &fifo, "not a regular file");
    let mut state = 1_u32;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let noise: Vec<u8> = noise.take(100_000).collect();
    for (row, bytes) in [("a byte", &b"\x7f"[..]), ("text", b"#!/bin/sh\nexit 0\n"), ("noise", &noise)] {
        refuse_bytes(&mut table, row, bytes, "not a kernel: neither ELF nor bzImage");
    }
    table.end();
}

#[test]
fn kernel_or_initrd_that_may_not_be_read() {
    let mut table = Table::new();
    let path = unreadable(&table);
    let reason = format!("{}: cannot be opened: Permission denied", path.display());
    let kernel = Run::new(&path).wrapped(without_privilege());
    table.refuses("kernel", kernel, &[KERNEL, &reason]);
    let initrd = hello().with("initrd", &path).wrapped(without_privilege());
    table.refuses("initrd", initrd, &[INITRD, &reason]);
    table.end();
}

#[test]
fn a_truncated_elf() {
    let mut table = Table::new();
    let whole = fs::read(place::payload("hello")).unwrap();
    let end = kernels::loaded_end(&whole);
    let headers = 64 + 56 * usize::from(whole[56]);
    let cuts = [4, 16, 63, 64, headers - 1, headers, headers + 1, end / 4, end / 2, end - 4096, end - 1];
    for cut in cuts {
        let part = match cut {
            _ if cut < 64 => "header",
            _ if cut < headers => "program header table",
            _ => "segment",
        };
        let reason = format!("truncated ELF: its {part}");
        refuse_bytes(&mut table, &format!("cut at {cut}"), &whole[..cut], &reason);
    }
    let enough = table.file("enough", &whole[..end]);
    table.accepts("all that is loaded is there", Run::new(enough), 42);
    table.end();
}

#[test]
fn a_truncated_bz_image() {
    let mut table = Table::new();
    let whole = bz_image();
    for (cut, reason) in [
        (0x1ff, "not a kernel"),
        (0x205, "not a kernel"),
        (0x206, "truncated bzImage: its setup header"),
        (0x26b, "truncated bzImage: its setup header"),
        (0x26c, "truncated bzImage: its 64-bit entry"),
        (BZ_IMAGE_CODE, "truncated bzImage: its 64-bit entry"),
        (BZ_IMAGE_CODE + 0x200, "truncated bzImage: its 64-bit entry"),
        (BZ_IMAGE_CODE + 0x201, "truncated bzImage: its code"),
        (whole.len() - 1, "truncated bzImage: its code"),
    ] {
        refuse_bytes(&mut table, &format!("cut at {cut}"), &whole[..cut], reason);
    }
    let long_payload = patched(whole, 0x24c, &4097_u32.to_le_bytes());
    refuse_bytes(&mut table, "payload", &long_payload, "truncated bzImage: its compressed kernel");
    table.end();
}

#[test]
fn elf_files_for_something_else() {
    let mut table = Table::new();
    let whole = fs::read(place::payload("hello")).unwrap();
    for (row, offset, bytes, reason) in [
        ("32-bit", 4, &[1][..], "not a 64-bit little-endian ELF (class 1, data 1)"),
        ("big-endian", 5, &[2], "not a 64-bit little-endian ELF (class 2, data 2)"),
        ("arm64", 18, &[183, 0], "an ELF for machine 183, not for x86-64 (62)"),
        ("object file", 16, &[1, 0], "an ELF of type 1, not an executable"),
        ("odd program headers", 54, &[55, 0], "its program headers have 55 bytes each"),
        ("no program headers", 56, &[0, 0], "has 0 program headers"),
        ("too many program headers", 56, &[65, 0], "has 65 program headers"),
        ("headers behind the end", 32, &[0xff; 8], "truncated ELF: its program header table"),
    ] {
        refuse_bytes(&mut table, row, &patched(whole.clone(), offset, bytes), reason);
    }
    refuse_bytes(
        &mut table,
        "nothing to load",
        &elf(&[Segment { memory_size: 0, ..Segment::page(MIB) }]),
        "has no segment to load",
    );
    let entry_outside = patched(elf(&[Segment::page(MIB)]), 24, &(3 * MIB).to_le_bytes());
    refuse_bytes(&mut table, "entry outside", &entry_outside, "the entry point 0x300000 is in no segment");
    let no_pvh = table.file("no note", &elf(&[Segment::page(MIB)]));
    table.refuses("PVH", Run::new(no_pvh).with("boot-protocol", "pvh"), &[KERNEL, "offers no PVH entry"]);
    table.end();
}

#[test]
fn segments_that_overlap_or_lie_outside() {
    let mut table = Table::new();
    let overlapping = [Segment { memory_size: MIB + 1, ..Segment::page(MIB) }, Segment::page(2 * MIB)];
    refuse_bytes(&mut table, "overlap", &elf(&overlapping), "the segments at 0x100000 and 0x200000 overlap");
    for (row, address) in [
        ("low memory", MIB - 4096),
        ("the gap", 0xc000_0000),
        ("across the gap's start", 0xc000_0000 - 4095),
        ("across the end of the address space", u64::MAX - 4094),
    ] {
        let reason = format!("segment 0 at {address:#x}, 4096 bytes, is not between 0x100000 and 0xc0000000");
        refuse_bytes(&mut table, row, &elf(&[Segment::page(address)]), &reason);
    }
    let shrunk = Segment { memory_size: 4095, ..Segment::page(MIB) };
    refuse_bytes(
        &mut table,
        "file size",
        &elf(&[shrunk]),
        "segment 0 has 4096 bytes in the file but 4095 in memory",
    );
    let high = Segment { memory_size: 1 << 30, ..Segment::page(MIB) };
    refuse_bytes(&mut table, "out of the entry's reach", &elf(&[high]), "needs memory up to 0x40100000");
    table.end();
}

#[test]
fn bz_images_that_cannot_be_started() {
    let mut table = Table::new();
    for (row, offset, bytes, reason) in [
        ("old", 0x206, &[0x0b, 0x02][..], "speaks boot protocol 2.11"),
        ("zImage", 0x211, &[0], "is not made to be loaded high"),
        ("32-bit", 0x236, &[0], "has no 64-bit entry"),
        ("short header", 0x201, &[0x60], "its setup header ends at 0x262"),
        ("alignment", 0x230, &[3], "kernel_alignment 0x200003 is not a power of two"),
        ("in the gap", 0x258, &[0, 0, 0, 0xc0], "must be loaded at 0xc0000000"),
        ("too large", 0x260, &[0xff; 4], "needs memory up to"),
    ] {
        refuse_bytes(&mut table, row, &patched(bz_image(), offset, bytes), reason);
    }
    table.end();
}

#[test]
fn files_that_are_no_initrd() {
    let mut table = Table::new();
    let (missing, empty) = (table.path("missing"), table.file("empty", b""));
    let (directory, fifo) = (table.directory("directory"), table.fifo("fifo"));
    refuse_initrd(&mut table, &missing, "cannot be opened: No such file or directory");
    refuse_initrd(&mut table, &empty, "is empty");
    refuse_initrd(&mut table, &directory, "not a regular file");
    refuse_initrd(&mut table, &fifo, "not a regular file");
    table.end();
}

#[test]
fn kernel_and_initrd_that_do_not_fit() {
    let mut table = Table::new();
    let kernel = table.file("kernel", &elf(&[Segment { memory_size: 100 * MIB, ..Segment::page(MIB) }]));
    let run = |memory: &str| Run::new(&kernel).with("memory", memory);
    let reason = "64 MiB is too small: the kernel needs the first 101 MiB";
    table.refuses("the kernel in the memory", run("64M"), &[MEMORY, reason]);
    let initrd = table.sparse("initrd", 30 * MIB);
    let words =
        [MEMORY, "130 MiB is too small", "the first 101 MiB and the initrd 30 MiB, at least 131 MiB in all"];
    table.refuses("both in the memory", run("130M").with("initrd", &initrd), &words);
    let small = table.sparse("small", 50 * MIB);
    table.accepts("both fit", hello().with("initrd", small).with("memory", "52M"), 42);

    let huge = table.sparse("huge", 3 << 30);
    let reason = "3221225472 bytes are too many: the kernel ends at 0x6500000";
    table.refuses("any memory", run("8G").with("initrd", huge), &[INITRD, reason]);
    let overlapping = patched(bz_image(), 0x22c, &0x150_0000_u32.to_le_bytes());
    let overlapping = table.file("overlapping", &overlapping);
    let words = [INITRD, "the kernel ends at 0x1400000 and takes no initrd that reaches 0x1500001"];
    table.refuses("initrd over the kernel", Run::new(overlapping).with("initrd", &initrd), &words);
    table.end();
}

#[test]
fn a_command_line_that_is_too_long() {
    let mut table = Table::new();
    let line = "x".repeat(2049);
    let reason = "--cmdline: 2049 bytes long; at most 2048 are possible";
    table.refuses("2049 bytes", hello().with("cmdline", &line), &[reason]);
    let done = Run::new(place::payload("arguments")).with("cmdline", &line[..2048]).finish();
    assert_eq!(done.console(), format!("[{}]\n", &line[..2048]), "{done}");

    let kernel = table.file("bzImage", &bz_image());
    let words = ["boot-source.boot_args: ", "2048 bytes", "bzImage takes at most 2047"];
    table.refuses("the kernel's own limit", Run::new(kernel).with("cmdline", &line[..2048]), &words);

    let disk = table.sparse("disk", 4096);
    let mut spec = std::ffi::OsString::from("root,path=");
    spec.push(disk);
    let words = ["--cmdline: 2057 bytes long with the root device's \"root=/dev/vda rw\""];
    table.refuses("with the root device", hello().with("cmdline", &line[..2040]).with("drive", spec), &words);
    table.end();
}
