//! vCPU threads: run the guest, serve its exits, until the gate ends.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cofferdam_api::status::ExitReason;
use cofferdam_confidential::snp::termination;
use cofferdam_metrics::{Counter, Latency, group};
use kvm_bindings::KVM_SYSTEM_EVENT_SEV_TERM;
use kvm_ioctls::{HypercallExit, VcpuExit, VcpuFd};

use crate::board::Buses;
use crate::certificates::CertificateRequests;
use crate::control::Control;
use crate::exit::{self, KVM_EXIT_SNP_REQ_CERTS};
use crate::gate::Gate;
use crate::kick::{self, Kickable};
use crate::page_state::{Faults, PageState};
use crate::seccomp::{Policies, Thread};

group! {
    /// Of the vCPUs.
    pub struct VcpuMetrics {
        /// Exits for reads of a port
        pub exit_io_in: Counter,
        /// Exits for writes of a port
        pub exit_io_out: Counter,
        /// Exits for reads of a device's memory
        pub exit_mmio_read: Counter,
        /// Exits for writes of a device's memory
        pub exit_mmio_write: Counter,
        /// Exits because the monitor wanted the vCPU to look at the gate, or a signal came
        pub exit_kicked: Counter,
        /// Exits because pages change between the guest's private memory and what it shares
        pub exit_page_state: Counter,
        /// Exits because the guest wants certificates with its attestation report
        pub exit_certificates: Counter,
        /// vCPUs that could not go on
        pub failures: Counter,
        /// Time in which reads of a port were served
        pub exit_io_in_agg: Latency,
        /// Time in which writes of a port were served
        pub exit_io_out_agg: Latency,
        /// Time in which reads of a device's memory were served
        pub exit_mmio_read_agg: Latency,
        /// Time in which writes of a device's memory were served
        pub exit_mmio_write_agg: Latency,
        /// Time in which changes of pages were served
        pub exit_page_state_agg: Latency,
    }
}

/// What all vCPUs of a domain share.
pub struct Shared {
    /// The devices.
    pub buses: Buses,
    /// What serves changes of pages, in a domain that has private ones.
    pub page_state: Option<PageState>,
    /// What serves requests for certificates, in a domain that has some.
    pub certificates: Option<CertificateRequests>,
    /// Where the domain's end is reported.
    pub control: Arc<Control>,
    /// Whether vCPUs run.
    pub gate: Gate,
    /// What each vCPU counts in, by its number.
    pub metrics: Vec<Arc<VcpuMetrics>>,
    /// What vCPU threads may ask of the kernel.
    pub policies: Arc<Policies>,
}

/// The vCPU threads of a domain. Dropping it ends them.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread per vCPU. They wait until [`Self::resume`]. On an error none is left.
    pub fn start(vcpus: Vec<VcpuFd>, shared: Arc<Shared>) -> io::Result<Self> {
        kick::install()?;
        shared.gate.close();
        let mut started = Self { shared, threads: Vec::with_capacity(vcpus.len()) };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let shared = started.shared.clone();
            let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
                run(index, Kickable::new(vcpu), &shared);
                shared.gate.leave();
            })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Holds all vCPUs outside the guest.
    pub fn pause(&self) {
        self.shared.gate.close();
        self.threads.iter().for_each(kick::kick);
    }

    /// Waits until all that [`Self::pause`] holds are held.
    pub fn wait_held(&self, time: Duration) -> bool {
        self.shared.gate.wait_held(self.threads.len(), time)
    }

    /// Lets them run.
    pub fn resume(&self) {
        self.shared.gate.open();
    }

    /// Ends all threads, and returns when they have.
    pub fn end(&mut self) {
        self.shared.gate.end();
        self.threads.iter().for_each(kick::kick);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.control.stop(ExitReason::MonitorError, "a vCPU thread panicked".to_owned());
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.end();
    }
}

fn run(index: usize, mut vcpu: Kickable, shared: &Shared) {
    let metrics = shared.metrics.get(index).cloned().unwrap_or_default();
    if let Err(error) = shared.policies.install(Thread::Vcpu(index)) {
        shared.control.stop(ExitReason::MonitorError, error.to_string());
        return;
    }
    let mut faults = Faults::default();
    while shared.gate.pass() {
        let done = run_once(vcpu.vcpu(), shared, &metrics, &mut faults);
        if !matches!(done, Ok(Done::Fault) | Err(Stop::Kicked)) {
            faults.clear();
        }
        match done {
            Ok(Done::Access) => shared.control.guest_acted(),
            Ok(Done::PageState | Done::Fault) => {}
            Ok(Done::Certificates) => vcpu.clear(),
            Err(Stop::Kicked) => {
                metrics.exit_kicked.count();
                vcpu.clear();
            }
            Err(Stop::Ended(reason, what)) => {
                metrics.failures.count();
                shared.control.stop(reason, format!("vCPU {index}: {what}"));
                return;
            }
        }
    }
}

/// What was served.
enum Done {
    /// An access to a device.
    Access,
    /// A change of pages, which a first stage makes too.
    PageState,
    /// An access to a page on the side where it was not.
    Fault,
    /// A request for certificates, after which the vCPU looks at the gate.
    Certificates,
}

/// Why a vCPU does not go on at once.
enum Stop {
    /// The gate may have changed.
    Kicked,
    /// It cannot go on.
    Ended(ExitReason, String),
}

/// Enters the guest and serves one exit.
fn run_once(
    vcpu: &mut VcpuFd,
    shared: &Shared,
    metrics: &VcpuMetrics,
    faults: &mut Faults,
) -> Result<Done, Stop> {
    let broken = |what: String| Err(Stop::Ended(ExitReason::VcpuError, what));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(..)) => {
            metrics.exit_io_out.count();
            metrics.exit_io_out_agg.time(|| exit::serve_ports(vcpu, &shared.buses.ports));
        }
        Ok(VcpuExit::IoIn(..)) => {
            metrics.exit_io_in.count();
            metrics.exit_io_in_agg.time(|| exit::serve_ports(vcpu, &shared.buses.ports));
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            metrics.exit_mmio_write.count();
            metrics.exit_mmio_write_agg.time(|| shared.buses.mmio.write(address, data));
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            metrics.exit_mmio_read.count();
            metrics.exit_mmio_read_agg.time(|| shared.buses.mmio.read(address, data));
        }
        Ok(VcpuExit::Intr) => return Err(Stop::Kicked),
        Ok(VcpuExit::Shutdown) => {
            return Err(Stop::Ended(ExitReason::TripleFault, "triple fault".to_owned()));
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return broken(format!("KVM cannot enter the guest: hardware reason {reason:#x} on CPU {cpu}"));
        }
        Ok(VcpuExit::InternalError) => return broken(exit::internal_error(vcpu)),
        Ok(VcpuExit::Hypercall(HypercallExit { nr, args, .. })) => {
            let Some(pages) = &shared.page_state else { return broken(format!("unexpected hypercall {nr}")) };
            metrics.exit_page_state.count();
            let served = metrics.exit_page_state_agg.time(|| pages.hypercall(vcpu, nr, args, &shared.gate));
            return served.map(|()| Done::PageState).or_else(broken);
        }
        Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
            let place = format!("no host memory behind {gpa:#x}, {size} bytes (flags {flags:#x})");
            let Some(pages) = &shared.page_state else { return broken(place) };
            metrics.exit_page_state.count();
            if let Err(error) = faults.count(flags, gpa) {
                return broken(error);
            }
            let served = metrics.exit_page_state_agg.time(|| pages.fault(flags, gpa, size));
            return served.map(|_| Done::Fault).or_else(|error| broken(format!("{place}: {error}")));
        }
        Ok(VcpuExit::Unsupported(KVM_EXIT_SNP_REQ_CERTS)) if shared.certificates.is_some() => {
            metrics.exit_certificates.count();
            let served = shared.certificates.as_ref().map_or(Ok(()), |requests| requests.serve(vcpu));
            return served.map(|()| Done::Certificates).or_else(broken);
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SEV_TERM, data)) => {
            let request = data.first().copied().unwrap_or(0);
            return Err(Stop::Ended(ExitReason::RefusedByGuest, termination::words(request)));
        }
        Ok(VcpuExit::SystemEvent(kind, data)) => {
            return broken(format!("system event {kind} ({}), data {data:x?}", exit::system_event(kind)));
        }
        Ok(exit) => return broken(format!("unexpected exit {exit:?}")),
        Err(error) => match error.errno() {
            // A vCPU that waits for the guest to start it waits inside KVM, which then answers EAGAIN.
            libc::EINTR | libc::EAGAIN => return Err(Stop::Kicked),
            _ => return broken(format!("KVM_RUN: {error}")),
        },
    }
    Ok(Done::Access)
}

#[cfg(test)]
mod tests;
