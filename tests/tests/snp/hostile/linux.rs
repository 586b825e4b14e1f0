//! The same with a Linux guest, which says by name what it finds.

use std::ops::Range;

use cofferdam_api::status::ExitReason;
use cofferdam_firmware::layout::MIB;
use cofferdam_tests::Finished;
use cofferdam_tests::run::send;
use cofferdam_tests::tamper::{Side, Tampering, What, When};

use super::{PROGRAM, ended};
use crate::domain::{Domain, succeeded};

/// Memory that a guest of 256 MiB has for programs and files: behind what the kernel keeps for itself.
const MOVABLE: Range<u64> = 128 * MIB..224 * MIB;

/// A guest that has filled memory under a host with a rule that waits for that. The guest goes on then, and fills more.
fn held(what: (When, What)) -> Finished {
    println!("{what:?}");
    let domain = Domain::new(&format!("test=hold argument={}", 32 * MIB));
    let tampering = Tampering::new(PROGRAM, [what]);
    let mut running = domain.run(1, "256M").wrapped(tampering.wrapper()).start();
    running.wait_for("guest: holds");
    tampering.tell();
    send(running.stdin(), b"\n");
    let done = running.finish();
    tampering.check();
    done
}

fn stopped_by_kernel(done: &Finished, message: &str) {
    ended(done, ExitReason::RefusedByGuest, 120, message);
    assert!(!done.console().contains("guest: all is right"), "{done}");
}

#[test]
fn a_kernel_stops_if_a_page_state_change_is_refused() {
    let message = "the guest's kernel stopped the domain: a page state change was refused";
    stopped_by_kernel(&held((When::Told(Side::Private), What::Refuse)), message);
}

/// Of a page that is not validated Linux says no more.
#[test]
fn a_kernel_stops_if_pages_were_taken_away() {
    stopped_by_kernel(
        &held((When::Now, What::TakeAway(MOVABLE))),
        "the guest stopped the domain: no reason given",
    );
}

#[test]
#[ignore = "long: make test-all"]
fn a_kernel_notices_whatever_its_host_does() {
    let right = held((When::Now, What::Note));
    succeeded(&right);
    assert!(right.console().contains("guest: all is right"), "{right}");
    succeeded(&held((When::Now, What::Fill(MOVABLE, 0xA5))));

    let message = "the guest's kernel stopped the domain: a page state change was refused";
    stopped_by_kernel(&held((When::Told(Side::Shared), What::Refuse)), message);
    let converted = held((When::Now, What::Convert(MOVABLE, Side::Shared)));
    stopped_by_kernel(&converted, "the guest stopped the domain: no reason given");
    // Its own handler of the exception is gone, too.
    ended(&held((When::Now, What::TakeAway(0..256 * MIB))), ExitReason::TripleFault, 122, "");
}
