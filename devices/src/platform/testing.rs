//! What the tests of the small devices share.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::GuestRequests;
use crate::bus::BusDevice;
use crate::interrupt::InterruptLine;

/// A guest's request, as it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    PowerOff,
    Reset,
    Panicked,
    ExitCode(u8),
    UserSpace,
    Refused(u8),
    Step(u32),
}

/// Notes the guest's requests.
#[derive(Default)]
pub struct Requests(Mutex<Vec<Request>>);

impl Requests {
    /// The requests since the last call.
    pub fn take(&self) -> Vec<Request> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn note(&self, request: Request) {
        self.0.lock().unwrap().push(request);
    }
}

impl GuestRequests for Requests {
    fn power_off(&self) {
        self.note(Request::PowerOff);
    }
    fn reset(&self) {
        self.note(Request::Reset);
    }
    fn panicked(&self) {
        self.note(Request::Panicked);
    }
    fn exit_code(&self, code: u8) {
        self.note(Request::ExitCode(code));
    }
    fn user_space(&self) {
        self.note(Request::UserSpace);
    }
    fn refused(&self, reason: u8) {
        self.note(Request::Refused(reason));
    }
    fn step(&self, report: u32) {
        self.note(Request::Step(report));
    }
}

/// Counts the edges on a line.
#[derive(Default)]
pub struct Edges(AtomicUsize);

impl Edges {
    /// The edges since the last call.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl InterruptLine for Edges {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// One access of a guest: where, how wide, and what it writes (or that it reads).
#[derive(Debug, Clone)]
pub struct Access {
    offset: u64,
    width: usize,
    value: Option<u64>,
}

/// Accesses of every width at offsets in, around and far from a device of `length` addresses.
pub fn accesses(length: u64) -> impl Strategy<Value = Vec<Access>> {
    let offset = prop_oneof![8 => 0..length + 2, 1 => any::<u64>(), 1 => Just(u64::MAX)];
    let value = prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..=0xFF_u64)];
    let access = (
        offset,
        prop_oneof![4 => Just(1), 1 => Just(2), 1 => Just(4), 1 => Just(8)],
        prop::option::of(value),
    )
        .prop_map(|(offset, width, value)| Access { offset, width, value });
    prop::collection::vec(access, 1..64)
}

/// Makes `accesses` to `device`.
pub fn perform(device: &dyn BusDevice, accesses: &[Access]) {
    for access in accesses {
        match access.value {
            Some(value) => device.write(access.offset, &value.to_le_bytes()[..access.width]),
            None => device.read(access.offset, &mut [0xFF; 8][..access.width]),
        }
    }
}

/// Reads one byte of `device`, as the bus does.
pub fn read_byte(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0xFF];
    device.read(offset, &mut data);
    data[0]
}
