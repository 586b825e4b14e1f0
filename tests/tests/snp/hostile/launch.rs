//! A host that does the launch in another way than it is asked to, or says so.

use std::ops::Range;

use cofferdam_api::status::ExitReason;
use cofferdam_firmware::layout::{PAGE_SIZE, SNP_CPUID, STAGE};
use cofferdam_tests::Finished;
use cofferdam_tests::snp::Log;
use cofferdam_tests::tamper::{Event, Tampering, What, When};

use super::{PROGRAM, Payload, ended};
use crate::domain::{measured, succeeded};

/// "Thermal and Power Management"; of EAX KVM supports one bit, and the firmware takes no other.
const POWER: u32 = 6;
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// What a host may claim all the same.
const TURBO: u32 = 1 << 1;

/// A launch under a host with rules, each of which is followed; and what the log says of it.
fn launched(rules: impl IntoIterator<Item = (When, What)>) -> (Finished, Vec<Event>) {
    let payload = Payload::new("arguments", "quiet");
    let tampering = Tampering::new(PROGRAM, rules);
    let log = Log::from_now_on();
    let done = payload.run().wrapped(tampering.wrapper()).finish();
    println!("{done}");
    tampering.check();
    if done.code() == 0 {
        succeeded(&done);
        assert!(done.console().contains(" quiet]"), "{done}");
        let expected = measured(&payload.image(), 1);
        assert_eq!(done.outcome().identity.digest.as_ref(), Some(&expected), "{done}");
        if let Some(log) = log {
            let digests: Vec<String> = log.launches().into_iter().map(|launch| launch.digest).collect();
            assert_eq!(digests, [expected], "the secure processor's log");
        }
    }
    (done, tampering.log())
}

/// Checks that there was no launch, and that the message says why.
fn not_launched(done: &Finished, reason: &str) {
    ended(done, ExitReason::LaunchRefused, 123, reason);
    assert_eq!((done.outcome().protected, done.outcome().identity.digest), (false, None), "{done}");
}

fn claims(value: u32) -> What {
    What::Cpuid { leaf: POWER, register: 0, value }
}

const CLAIMED: &str = "leaf 0x6, subleaf 0x0, EAX: 0x6 given, 0x4 accepted";

/// What the host says is not in the digest, and so neither is what the firmware makes of it.
#[test]
fn a_cpuid_page_that_the_firmware_refuses_is_given_to_it_once_more_as_it_wants_it() {
    let (done, log) = launched([(When::Supported, claims(ALWAYS_RUNNING_TIMER | TURBO))]);
    succeeded(&done);
    let words = format!("the secure processor changed the CPUID page at {SNP_CPUID:#x}: {CLAIMED}");
    assert_eq!(done.messages().matches(&words).count(), 1, "{done}");
    let page = Event::HandOver(SNP_CPUID..SNP_CPUID + PAGE_SIZE);
    assert_eq!(log.iter().filter(|event| **event == page).count(), 2, "{log:?}");
}

#[test]
fn a_cpuid_page_that_the_firmware_refuses_twice_ends_the_launch() {
    let (done, log) = launched([
        (When::Supported, claims(ALWAYS_RUNNING_TIMER | TURBO)),
        (When::HandOver(SNP_CPUID, 1), claims(TURBO)),
    ]);
    let words = format!("the secure processor refuses the CPUID page at {SNP_CPUID:#x} twice: {CLAIMED}");
    let second = "and then: leaf 0x6, subleaf 0x0, EAX: 0x4 given, 0x0 accepted";
    not_launched(&done, &format!("{words}; {second}"));
    let page = Event::HandOver(SNP_CPUID..SNP_CPUID + PAGE_SIZE);
    assert_eq!(log.iter().filter(|event| **event == page).count(), 2, "{log:?}");
}

/// What was handed over from the first stage's address on, in the order in which it was.
fn of_stage(log: &[Event]) -> Vec<Range<u64>> {
    let ranges = log.iter().filter_map(|event| match event {
        Event::HandOver(range) if (STAGE..STAGE + 8 * PAGE_SIZE).contains(&range.start) => {
            Some(range.clone())
        }
        _ => None,
    });
    ranges.collect()
}

#[test]
fn a_launch_goes_on_where_kvm_has_stopped() {
    let second = STAGE + PAGE_SIZE;
    let (done, log) = launched([
        (When::HandOver(STAGE, 0), What::HandOverPart(PAGE_SIZE)),
        (When::HandOver(second, 0), What::Fail(libc::EAGAIN)),
        (When::HandOver(second, 1), What::Fail(libc::EINTR)),
        (When::HandOver(second, 2), What::HandOverPart(PAGE_SIZE)),
    ]);
    succeeded(&done);
    let handed_over = of_stage(&log);
    let end = handed_over[0].end;
    let from = |start: u64| start..end;
    let expected = [STAGE, second, second, second, second + PAGE_SIZE].map(from);
    assert_eq!(handed_over, expected);
}

#[test]
fn a_launch_ends_if_kvm_says_what_cannot_be() {
    for left in [u64::MAX, 1 << 40, 1] {
        let (done, log) = launched([(When::HandOver(STAGE, 0), What::ClaimLeft(left))]);
        let [all] = of_stage(&log).try_into().unwrap();
        not_launched(
            &done,
            &format!("KVM_SEV_SNP_LAUNCH_UPDATE of {:#x} bytes at {STAGE:#x}", all.end - all.start),
        );
        assert!(done.outcome().message.contains(&format!("KVM says that {left:#x} bytes at ")), "{done}");
    }
    let (done, _) = launched([(When::HandOver(STAGE, 0), What::Fail(libc::EIO))]);
    not_launched(&done, "(os error 5)");
}
