//! What is counted of the devices and vCPUs of a domain.

use std::sync::Arc;

use cofferdam_devices::platform::i8042::I8042Metrics;
use cofferdam_devices::platform::ioapic::InterruptMetrics;
use cofferdam_devices::platform::power::PowerMetrics;
use cofferdam_devices::platform::serial::UartMetrics;
use cofferdam_devices::virtio::TransportMetrics;
use cofferdam_devices::virtio::block::BlockMetrics;
use cofferdam_devices::virtio::vsock::VsockMetrics;
use tracing::warn;

use crate::vcpu::VcpuMetrics;

/// The other ends of what devices and vCPUs count in. Without a device, one that stays 0.
#[derive(Clone, Default)]
pub struct DeviceMetrics {
    /// Drives by id, in the order of their slots.
    pub drives: Vec<(String, Arc<BlockMetrics>)>,
    /// The vsock device.
    pub vsock: Arc<VsockMetrics>,
    /// The transports of all virtio devices.
    pub transports: Vec<Arc<TransportMetrics>>,
    /// The serial port.
    pub uart: Arc<UartMetrics>,
    /// The i8042.
    pub i8042: Arc<I8042Metrics>,
    /// The power button.
    pub power: Arc<PowerMetrics>,
    /// The I/O APIC.
    pub interrupts: Arc<InterruptMetrics>,
    /// vCPUs by number.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
}

impl DeviceMetrics {
    /// Messages of each device that were not logged, by the name of the device.
    fn unlogged(&self) -> Vec<(String, u64)> {
        let drives =
            self.drives.iter().map(|(id, drive)| (format!("block_{id}"), &drive.rate_limited_log_count));
        let transports = self.transports.iter().enumerate();
        let transports =
            transports.map(|(slot, transport)| (format!("virtio_{slot}"), &transport.rate_limited_log_count));
        let others = [
            ("vsock".to_owned(), &self.vsock.rate_limited_log_count),
            ("interrupts".to_owned(), &self.interrupts.rate_limited_log_count),
        ];
        let all = drives.chain(transports).chain(others);
        all.map(|(name, count)| (name, count.total())).filter(|(_, count)| *count > 0).collect()
    }

    /// How many messages about devices were not logged.
    pub fn unlogged_total(&self) -> u64 {
        self.unlogged().iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// Logs what was not logged: how much it was.
    pub fn log_unlogged(&self) {
        for (device, count) in self.unlogged() {
            warn!("{device}: {count} messages were not logged, as there were too many");
        }
    }
}
