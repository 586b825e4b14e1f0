//! The small devices that every domain has: interrupt controller, serial port,
//! power management, and the ports through which a guest speaks to the monitor.

pub mod ioapic;

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
}
