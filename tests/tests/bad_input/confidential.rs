//! Files for a protected domain, which are looked at wherever it is started.

use crate::table::{Table, hello};

#[test]
fn certificates_that_are_no_table() {
    let mut table = Table::new();
    let entry = |offset: u32, length: u32| {
        [&[0xab; 16][..], &offset.to_le_bytes(), &length.to_le_bytes(), &[0; 24]].concat()
    };
    let end = "its table of certificates has no end: 24 bytes of zeroes";
    let rows = [
        (table.path("missing"), "No such file or directory"),
        (table.directory("directory"), "Is a directory"),
        (table.file("empty", b""), end),
        (table.file("pem", b"-----BEGIN CERTIFICATE-----\n"), end),
        (table.file("nothing", &[0; 24]), "its table has no certificate"),
        (table.file("outside", &entry(48, 1)), "entry 0 of its table is of 0x1 bytes at 0x30"),
        (table.file("in the table", &entry(24, 24)), "entry 0 of its table is of 0x18 bytes at 0x18"),
        (table.sparse("large", (64 << 10) + 1), "it has more than 65536 bytes"),
        ("/dev/null".into(), end),
        ("fd:1".into(), "\"1\" is not a descriptor from 3 on"),
        ("fd:999".into(), "fd:999: no such descriptor is open"),
    ];
    for (path, reason) in rows {
        let run = hello().with("snp-certs", &path);
        table.refuses(&path.display().to_string(), run, &["confidential.snp.certs: ", reason]);
    }
    table.end();
}

#[test]
fn id_blocks_of_another_size() {
    let mut table = Table::new();
    let (block, authentication) = (table.file("block", &[0; 96]), table.file("auth", &[0; 4096]));
    for (name, size) in [("short block", 95), ("long block", 97)] {
        let bad = table.file(name, &vec![0; size]);
        let run = hello().with("snp-id-block", bad).with("snp-id-auth", &authentication);
        table.refuses(name, run, &["confidential.snp.id_block: ", "it has not 96 bytes"]);
    }
    for (name, size) in [("short authentication", 4095), ("long authentication", 4097)] {
        let bad = table.file(name, &vec![0; size]);
        let run = hello().with("snp-id-block", &block).with("snp-id-auth", bad);
        table.refuses(name, run, &["confidential.snp.id_auth: ", "it has not 4096 bytes"]);
    }
    // Opening a pipe would wait for somebody who writes to it, and serve nobody meanwhile.
    for (bad, reason) in [
        (table.path("missing"), "No such file or directory"),
        (table.directory("directory"), "not a regular file"),
        (table.fifo("pipe"), "not a regular file"),
        (table.file("empty", b""), "is empty"),
        ("/dev/zero".into(), "not a regular file"),
        ("fd:1".into(), "\"1\" is not a descriptor from 3 on"),
        ("fd:999".into(), "fd:999: no such descriptor is open"),
    ] {
        let row = bad.display().to_string();
        let run = hello().with("snp-id-block", &bad).with("snp-id-auth", &authentication);
        table.refuses(&row, run, &["confidential.snp.id_block: ", reason]);
        let run = hello().with("snp-id-block", &block).with("snp-id-auth", &bad);
        table.refuses(&row, run, &["confidential.snp.id_auth: ", reason]);
    }
    table.end();
}
