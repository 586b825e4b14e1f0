//! What is counted and timed.

mod devices;

pub use devices::DeviceMetrics;
