//! `cofferdam image build` and `cofferdam image inspect`, as a person or a program uses them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests fail by panicking

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A file that begins as a bzImage does.
fn kernel() -> Vec<u8> {
    let mut kernel: Vec<u8> = (0..70_001_u32).map(|index| (index % 251) as u8).collect();
    kernel[..0x400].fill(0);
    let mut put = |offset: usize, bytes: &[u8]| kernel[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x201, b"\x6aHdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 0, 1, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    kernel
}

/// A folder with the files `k` and `i`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("k"), kernel()).unwrap();
    fs::write(folder.path().join("i"), vec![3; 10_000]).unwrap();
    folder
}

fn image(folder: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cofferdam"))
        .arg("image")
        .args(words)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// What a good command prints.
fn good(folder: &Path, words: &[&str]) -> String {
    let output = image(folder, words);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && errors.is_empty(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a bad command says. It always ends with 125.
fn bad(folder: &Path, words: &[&str]) -> String {
    let output = image(folder, words);
    assert_eq!(output.status.code(), Some(125), "{words:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

fn inspected(folder: &Path, file: &str) -> Value {
    serde_json::from_str(&good(folder, &["inspect", file, "--json"])).unwrap()
}

const BUILD: [&str; 9] =
    ["build", "--kernel", "k", "--initrd", "i", "--cmdline", "console=ttyS0 quiet", "-o", "d.igvm"];

#[test]
fn the_same_inputs_give_the_same_file_wherever_they_are() {
    let (here, there) = (folder(), tempfile::tempdir().unwrap());
    let printed = good(here.path(), &BUILD);
    // Other names, another place, the platforms in another order.
    let kernel = here.path().join("k");
    let initrd = there.path().join("a longer name of the initrd");
    fs::copy(here.path().join("i"), &initrd).unwrap();
    let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
    let words = [
        "build",
        "--output",
        "e",
        "--initrd",
        initrd,
        "--platforms",
        "tdx,plain,snp",
        "--kernel",
        kernel,
        "--cmdline",
        "console=ttyS0 quiet",
        "--max-cpus",
        "32",
        "--max-memory",
        "64G",
        "--policy",
        "snp=0x30000,tdx=2",
    ];
    good(there.path(), &words);
    let file = fs::read(here.path().join("d.igvm")).unwrap();
    assert!(file == fs::read(there.path().join("e")).unwrap());
    let report = inspected(here.path(), "d.igvm");
    let hash = report["sha256"].as_str().unwrap();
    assert_eq!(printed, format!("d.igvm: {} bytes, SHA-256 {hash}\n", file.len()));
}

#[test]
fn what_was_asked_for_is_in_it() {
    let folder = folder();
    good(
        folder.path(),
        &[
            "build",
            "--kernel",
            "k",
            "--max-cpus",
            "4",
            "--max-memory",
            "2G",
            "--platforms",
            "snp,tdx",
            "--policy",
            "snp=0x130000",
            "--policy",
            "tdx=3,host-data",
            "-o",
            "d.igvm",
        ],
    );
    let report = inspected(folder.path(), "d.igvm");
    let platforms: Vec<_> = report["platforms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| json!([it["platform"], it["policy"]]))
        .collect();
    assert_eq!(platforms, [json!(["snp", "0x130000"]), json!(["tdx", "0x3"])]);
    let manifest = &report["manifest"];
    assert_eq!((&manifest["max_cpus"], &manifest["max_memory"]), (&json!(4), &json!(2_u64 << 30)));
    assert_eq!((&manifest["host_data"], &manifest["initrd"]), (&json!(true), &json!(null)));
    assert_eq!(manifest["kernel"]["size"], json!(kernel().len()));
    // The command line of `cofferdam run`.
    assert!(manifest["command_line_text"].as_str().unwrap().starts_with("console=ttyS0 reboot=a"));
    assert!(report["measured_pages"]["snp"].as_u64().unwrap() <= 13);
    assert_eq!(report["problem"], json!(null));
    let text = good(folder.path(), &["inspect", "d.igvm"]);
    for part in
        ["snp       0x2   0x130000", "host data", "bzimage, up to 4 CPUs, 32 to 2048 MiB", "  yes     "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn what_cannot_be_done_leaves_no_file_and_the_old_one_alone() {
    let folder = folder();
    let path = folder.path();
    fs::write(path.join("text"), "no kernel").unwrap();
    fs::write(path.join("d.igvm"), "old").unwrap();
    for (words, message) in [
        (vec!["build", "--kernel", "nothing", "-o", "d.igvm"], "cannot read nothing: No such file"),
        (vec!["build", "--kernel", "text", "-o", "d.igvm"], "kernel: neither ELF nor bzImage"),
        (vec!["build", "--kernel", "k", "--initrd", "j", "-o", "d.igvm"], "cannot read j: "),
        (vec!["build", "--kernel", "k", "--max-memory", "16M", "-o", "d.igvm"], "need 32 MiB of memory"),
        (vec!["build", "--kernel", "k", "--max-memory", "65G", "-o", "d.igvm"], "launch manifest: memory"),
        (vec!["build", "--kernel", "k", "--policy", "snp=0", "-o", "d.igvm"], "policy of snp: bit 17"),
        (vec!["build", "--kernel", "k", "-o", "no/d.igvm"], "cannot write no/d.igvm: No such file"),
        (vec!["build", "--kernel", "k", "-o", ".."], "cannot write ..: "),
        (vec!["build", "--kernel", "k", "--max-cpus", "33", "-o", "d.igvm"], "33 is not in 1..=32"),
        (vec!["build", "--kernel", "k", "--max-cpus", "0", "-o", "d.igvm"], "0 is not in 1..=32"),
        (vec!["build", "--kernel", "k", "--platforms", "cca", "-o", "d.igvm"], "not plain, snp or tdx"),
        (
            vec!["build", "--kernel", "k", "--policy", "plain=1", "-o", "d.igvm"],
            "not snp=N, tdx=N, host-data or accept-all",
        ),
        (vec!["build", "--kernel", "k"], "--output <FILE>"),
        (vec!["inspect", "nothing"], "cannot read nothing: No such file"),
        (vec!["inspect", "k"], "k: not an IGVM file: its magic number"),
    ] {
        let said = bad(path, &words);
        assert!(said.contains(message), "{words:?}: {said}");
    }
    assert_eq!(fs::read(path.join("d.igvm")).unwrap(), b"old");
    let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["d.igvm", "i", "k", "text"]);
}

#[test]
fn damage_is_seen() {
    let folder = folder();
    let path = folder.path().join("d.igvm");
    good(folder.path(), &BUILD);
    let file = fs::read(&path).unwrap();
    let offset =
        inspected(folder.path(), "d.igvm")["manifest"]["initrd"]["file_offset"].as_u64().unwrap() as usize;

    let mut altered = file.clone();
    altered[offset] ^= 1;
    fs::write(&path, altered).unwrap();
    let manifest = &inspected(folder.path(), "d.igvm")["manifest"];
    assert_eq!(json!([manifest["kernel"]["intact"], manifest["initrd"]["intact"]]), json!([true, false]));

    fs::write(&path, &file[..file.len() - 1]).unwrap();
    let size = file.len();
    let said = bad(folder.path(), &["inspect", "d.igvm"]);
    let expected =
        format!("d.igvm: the header says {size} bytes (at file offset 16), the file has {}", size - 1);
    assert!(said.contains(&expected), "{said}");

    // The type of the first directive, behind 3 platforms and 2 policies; the checksum is the file's first guard.
    let mut altered = file;
    altered[32 + 5 * 24] ^= 0x40;
    fs::write(&path, altered).unwrap();
    assert!(bad(folder.path(), &["inspect", "d.igvm"]).contains("the checksum of the headers is"));
}
