//! Drives.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cofferdam_tests::{Run, place};
use rustix::process::Signal;

use crate::table::{Table, hello, without_privilege};

fn spec(path: &Path, more: &str) -> String {
    format!("path={}{more}", path.display())
}

/// A guest that does not end by itself, with the drive `spec`; it is running when this returns.
fn holder(spec: &str) -> cofferdam_tests::Running {
    let run = Run::new(place::payload("spin")).with("drive", spec).with("stop-timeout", "0s");
    let running = run.start();
    running.wait_for_message("not protected");
    running
}

#[test]
fn specifications_that_make_no_sense() {
    let mut table = Table::new();
    let disk = table.sparse("disk", 1 << 20);
    for (more, words) in [
        (",rw", "\"rw\" is none of path=FILE, ro, root"),
        (",ro=yes", "\"ro=yes\" is none of"),
        (",ro,ro", "ro is given twice"),
        (",iops=many", "iops=many: not a number of operations per second"),
        (",bandwidth=5Q", "bandwidth: \"5Q\" is not a size"),
        (",iops=0", "iops: must not be 0"),
        (",bandwidth=0", "bandwidth: must not be 0"),
        (",id=a.b", "--drive 1, id: \"a.b\" may only have letters"),
        (",id=", "--drive 1, id: is empty"),
    ] {
        table.refuses(more, hello().with("drive", spec(&disk, more)), &["--drive", words]);
    }
    table.refuses("no path", hello().with("drive", "ro"), &["--drive", "path= is missing"]);
    table.refuses("empty path", hello().with("drive", "path="), &["--drive 1, path: is empty"]);
    table.refuses("only a path", hello().with("drive", disk), &["--drive", "path=FILE"]);
    table.end();
}

#[test]
fn several_drives_that_do_not_go_together() {
    let mut table = Table::new();
    let (a, b) = (table.sparse("a", 4096), table.sparse("b", 4096));
    let two = |first: String, second: String| hello().with("drive", first).with("drive", second);
    let twice = two(spec(&a, ",id=x"), spec(&b, ",id=x"));
    table.refuses("an id twice", twice, &["--drive 2, id: \"x\" is used twice"]);
    let roots = two(spec(&a, ",root"), spec(&b, ",root"));
    table.refuses("two roots", roots, &["--drive 2, root: drive 1 is the root already"]);
    let words = ["drives[1].path_on_host: ", a.to_str().unwrap(), "another domain, drive or program"];
    table.refuses("a file twice", two(spec(&a, ""), spec(&a, "")), &words);
    table.refuses("a file twice, read-only first", two(spec(&a, ",ro"), spec(&a, "")), &words);
    table.accepts("a file twice, read-only", two(spec(&a, ",ro"), spec(&a, ",ro")), 42);
    let many = (0..65).fold(hello(), |run, _| run.with("drive", spec(&a, ",ro")));
    table.refuses("65 drives", many, &["--drive: 65 devices with the vsock device; at most 64 are possible"]);
    table.end();
}

#[test]
fn files_that_are_no_disk() {
    let mut table = Table::new();
    let kind = "neither a regular file nor a block device";
    for (path, reason) in [
        (table.path("missing"), "no such file"),
        (table.directory("directory"), kind),
        (table.fifo("fifo"), kind),
        ("/dev/zero".into(), kind),
        (table.file("empty", b""), "is empty"),
        (table.sparse("odd", 1000), "its 1000 bytes are not a multiple of the block size, 512"),
    ] {
        for more in ["", ",ro"] {
            let named = format!("drives[0].path_on_host: {}: {reason}", path.display());
            table.refuses(&named, hello().with("drive", spec(&path, more)), &[&named]);
        }
    }
    // The second of two is named as such.
    let good = table.sparse("good", 4096);
    let run = hello().with("drive", spec(&good, "")).with("drive", spec(&table.path("missing"), ""));
    table.refuses("the second one", run, &["drives[1].path_on_host: ", "missing: no such file"]);
    table.end();
}

#[test]
fn files_without_permission() {
    let mut table = Table::new();
    let disk = table.sparse("disk", 4096);
    for (mode, more, reason) in [
        (0o000, ",ro", "no permission to open it for reading"),
        (0o000, "", "no permission to open it for writing"),
        (0o400, "", "no permission to open it for writing"),
    ] {
        fs::set_permissions(&disk, Permissions::from_mode(mode)).unwrap();
        let run = hello().with("drive", spec(&disk, more)).wrapped(without_privilege());
        let named = format!("drives[0].path_on_host: {}: {reason}", disk.display());
        table.refuses(&format!("mode {mode:o}{more}"), run, &[&named]);
    }
    let run = hello().with("drive", spec(&disk, ",ro")).wrapped(without_privilege());
    table.accepts("reading is enough for a read-only drive", run, 42);
    table.end();
}

#[test]
fn a_drive_that_another_domain_has() {
    let mut table = Table::new();
    let disk = table.sparse("disk", 4096);
    let field = format!("drives[0].path_on_host: {}: locked: ", disk.display());

    let writer = holder(&spec(&disk, ""));
    let writes = "another domain, drive or program writes it";
    let uses = "another domain, drive or program uses it";
    table.refuses("a second writer", hello().with("drive", spec(&disk, "")), &[&field, uses]);
    table.refuses("a reader beside a writer", hello().with("drive", spec(&disk, ",ro")), &[&field, writes]);
    writer.signal(Signal::TERM);
    assert_eq!(writer.finish().code(), 143);

    let reader = holder(&spec(&disk, ",ro"));
    table.accepts("two readers", hello().with("drive", spec(&disk, ",ro")), 42);
    table.refuses("a writer beside a reader", hello().with("drive", spec(&disk, "")), &[&field, uses]);
    reader.signal(Signal::TERM);
    assert_eq!(reader.finish().code(), 143);
    table.accepts("a writer when all have gone", hello().with("drive", spec(&disk, "")), 42);
    table.end();
}
