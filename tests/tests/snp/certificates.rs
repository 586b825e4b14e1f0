//! Certificates that come with an attestation report: what the guest gets, and when.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cofferdam_tests::run::send;
use cofferdam_tests::{Running, hex};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::{FdFlags, fcntl_setfd};
use sev::certs::snp::{Certificate, Chain, Verifiable};

use crate::domain::{Domain, succeeded};
use crate::evidence::{certificate, report};

/// GUIDs of the GHCB specification's table ("SNP Extended Guest Request"): the processor's own key, and who vouches for it.
const VCEK: u128 = 0x63da758d_e664_4564_adc5_f4b93be8accd;
const ASK: u128 = 0x4ab7b379_bbac_4fe4_a02f_05aef327c782;
const ARK: u128 = 0xc0b406a4_a803_4952_9743_3fb6014cd0ae;

/// A certificate table. Each entry is of 24 bytes, and 24 zeroes follow the last one.
fn table(certificates: &[(u128, Vec<u8>)]) -> Vec<u8> {
    let (mut entries, mut content) = (Vec::new(), Vec::new());
    let start = 24 * (certificates.len() + 1);
    for (guid, bytes) in certificates {
        entries.extend(guid.to_be_bytes());
        entries.extend(u32::try_from(start + content.len()).unwrap().to_le_bytes());
        entries.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        content.extend(bytes);
    }
    entries.extend([0; 24]);
    [entries, content].concat()
}

/// Those that vouch for this host's secure processor, and something that fills a second page.
fn chain() -> Vec<u8> {
    let of = |name| {
        let pem = certificate(&format!("{name}.pem"));
        Certificate::from_pem(&pem).unwrap().to_der().unwrap()
    };
    table(&[(VCEK, of("vcek")), (ASK, of("ask")), (ARK, of("ark")), (7, vec![0x5a; 5000])])
}

/// A guest that fetches a report with certificates, once it is told to, and the file that it gets them from.
fn asking(test: &str, certificates: &[u8]) -> (Domain, Running, PathBuf) {
    given_by(test, certificates, |path| path.into())
}

/// The same, with the file given in the words that `name` has for it.
fn given_by(
    test: &str,
    certificates: &[u8],
    name: impl FnOnce(&Path) -> OsString,
) -> (Domain, Running, PathBuf) {
    let domain = Domain::new(&format!("test={test} argument=0a"));
    let file = domain.guest.file("certificates");
    fs::write(&file, certificates).unwrap();
    let running = domain.run(2, "256M").with("snp-certs", name(&file)).start();
    running.wait_for("guest: type");
    (domain, running, file)
}

/// What the guest printed of its certificates.
fn given(console: &str) -> Vec<u8> {
    let digits = console.lines().find_map(|line| line.trim().strip_prefix("certificates")).unwrap().trim();
    let byte = |at| {
        let two: &str = &digits[at..at + 2];
        u8::from_str_radix(two, 16).unwrap_or_else(|_| panic!("{two:?} at {at} of {digits}"))
    };
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// The certificate of `guid` in a table.
fn find(table: &[u8], guid: u128) -> &[u8] {
    let entry = table.chunks(24).find(|entry| entry[..16] == guid.to_be_bytes()).unwrap();
    let number = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()) as usize;
    &table[number(16)..][..number(20)]
}

/// Locks or unlocks a file against everybody else, as a program that changes it does.
fn lock(file: &File, operation: FlockOperation) {
    fcntl_lock(file, operation).unwrap();
}

#[test]
fn a_guest_gets_them_with_its_report_and_hears_how_large_they_are() {
    let certificates = chain();
    let mut open = None;
    // For reading only, and by its descriptor.
    let (_domain, mut running, file) = given_by("certificates", &certificates, |path| {
        let file = open.insert(File::open(path).unwrap());
        fcntl_setfd(&*file, FdFlags::empty()).unwrap();
        format!("fd:{}", file.as_raw_fd()).into()
    });
    fs::remove_file(file).unwrap();
    send(running.stdin(), b"\n");
    let done = running.finish();
    succeeded(&done);
    let console = done.console();
    // It asked without room, with a page too few, and with enough.
    let pages = certificates.len().div_ceil(4096);
    let told = format!("guest: certificates take {} bytes", pages * 4096);
    assert_eq!(console.matches(&told).count(), 2, "{done}");
    let given = given(&console);
    assert_eq!(given[..certificates.len()], certificates);
    assert!(given[certificates.len()..].iter().all(|byte| *byte == 0));

    // They vouch for the report that they came with.
    let chain = Chain::from_der(find(&given, ARK), find(&given, ASK), find(&given, VCEK)).unwrap();
    chain.verify().unwrap();
    (&chain.vek, &report(&console)).verify().unwrap();
}

/// The firmware's keys may change, and the file with them: whoever does that locks it, and a guest waits.
#[test]
fn a_guest_waits_for_whoever_changes_the_file() {
    let (_domain, mut running, path) = asking("waiting", &chain());
    let file = File::options().read(true).write(true).open(&path).unwrap();
    lock(&file, FlockOperation::NonBlockingLockExclusive);
    send(running.stdin(), b"\n");
    running.wait_for("guest: waits");
    let changed = table(&[(VCEK, vec![0xc3; 100])]);
    file.write_all_at(&changed, 0).unwrap();
    file.set_len(changed.len() as u64).unwrap();
    lock(&file, FlockOperation::NonBlockingUnlock);
    let done = running.finish();
    succeeded(&done);
    assert_eq!(hex(&given(&done.console())[..changed.len()]), hex(&changed));
}

/// Garbage is no reason to end a domain: its guest gets no report, and may ask again.
#[test]
fn a_guest_that_cannot_be_given_any_is_told_so() {
    let (_domain, mut running, path) = asking("certificates", &chain());
    fs::write(&path, "-----BEGIN CERTIFICATE-----").unwrap();
    send(running.stdin(), b"\n");
    let done = running.finish();
    assert_eq!(done.code(), 1, "{done}");
    assert!(done.console().contains("VMM and firmware say 0xffffffff00000000"), "{done}");
    let trouble = "the guest gets no certificates with its report: its table of certificates has no end";
    assert_eq!(done.messages().matches(trouble).count(), 1, "{done}");
}

/// Without the option a guest gets its report all the same, and KVM's empty table.
#[test]
fn without_certificates_there_is_a_report() {
    let domain = Domain::new("test=certificates argument=0a");
    let mut running = domain.run(1, "256M").start();
    running.wait_for("guest: type");
    send(running.stdin(), b"\n");
    let done = running.finish();
    succeeded(&done);
    assert!(given(&done.console()).is_empty(), "{done}");
    report(&done.console());
}

#[test]
fn what_is_no_table_is_refused_before_the_start() {
    let domain = Domain::new("test=hello");
    let refused = |path: &Path| {
        let done = domain.run(1, "256M").with("snp-certs", path).finish();
        assert_eq!(done.code(), 125, "{done}");
        done.outcome().message
    };
    let file = domain.guest.file("certificates");
    fs::write(&file, table(&[(VCEK, vec![1; 10])])).unwrap();
    let open = File::options().read(true).write(true).open(&file).unwrap();
    lock(&open, FlockOperation::NonBlockingLockExclusive);
    let message = refused(&file);
    assert!(message.starts_with("confidential.snp.certs: "), "{message}");
    assert!(message.ends_with("it is locked: somebody changes it"), "{message}");
    drop(open);
    fs::write(&file, [0xab; 24]).unwrap();
    assert!(refused(&file).contains("has no end"));
}
