//! A host that does not do what a launched guest asks, or does what it did not ask, by the shipped monitor under a tracer. The guest ends
//! by name, or comes to the host again and again with the same access, or nothing has happened to it. It never goes on with memory that is
//! not what it put there.
//!
//! Most guests here are payloads, which have no handler for the exception by which the processor tells of a page (#VC): it is
//! a triple fault there. What a Linux kernel makes of it is in [`linux`].

use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_firmware::layout::{MIB, PAGE_SIZE, SNP_GHCB};
use cofferdam_tests::host::page_faults;
use cofferdam_tests::image::Image;
use cofferdam_tests::run::send;
use cofferdam_tests::tamper::{Event, Side, Tampering, What, When};
use cofferdam_tests::{Finished, Run, Running, place};
use rustix::io::Errno;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::domain::{inspected, run, succeeded};
use crate::tampering::{refused, small_image};

mod launch;
mod linux;

const PROGRAM: &str = env!("CARGO_BIN_EXE_hostile-host");
/// So large that the monitor does not copy the image, but maps it for the first stage.
static INITRD: [u8; 2 << 20] = [42; 2 << 20];
/// Memory that the payload `holder` has filled.
const HELD: Range<u64> = 16 * MIB..24 * MIB;

/// An image of a payload, in a folder of its own.
struct Payload(TempDir);

impl Payload {
    fn new(name: &str, line: &str) -> Self {
        let payload = Self(tempfile::tempdir().unwrap());
        let kernel = fs::read(place::payload(name)).unwrap();
        Image { initrd: &INITRD, command_line: line, ..Image::of(kernel) }.write(&payload.image());
        payload
    }

    fn image(&self) -> PathBuf {
        self.0.path().join("domain.igvm")
    }

    fn run(&self) -> Run {
        run(&self.image(), 1).with("memory", "64M")
    }
}

/// How a domain ends.
fn ended(done: &Finished, reason: ExitReason, code: i32, message: &str) {
    assert_eq!((done.outcome().exit_reason, done.code()), (reason, code), "{done}");
    assert!(done.outcome().message.contains(message), "no {message:?} in {done}");
}

/// The small image's guest under a host with a rule, which is followed. (Its kernel cannot run with SNP.)
fn first_stage(when: When, what: What) -> (Finished, Vec<Event>) {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let tampering = Tampering::new(PROGRAM, [(when, what)]);
    let done = run(&image, 1).with("memory", "64M").wrapped(tampering.wrapper()).finish();
    tampering.check();
    (done, tampering.log())
}

#[test]
fn the_first_stage_ends_if_a_page_state_change_is_refused() {
    let low_memory = When::Change(Side::Private, PAGE_SIZE);
    let kernel = When::Change(Side::Private, 16 * MIB);
    let ghcb_taken = When::Change(Side::Shared, SNP_GHCB);
    let ghcb_given_back = When::Change(Side::Private, SNP_GHCB);
    for when in [low_memory, kernel, ghcb_taken, ghcb_given_back] {
        println!("{when:?}");
        refused(&first_stage(when, What::Refuse).0, "page state change refused");
    }
}

/// Says that it was done, and leaves the page where it was, for good.
#[test]
fn the_first_stage_does_not_go_on_without_the_pages_that_it_asked_for() {
    let payload = Payload::new("arguments", "quiet");
    // What is withheld with the second page begins with the first.
    for (page, first) in [(PAGE_SIZE, 0), (SNP_GHCB, SNP_GHCB)] {
        let rule = (When::Change(Side::Private, page), What::Withhold);
        let tampering = Tampering::new(PROGRAM, [rule]);
        let done = payload.run().wrapped(tampering.wrapper()).finish();
        assert!(tampering.log().contains(&Event::Insists), "{:?}", tampering.log());
        not_given(&done, first);
        assert_eq!(done.console(), "", "the kernel has not run");
    }
}

/// The page never came, however often the monitor asked for it.
fn not_given(done: &Finished, page: u64) {
    let message = format!(
        "the host does not give the guest the private page at {page:#x}: it was made private 1000 times"
    );
    ended(done, ExitReason::VcpuError, 122, &message);
}

/// What the first stage asks for, seen by its host: pages of RAM, none of the image's, none twice; and when the kernel is entered nothing is
/// shared any more.
#[test]
fn the_first_stage_asks_for_each_page_once_and_shares_none_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let image = small_image(&folder);
    let measured = image_pages(&inspected(&image));
    let (_, log) = first_stage(When::Launched, What::Note);
    let mut private: Vec<Range<u64>> = Vec::new();
    let mut shared: Vec<u64> = Vec::new();
    for event in log {
        match event {
            Event::Change(Side::Private, range) => {
                let ram = range.end <= 64 * MIB;
                assert!(ram && !measured.iter().any(|page| range.contains(page)), "{range:x?}");
                let apart = |other: &Range<u64>| other.end <= range.start || range.end <= other.start;
                assert!(private.iter().all(apart), "{range:x?} again");
                shared.retain(|page| !range.contains(page));
                private.push(range);
            }
            Event::Change(Side::Shared, range) => shared.extend(range.step_by(PAGE_SIZE as usize)),
            _ => {}
        }
    }
    assert!(private.len() > 5, "{private:x?}");
    assert_eq!(shared, [0; 0], "shared with the host when the kernel is entered");
}

/// Pages that an image brings into RAM.
fn image_pages(report: &Value) -> Vec<u64> {
    let items = report["items"].as_array().unwrap();
    let is_for_snp = |item: &&Value| item["platforms"].as_array().unwrap().iter().any(|name| name == "snp");
    let pages = items.iter().filter(is_for_snp).flat_map(|item| {
        let (start, size) = (item["gpa"].as_u64().unwrap_or(u64::MAX), item["size"].as_u64().unwrap());
        let is_content = item["type"] != "required_memory" && start < MIB;
        let size = if is_content { size } else { 0 };
        (0..size).step_by(PAGE_SIZE as usize).map(move |offset| start + offset)
    });
    let pages: Vec<u64> = pages.collect();
    assert!(pages.len() > 10, "{report:#}");
    pages
}

/// Where in an image the last byte of what its manifest names lies.
fn last_byte(image: &Path, name: &str) -> u64 {
    let item = &inspected(image)["manifest"][name];
    item["file_offset"].as_u64().unwrap() + item["size"].as_u64().unwrap() - 1
}

/// A rule that changes the file of the load window.
fn spoils(image: &Path, name: &str) -> What {
    What::WriteFile(image.to_owned(), last_byte(image, name), 0xFF)
}

/// The first stage accepts memory for the initrd when it has read all but that, and takes its GHCB back when it has read all.
#[test]
fn the_window_may_change_only_when_it_was_read() {
    let before = || When::Launched;
    let before_initrd = || When::Change(Side::Private, 63 * MIB);
    for (name, when, reason) in [
        ("kernel", before(), "kernel hash mismatch"),
        ("command_line", before(), "command line hash mismatch"),
        ("initrd", before(), "initrd hash mismatch"),
        ("initrd", before_initrd(), "initrd hash mismatch"),
    ] {
        println!("{name} {when:?}");
        let payload = Payload::new("arguments", "quiet");
        let image = payload.image();
        let tampering = Tampering::new(PROGRAM, [(when, spoils(&image, name))]);
        let done = payload.run().wrapped(tampering.wrapper()).finish();
        tampering.check();
        refused(&done, reason);
    }

    let payload = Payload::new("arguments", "quiet");
    let image = payload.image();
    let after = || When::Change(Side::Private, SNP_GHCB);
    let tampering = Tampering::new(
        PROGRAM,
        [
            (before_initrd(), spoils(&image, "kernel")),
            (before_initrd(), spoils(&image, "command_line")),
            (after(), spoils(&image, "initrd")),
        ],
    );
    let done = payload.run().wrapped(tampering.wrapper()).finish();
    tampering.check();
    succeeded(&done);
    assert!(done.console().contains(" quiet]"), "what was read is what runs: {done}");
}

/// The payload `holder` under a host with a rule that waits until the guest has filled its memory. The guest is told to go on then.
fn held(when: When, what: What) -> (Finished, Vec<Event>) {
    let (running, tampering) = told_to_go_on(when, what);
    (running.finish(), tampering.log())
}

fn told_to_go_on(when: When, what: What) -> (Running, Tampering) {
    println!("{when:?} {what:?}");
    let payload = Payload::new("holder", "quiet");
    let tampering = Tampering::new(PROGRAM, [(when, what)]);
    let mut running = payload.run().with("stop-timeout", "2").wrapped(tampering.wrapper()).start();
    running.wait_for("holds");
    tampering.tell();
    send(running.stdin(), b"x");
    (running, tampering)
}

#[test]
fn what_the_host_writes_behind_private_pages_is_not_in_them() {
    for what in [What::Note, What::Fill(HELD, 0xA5)] {
        let (done, log) = held(When::Now, what);
        succeeded(&done);
        assert!(done.console().contains("all is right"), "{done}");
        assert!(log.contains(&Event::Followed(0, None)), "{log:?}");
    }
}

/// The guest finds a page that it has never validated.
#[test]
fn a_guest_does_not_go_on_with_other_pages_than_its_own() {
    let last = HELD.end - PAGE_SIZE..HELD.end;
    for what in [What::TakeAway(HELD), What::TakeAway(last.clone()), What::Convert(last, Side::Shared)] {
        let (done, log) = held(When::Now, what);
        assert!(log.contains(&Event::Followed(0, None)), "{log:?}");
        ended(&done, ExitReason::TripleFault, 122, "");
        assert!(!done.console().contains("the same"), "{done}");
    }
}

/// The processor knows to which address a page belongs, and lets the guest use it nowhere else. KVM has the guest try again, and the monitor
/// does not hear of it: the guest does nothing else until it is stopped, and does not even hear that it should.
#[test]
fn a_guest_stands_still_whose_pages_change_places() {
    let (running, tampering) = told_to_go_on(When::Now, What::Exchange(HELD.start, 20 * MIB, 4 * MIB));
    tampering.check();
    let (before, end) = (page_faults(), Instant::now() + Duration::from_secs(240));
    while page_faults() < before + 1000 {
        assert!(Instant::now() < end, "{before} page faults of the guest, and no more");
        thread::sleep(Duration::from_millis(20));
    }
    running.signal(Signal::TERM);
    let done = running.finish();
    ended(&done, ExitReason::Stopped, 143, "the guest did not power off within");
    let console = done.console();
    assert!(console.trim_end().ends_with("holds"), "it says no more: {done}");
}

/// KVM itself has no page in two places. Where the second should be there is none then.
#[test]
fn a_page_cannot_be_in_two_places() {
    let (done, log) = held(When::Now, What::Double(HELD.start, 20 * MIB, 4 * MIB));
    let exists = io::Error::from(Errno::EXIST).to_string();
    assert!(log.contains(&Event::Followed(0, Some(exists))) && log.contains(&Event::Insists), "{log:?}");
    not_given(&done, 20 * MIB);
    assert!(!done.console().contains("the same"), "{done}");
}

#[test]
fn a_guest_hears_of_a_refusal() {
    for side in [Side::Private, Side::Shared] {
        let (done, log) = held(When::Told(side), What::Refuse);
        assert!(log.contains(&Event::Followed(0, None)), "{log:?}");
        ended(&done, ExitReason::PowerOff, 99, "");
        assert!(done.console().contains(&format!("pages do not become {side:?}")), "{done}");
    }
}

#[test]
fn a_guest_does_not_go_on_without_the_pages_that_it_asked_for() {
    let (done, log) = held(When::Told(Side::Private), What::Withhold);
    assert!(log.contains(&Event::Insists), "{log:?}");
    not_given(&done, 32 * MIB);
    assert!(!done.console().contains("all is right"), "{done}");
}

/// A guest can put queues and buffers where its devices must not look.
#[test]
fn a_device_whose_queue_or_buffer_is_private_needs_a_reset() {
    let payload = Payload::new("hostile-private", "quiet");
    let folder = payload.0.path();
    fs::write(folder.join("drive"), vec![0xA1; 1 << 20]).unwrap();
    let mut drive = OsString::from("path=");
    drive.push(folder.join("drive"));
    let done = payload.run().with("drive", drive).with("vsock", folder.join("v")).finish();
    succeeded(&done);
    assert_eq!(done.console().matches(": refused").count(), 9, "{done}");
    assert!(done.console().contains("the drive works"), "{done}");
}
