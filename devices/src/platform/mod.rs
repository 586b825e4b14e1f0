//! The small devices that every domain has: interrupt controller, serial port,
//! power management, and the ports through which a guest speaks to the monitor.

pub mod console;
pub mod guest_port;
pub mod i8042;
pub mod ioapic;
pub mod power;
pub mod pvpanic;
pub mod serial;
#[cfg(test)]
mod testing;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a guest asks of the monitor, or tells it. Called on a vCPU thread;
/// implementations only take note.
pub trait GuestRequests: Send + Sync {
    /// The guest entered soft-off (ACPI S5).
    fn power_off(&self);
    /// The guest asked for a reset.
    fn reset(&self);
    /// The guest's kernel panicked.
    fn panicked(&self);
    /// The guest gave its exit code.
    fn exit_code(&self, code: u8);
    /// The guest reached user space.
    fn user_space(&self);
    /// The first stage did not enter the kernel, for the reason with this code.
    fn refused(&self, reason: u8);
    /// Init of a container's domain reports a step, a failure, or both.
    fn step(&self, report: u32);
}

/// Locks `mutex`, also when a thread panicked with it: no state here is left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A write as the writes of single bytes that an ISA bus makes of it: (offset, byte).
fn bytes_at(offset: u64, data: &[u8]) -> impl Iterator<Item = (u64, u8)> + '_ {
    (offset..=u64::MAX).zip(data.iter().copied())
}

/// A read as the reads of single bytes that an ISA bus makes of it: (offset, place for the byte).
fn bytes_at_mut(offset: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut u8)> {
    (offset..=u64::MAX).zip(data)
}
