//! What a verifier sees: the report that the guest fetched, against what its owner knows.

use std::env;
use std::fs;
use std::path::PathBuf;

use cofferdam_tests::hex;
use cofferdam_tests::snp::Log;
use sev::certs::snp::builtin::genoa;
use sev::certs::snp::{Chain, Verifiable, ca};
use sev::firmware::guest::AttestationReport;
use sev::parser::ByteParser;
use xtask::rig;

use crate::domain::{ACTIVE, Domain, signed, succeeded};

/// One of the certificates that vouch for the host's secure processor.
pub fn certificate(name: &str) -> Vec<u8> {
    let folder = env::var_os(rig::CERTIFICATES).map(PathBuf::from);
    let folder =
        folder.expect("COFFERDAM_SNP_CERTIFICATES names a folder with ark.pem, ask.pem and vcek.pem");
    fs::read(folder.join(name)).unwrap()
}

/// All of them.
fn chain() -> Chain {
    let of = |name| certificate(&format!("{name}.pem"));
    Chain::from_pem(&of("ark"), &of("ask"), &of("vcek")).unwrap()
}

/// The report on a guest's console.
pub fn report(console: &str) -> AttestationReport {
    let line = console.lines().find_map(|line| line.trim().strip_prefix("report ")).unwrap();
    let bytes: Vec<u8> =
        (0..line.len()).step_by(2).map(|at| u8::from_str_radix(&line[at..at + 2], 16).unwrap()).collect();
    AttestationReport::from_bytes(&bytes).unwrap()
}

#[test]
fn three_digests_are_equal_and_the_report_is_the_platforms() {
    let nonce: Vec<u8> = (0..64).map(|byte| byte * 3 + 1).collect();
    let host_data: Vec<u8> = (0..32).map(|byte| 0xf0 ^ byte).collect();
    let words = format!("test=report argument={}", hex(&nonce));
    let domain = Domain::with(&words, &["--policy", "host-data"]);
    let expected = domain.measured(2);
    let (block, authentication) = signed(&domain.image, 2);
    let log = Log::from_now_on();
    let run = domain.run(2, "512M").with("host-data", hex(&host_data));
    let done = run.with("snp-id-block", block).with("snp-id-auth", authentication).finish();
    succeeded(&done);
    assert!(done.console().contains(ACTIVE), "{done}");

    let report = report(&done.console());
    assert_eq!(hex(&report.measurement[..]), expected);
    assert_eq!(done.outcome().identity.digest.as_ref(), Some(&expected), "{done}");
    if let Some(log) = log {
        let digests: Vec<String> = log.launches().into_iter().map(|launch| launch.digest).collect();
        assert_eq!(digests, [expected], "the secure processor's log");
    }
    assert_eq!(report.report_data[..], nonce);
    assert_eq!(report.host_data[..], host_data);
    assert_eq!((u64::from(report.policy), report.vmpl), (0x30000, 0));
    assert_ne!(hex(&report.id_key_digest[..]), hex(&[0; 48]), "the ID block's key");

    let chain = chain();
    chain.verify().unwrap();
    (&chain.vek, &report).verify().unwrap();
    let mut other = report;
    other.measurement[0] ^= 1;
    (&chain.vek, &other).verify().unwrap_err();
}

/// Who pins AMD's roots is not taken in by test keys.
#[test]
fn amds_own_roots_do_not_vouch_for_an_emulated_processor() {
    if !rig::inside() {
        println!("this is hardware: AMD's roots should vouch for it");
        return;
    }
    let amd = ca::Chain { ark: genoa::ark().unwrap(), ask: genoa::ask().unwrap() };
    amd.verify().unwrap();
    Chain { ca: amd, vek: chain().vek }.verify().unwrap_err();
}
