//! Side by side with stock QEMU, which starts its guests through OVMF, on the same host.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam_tests::snp::Log;
use xtask::ovmf::Peer;

use crate::domain::{ACTIVE, Domain, succeeded};

const GREETING: &str = "guest: kernel";

#[test]
#[ignore = "long, and fetches QEMU and OVMF: make test-all"]
fn qemu_with_ovmf_needs_a_hundred_times_as_many_pages() {
    let domain = Domain::new("test=hello");
    let log = Log::from_now_on();
    let ours = {
        let start = Instant::now();
        let running = domain.run(1, "512M").start();
        running.wait_for(GREETING);
        let time = start.elapsed();
        succeeded(&running.finish());
        time
    };
    let peer = Peer::from_environment().expect("`cargo xtask snp-tests --long` fetches it");
    let theirs = user_space(peer.snp_guest(), &domain);
    let line =
        format!("exec to user space: {} ms, QEMU with OVMF {} ms", ours.as_millis(), theirs.as_millis());
    writeln!(io::stderr(), "{line}").unwrap();
    let Some(log) = log else { return };
    let launches = log.launches();
    let [our, their] = launches.as_slice() else { panic!("{launches:?}") };
    writeln!(io::stderr(), "pages: {}, QEMU with OVMF {}", our.pages(), their.pages()).unwrap();
    assert!(our.pages() <= 13 && their.pages() > 1000, "{launches:?}");
}

/// How long QEMU takes from its start until the guest greets.
fn user_space(mut qemu: Command, domain: &Domain) -> Duration {
    qemu.args([
        "-m",
        "512",
        "-smp",
        "1",
        "-serial",
        "stdio",
        "-append",
        "console=ttyS0 panic=-1 quiet test=hello",
    ]);
    qemu.arg("-kernel").arg(&domain.guest.assets().guest_kernel);
    qemu.arg("-initrd").arg(domain.guest.file("initrd"));
    let start = Instant::now();
    let mut child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut console = Vec::new();
    let mut time = None;
    for line in BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
        if line.contains(GREETING) {
            time = Some(start.elapsed());
        }
        console.push(line);
    }
    let status = child.wait().unwrap();
    let console = console.join("\n");
    assert!(status.success() && console.contains(ACTIVE), "{status}: {console}");
    time.unwrap_or_else(|| panic!("no greeting: {console}"))
}
