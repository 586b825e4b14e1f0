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

/// What a kernel needs for containers, as `modules.builtin` and `modules.builtin.modinfo` say it of one that has all built in.
const BUILT_IN: [&str; 12] = [
    "pvpanic-mmio",
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "dm-verity",
    "erofs",
    "overlay",
    "dm-crypt",
    "dm-integrity",
    "ext4",
    "sev-guest",
    "tdx-guest",
];
const ALGORITHMS: [&str; 8] = ["sha256", "aes", "xts", "hmac", "authenc", "ctr", "ghash", "gcm"];

fn information(algorithms: &[&str]) -> String {
    algorithms.iter().map(|name| format!("a.alias=crypto-{name}\0")).collect()
}

/// A program that asks for no dynamic linker, as far as its headers say.
fn static_program() -> Vec<u8> {
    let mut program = vec![0; 0x78];
    program[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (program[0x12], program[0x20], program[0x36], program[0x38], program[0x40]) = (62, 0x40, 56, 1, 1);
    program
}

/// The command with its init, and a kernel package that was unpacked.
struct Installed(TempDir);

impl Installed {
    fn new() -> Self {
        let this = Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        for folder in ["bin", "lib/cofferdam", "boot", "lib/modules/6.12.9-test"] {
            fs::create_dir_all(this.path(folder)).unwrap();
        }
        // A copy that is being written cannot be started, as long as a child of another test's has it open.
        fs::hard_link(env!("CARGO_BIN_EXE_cofferdam"), this.path("bin/cofferdam")).unwrap();
        fs::write(this.path("lib/cofferdam/cofferdam-init"), static_program()).unwrap();
        let mut kernel = kernel();
        kernel[0x20e..0x210].copy_from_slice(&0x200_u16.to_le_bytes());
        kernel[0x400..0x40e].copy_from_slice(b"6.12.9-test (x");
        fs::write(this.path("boot/vmlinuz"), kernel).unwrap();
        this.built_in(&BUILT_IN, "lib/modules/6.12.9-test");
        this
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn built_in(&self, names: &[&str], folder: &str) {
        fs::create_dir_all(self.path(folder)).unwrap();
        let list: String = names.iter().map(|name| format!("kernel/x/{name}.ko\n")).collect();
        fs::write(self.path(folder).join("modules.builtin"), list).unwrap();
        fs::write(self.path(folder).join("modules.builtin.modinfo"), information(&ALGORITHMS)).unwrap();
    }

    fn build(&self, words: &[&str]) -> Output {
        Command::new(self.path("bin/cofferdam"))
            .args(["image", "build", "--kernel", "boot/vmlinuz"])
            .args(words)
            .env("XDG_DATA_HOME", self.path("share"))
            .current_dir(&self.0)
            .output()
            .unwrap()
    }

    fn good(&self, words: &[&str]) {
        let output = self.build(words);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn refused(&self, words: &[&str]) -> String {
        let output = self.build(words);
        assert_eq!(output.status.code(), Some(125), "{words:?}");
        assert!(!self.path("d.igvm").exists());
        let place = self.0.path().canonicalize().unwrap().display().to_string();
        String::from_utf8(output.stderr).unwrap().replace(&place, "PLACE")
    }
}

#[test]
fn the_image_of_containers() {
    let installed = Installed::new();
    installed.good(&["--init"]);
    let path = installed.path("share/cofferdam/domain.igvm");
    let report = inspected(&installed.path(""), path.to_str().unwrap());
    assert_eq!(report["manifest"]["host_data"], json!(true));
    let line = report["manifest"]["command_line_text"].as_str().unwrap();
    assert!(line.contains("quiet") && line.contains("panic=-1"), "{line}");
    // A folder, the init, an empty list: the very bytes.
    let offset = report["manifest"]["initrd"]["file_offset"].as_u64().unwrap() as usize;
    let size = report["manifest"]["initrd"]["size"].as_u64().unwrap() as usize;
    let initrd = fs::read(&path).unwrap()[offset..offset + size].to_vec();
    let text: String = initrd.iter().map(|byte| char::from(*byte)).collect();
    let names: Vec<&str> =
        text.split("070701").skip(1).map(|entry| entry[104..].split('\0').next().unwrap()).collect();
    assert_eq!(names, ["init", "modules", "modules/order", "TRAILER!!!"]);
    assert!(initrd.windows(0x78).any(|window| window == static_program()));

    // The same with everything named, and the init beside the command.
    fs::rename(installed.path("lib/cofferdam/cofferdam-init"), installed.path("bin/cofferdam-init")).unwrap();
    fs::rename(installed.path("lib/modules/6.12.9-test"), installed.path("m")).unwrap();
    installed.good(&["--init", "--modules", "m", "--cmdline", line, "-o", "d.igvm"]);
    assert!(fs::read(installed.path("d.igvm")).unwrap() == fs::read(path).unwrap());
}

#[test]
fn what_an_image_of_containers_lacks_is_named() {
    let installed = Installed::new();
    let words = ["--init", "-o", "d.igvm"];
    let without = |name: &str| {
        let names: Vec<&str> = BUILT_IN.into_iter().filter(|other| *other != name).collect();
        installed.built_in(&names, "m");
    };
    for name in BUILT_IN {
        without(name);
        let said = installed.refused(&["--init", "--modules", "m", "-o", "d.igvm"]);
        let expected =
            format!("the module {} is neither in m nor built into the kernel", name.replace('-', "_"));
        assert!(said.contains(&expected), "{said}");
    }
    without("sev-guest");
    let plain = ["--init", "--modules", "m", "--platforms", "plain,tdx", "-o", "e.igvm"];
    installed.good(&plain);
    // gcm is among what only SNP needs, and the last.
    fs::write(installed.path("m/modules.builtin.modinfo"), information(&ALGORITHMS[..7])).unwrap();
    installed.good(&plain);
    for count in 0..5 {
        fs::write(installed.path("m/modules.builtin.modinfo"), information(&ALGORITHMS[..count])).unwrap();
        let expected = format!("no module in m has the algorithm {}", ALGORITHMS[count]);
        assert!(installed.refused(&plain).contains(&expected), "{expected}");
    }

    fs::rename(installed.path("lib/modules"), installed.path("elsewhere")).unwrap();
    let said = installed.refused(&words);
    let expected = "the modules of the kernel 6.12.9-test are not in PLACE/boot or \
                    PLACE/lib/modules/6.12.9-test or PLACE/usr/lib/modules/6.12.9-test or \
                    /lib/modules/6.12.9-test: say where they are with --modules";
    assert!(said.contains(expected), "{said}");
    fs::write(installed.path("boot/vmlinuz"), kernel()).unwrap();
    assert!(installed.refused(&words).contains("boot/vmlinuz: the kernel's version is not in it"));

    let mut dynamic = static_program();
    dynamic[0x40] = 3;
    fs::write(installed.path("lib/cofferdam/cofferdam-init"), dynamic).unwrap();
    assert!(installed.refused(&words).contains("cofferdam-init is no static program for x86-64"));
    fs::remove_file(installed.path("lib/cofferdam/cofferdam-init")).unwrap();
    let said = installed.refused(&words);
    assert!(
        said.contains("is neither PLACE/bin/cofferdam-init nor PLACE/lib/cofferdam/cofferdam-init"),
        "{said}"
    );

    assert!(installed.refused(&["--init", "--initrd", "i", "-o", "d.igvm"]).contains("cannot be used with"));
    assert!(installed.refused(&["--modules", "m", "-o", "d.igvm"]).contains("--init"));
}
