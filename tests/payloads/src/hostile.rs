//! What the hostile payloads have in common. Each attacks one device, looks at
//! what becomes of it, and then uses it and another as a good guest would. Whatever
//! is not as it should be is a panic, so exit code 0 means that all is well.
//!
//! A payload stops at its [`checkpoint`]s until it is sent a byte, so that whoever
//! runs it can look at the monitor.

use crate::cpu::delay;
use crate::virtio::{Device, register, status};
use crate::{entry, println, serial};

/// How often to look, with a delay between: minutes.
const PATIENCE: u32 = 100_000_000;
/// `InterruptStatus`: the configuration or the status has changed.
const CONFIG_INTERRUPT: u32 = 2;

/// The case that the command line asks for by `case=NAME`, among `cases`.
pub fn choose<T: Copy>(cases: &[(&str, T)]) -> T {
    let wanted = entry::option("case").unwrap_or_default();
    let case = cases.iter().find(|(name, _)| name.as_bytes() == wanted);
    assert!(case.is_some(), "no such case");
    case.map_or(cases[0].1, |(_, case)| *case)
}

/// Says `what` and waits for a byte.
pub fn checkpoint(what: &str) {
    println!("{what}");
    while serial::read().is_none() {}
}

/// Waits until `condition` holds, for minutes.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let held = (0..PATIENCE).any(|_| {
        delay();
        condition()
    });
    assert!(held, "not within patience: {what}");
}

/// Waits until `device` is out of service and has said so by an interrupt.
pub fn expect_needs_reset(device: &Device) {
    eventually("DEVICE_NEEDS_RESET", || device.needs_reset());
    eventually("a configuration interrupt", || {
        device.read(register::INTERRUPT_STATUS) & CONFIG_INTERRUPT != 0
    });
    assert_ne!(device.read(register::STATUS) & status::DRIVER_OK, 0, "the status is still there");
    println!("needs reset");
}
