//! What the monitor counts and times, all in one place, and the ways out: `GET /metrics` and a file.

mod devices;
mod flush;

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cofferdam_api::metrics::ApiMetrics;
use cofferdam_api::observe::MetricsConfig;
use cofferdam_api::status::Phases;
use cofferdam_devices::virtio::TransportMetrics;
use cofferdam_devices::virtio::block::BlockMetrics;
use cofferdam_metrics::{Counter, Field, Group, LastTime, Metrics as _, Reading, group, prometheus};

pub use devices::DeviceMetrics;
pub use flush::{FlushTimer, MetricsError, PERIOD};

use self::flush::Flusher;
use crate::logger::LoggerMetrics;
use crate::phases::{self, PhaseClock};
use crate::signals::SignalMetrics;
use crate::vcpu::VcpuMetrics;

group! {
    /// Of the domain's life.
    pub struct VmmMetrics {
        /// Times that the vCPUs were held
        pub pause_count: Counter,
        /// Times that they were let run again
        pub resume_count: Counter,
    }
}

group! {
    /// How long things took the last time.
    pub struct LatencyMetrics {
        /// From the request for a pause until every vCPU was held, the last time
        pub pause_vm: LastTime,
        /// From the request to go on until the vCPUs were let run, the last time
        pub resume_vm: LastTime,
    }
}

/// All that is counted and timed in this process.
pub struct Metrics {
    /// Of the API.
    pub api: Arc<ApiMetrics>,
    /// Of stop signals.
    pub signals: Arc<SignalMetrics>,
    /// Of the domain's life.
    pub vmm: VmmMetrics,
    /// How long things took.
    pub latencies: LatencyMetrics,
    logger: Arc<LoggerMetrics>,
    clock: Arc<PhaseClock>,
    devices: OnceLock<DeviceMetrics>,
    flusher: Mutex<Option<Flusher>>,
}

impl Metrics {
    /// Those of a monitor whose phases `clock` knows and whose log counts in `logger`.
    pub fn new(clock: Arc<PhaseClock>, logger: Arc<LoggerMetrics>) -> Self {
        Self {
            api: Arc::default(),
            signals: Arc::default(),
            vmm: VmmMetrics::default(),
            latencies: LatencyMetrics::default(),
            logger,
            clock,
            devices: OnceLock::new(),
            flusher: Mutex::default(),
        }
    }

    /// The domain runs, and these are its devices.
    pub fn add_devices(&self, devices: DeviceMetrics) {
        // One domain runs in a process.
        let _ = self.devices.set(devices);
    }

    /// The API can be reached.
    pub fn api_started(&self) {
        if let Some(time) = self.clock.phases().get("api") {
            self.api.server.process_startup_time_us.set(Duration::from_micros(*time));
        }
        self.api.server.process_startup_time_cpu_us.set(phases::processor_time());
    }

    /// Has metrics written to a file from now on. Once only.
    pub fn configure(&self, config: &MetricsConfig) -> Result<(), MetricsError> {
        let mut flusher = self.flusher();
        if flusher.is_some() {
            return Err(MetricsError::Again);
        }
        *flusher = Some(Flusher::open(&config.metrics_path)?);
        Ok(())
    }

    /// The same, where a configuration file may say again what is so already.
    pub fn configure_if_new(&self, config: &MetricsConfig) -> Result<(), MetricsError> {
        let known = self.flusher().as_ref().is_some_and(|flusher| flusher.path() == config.metrics_path);
        if known { Ok(()) } else { self.configure(config) }
    }

    /// Whether metrics go to a file.
    pub fn are_configured(&self) -> bool {
        self.flusher().is_some()
    }

    /// Writes a line, if there is a file. Failures are logged and counted; what was to be written is in the next line.
    pub fn flush(&self) -> Result<(), MetricsError> {
        match self.flusher().as_mut() {
            Some(flusher) => flusher.write(self.groups(true), &self.logger),
            None => Ok(()),
        }
    }

    /// All as Prometheus text.
    pub fn prometheus(&self) -> String {
        prometheus::text(&self.groups(false))
    }

    /// All that is known now; with what things of a kind have together, or without.
    fn groups(&self, with_sums: bool) -> Vec<Group> {
        let none = DeviceMetrics::default();
        let devices = self.devices.get().unwrap_or(&none);
        let mut groups = self.api.groups();
        for (id, drive) in &devices.drives {
            groups.push(Group::member("block", "drive", id, &**drive));
        }
        if with_sums {
            let drives = devices.drives.iter().map(|(_, drive)| &**drive);
            groups.push(Group::sum::<BlockMetrics>("block", drives));
        }
        let transports = devices.transports.iter().map(|transport| &**transport);
        let vcpus = devices.vcpus.iter().map(|vcpu| &**vcpu);
        groups.extend([
            Group::of("i8042", &*devices.i8042),
            Group::of("interrupts", &*devices.interrupts),
            Group::of("latencies_us", &self.latencies),
            self.log_group(devices),
            phase_group(&self.clock.phases()),
            Group::of("power", &*devices.power),
            Group::of("signals", &*self.signals),
            Group::of("uart", &*devices.uart),
            Group::sum::<VcpuMetrics>("vcpu", vcpus),
            Group::sum::<TransportMetrics>("virtio", transports),
            Group::of("vmm", &self.vmm),
            Group::of("vsock", &*devices.vsock),
        ]);
        groups
    }

    /// That of the log: what the devices had no lines for belongs to it.
    fn log_group(&self, devices: &DeviceMetrics) -> Group {
        let mut fields = self.logger.fields();
        fields.push(Field::new(
            "rate_limited_log_count",
            "Messages about devices that were not logged, because there were too many",
            Reading::Counter(devices.unlogged_total()),
        ));
        Group { family: "logger", member: None, fields }
    }

    fn flusher(&self) -> MutexGuard<'_, Option<Flusher>> {
        self.flusher.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When each phase was reached.
fn phase_group(phases: &Phases) -> Group {
    let fields = phases.iter().map(|(name, time)| {
        let help: Cow<'static, str> = format!("From the start until phase {name} was reached").into();
        Field::new(name.clone(), help, Reading::Micros(*time))
    });
    Group { family: "phases_us", member: None, fields: fields.collect() }
}

#[cfg(test)]
mod tests;
