//! One domain from its configuration to its end.
//!
//! The order of the steps follows from measurement. On the machines of this
//! project `KVM_SET_USER_MEMORY_REGION` takes 0.1 ms on a new VM and 5 ms once
//! there is a vCPU or an irqchip, so memory comes first; a split irqchip and an
//! ioeventfd take 1 µs at any time; the first `KVM_GET_SUPPORTED_CPUID` takes
//! 0.6 ms, and on a thread of its own it only makes `KVM_CREATE_VM` wait. `phases` of the outcome show where
//! the time went.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cofferdam_api::actions::VmmData;
use cofferdam_api::config::DomainConfig;
use cofferdam_api::server::Reply;
use cofferdam_api::status::{Event, ExitReason, Identity, Outcome};
use cofferdam_confidential::image::inspect::hex;
use cofferdam_confidential::snp::certificates::Certificates;
use cofferdam_confidential::{ChooseError, Launch, Launched};
use cofferdam_devices::virtio::vsock::SocketFile;
use cofferdam_firmware::parameters::Parameters;
use cofferdam_firmware::{acpi, layout};
use event_manager::SubscriberOps;
use tracing::warn;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::api::{Inbox, RunTime};
use crate::arch::{self, CpuTemplate, EntryState};
use crate::board::{Board, Buses, EventLoop};
use crate::certificates::CertificateRequests;
use crate::container;
use crate::control::Control;
use crate::descriptor::Inherited;
use crate::gate::Gate;
use crate::image::{FileHash, LoadWindow};
use crate::memory;
use crate::metrics::{DeviceMetrics, FlushTimer, Metrics, PERIOD};
use crate::page_state::{PageState, SharedSide};
use crate::phases::PhaseClock;
use crate::seccomp::{Policies, Thread};
use crate::signals::StopSignals;
use crate::start::{Boot, Resources, StartError, memory_size, raise_descriptor_limit};
use crate::status::StatusFile;
use crate::stop_request::StopRequest;
use crate::supervisor::Supervisor;
use crate::vcpu::{Shared, Vcpus};

/// I/O APIC pins of a split irqchip as KVM is told of them: what TDX requires, and enough for pins whose
/// interrupts are all messages.
const RESERVED_PINS: u8 = 24;
/// How long the reader of the console may take when the domain has ended.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(5);

/// A domain that is launched, and whose vCPUs are yet to run.
pub struct Domain {
    control: Arc<Control>,
    clock: Arc<PhaseClock>,
    launched: Launched,
    certificates: Option<Certificates>,
    window: Option<LoadWindow>,
    board: Board,
    buses: Buses,
    devices: DeviceMetrics,
    stop_timeout: Duration,
    /// SHA-256 of the container's manifest.
    manifest_digest: Option<[u8; 32]>,
    _vsock_file: Option<SocketFile>,
}

/// What a client of the API needs to control a domain.
pub struct Remote {
    /// What clients ask for.
    pub inbox: Inbox,
    /// The domain's configuration.
    pub config: DomainConfig,
    /// Who started the domain and waits to hear that it runs.
    pub reply: Option<Reply>,
}

impl Domain {
    /// Launches the domain of `config`. An error leaves nothing of it.
    pub fn launch(config: &DomainConfig, clock: &Arc<PhaseClock>) -> Result<Self, StartError> {
        config.validate()?;
        clock.reached("configured");
        raise_descriptor_limit();
        let mut inherited = Inherited::default();
        let mut resources = Resources::open(config, &mut inherited)?;
        let vsock_file = resources.vsock_file.take();
        let manifest_digest = resources.manifest_digest;
        let certificates = resources.certificates.take();
        clock.reached("opened");
        let control = Arc::new(Control::new(clock.clone()).map_err(internal("eventfd"))?);
        let mut devices = std::mem::take(&mut resources.metrics);
        let (launched, window, board, buses) = launch(config, resources, &control, clock, &mut devices)?;
        inherited.take_over();
        Ok(Self {
            control,
            clock: clock.clone(),
            launched,
            certificates,
            window,
            board,
            buses,
            devices,
            stop_timeout: Duration::from_millis(config.stop_timeout_ms),
            manifest_digest,
            _vsock_file: vsock_file,
        })
    }

    /// Runs the domain until it stops. An error means that it never ran.
    pub fn run(
        self,
        signals: StopSignals,
        status: &mut StatusFile,
        remote: Option<Remote>,
        metrics: &Arc<Metrics>,
        policies: &Arc<Policies>,
    ) -> Result<Outcome, StartError> {
        let Self {
            control, clock, launched, certificates, mut window, board, devices, manifest_digest, ..
        } = self;
        let platform = launched.platform();
        let sealed = launched.sealed().clone();
        let protected = sealed.protected;
        let mut events = EventLoop::new().map_err(internal("event loop"))?;
        board.register(&mut events);
        if signals.take() > 0 {
            return Err(StartError::Stopped("a signal"));
        }
        let page_state = launched.private.clone().map(|memory| PageState::new(launched.vm.clone(), memory));
        let certificates = certificates.zip(launched.private.clone()).map(|(certificates, private)| {
            CertificateRequests::new(certificates, launched.memory.clone(), private)
        });
        let shared = Shared {
            buses: self.buses,
            page_state,
            certificates,
            control: control.clone(),
            gate: Gate::default(),
            metrics: devices.vcpus.clone(),
            policies: policies.clone(),
        };
        let shared = Arc::new(shared);
        let vcpus = Vcpus::start(launched.vcpus, shared.clone()).map_err(internal("vCPU threads"))?;
        let client = status.try_clone().map_err(internal("--status-file"))?;
        let mut supervisor =
            Supervisor::new(control.clone(), vcpus, signals, board.power_button(), self.stop_timeout, client)
                .map_err(internal("supervisor"))?;
        if manifest_digest.is_some()
            && let Some(vsock) = board.virtio().last()
        {
            let request = StopRequest::new(vsock.clone()).map_err(internal("socketpair"))?;
            supervisor.ask_container(request);
        }
        let supervisor = Arc::new(Mutex::new(supervisor));
        events.add_subscriber(supervisor.clone());
        if metrics.are_configured() {
            let timer = FlushTimer::new(metrics.clone(), PERIOD).map_err(internal("timer of the metrics"))?;
            events.add_subscriber(Arc::new(Mutex::new(timer)));
        }
        // All threads are started and everything is open: what follows is all that the policy has to allow.
        policies.install(Thread::Vmm)?;

        match status.write(&Event::Running { platform, protected }) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Err(StartError::Stopped("the end of whoever started it"));
            }
            Err(error) => warn!("--status-file: {error}"),
            Ok(()) => {}
        }
        clock.reached("running");
        metrics.add_devices(devices.clone());
        // As Firecracker does: a first line with what the start took. A failure is logged and counted.
        let _ = metrics.flush();
        let of_others = window.as_ref().is_some_and(|window| !window.is_for_first_stage());
        if window.is_some() && !of_others {
            control.expect_kernel();
        }
        let vcpu_count = devices.vcpus.len();
        lock(&supervisor).start();
        let (remote, reply) = match remote {
            Some(Remote { inbox, config, reply }) => (Some((inbox, config)), reply),
            None => (None, None),
        };
        if let Some(reply) = reply {
            reply.send(Ok(VmmData::Empty));
        }
        // While the guest runs already: it takes some tenths of a millisecond.
        let mut identity = window.as_ref().map(|window| window.identity(vcpu_count)).unwrap_or_default();
        identity.digest = sealed.digest.map(|digest| hex(&digest));
        identity.policy = sealed.policy.map(|policy| format!("{policy:#x}"));
        let file_hash = Arc::new(window.as_ref().map_or_else(FileHash::none, LoadWindow::file_hash));
        // An outcome that is told to nobody needs no hash of the whole file.
        let is_told = remote.is_some() || status.is_wanted();
        let mut is_hashing = is_told;
        if let Some((inbox, config)) = remote {
            events.add_subscriber(Arc::new(Mutex::new(RunTime {
                inbox,
                config: config.into(),
                platform,
                protected,
                identity: identity.clone(),
                manifest_digest,
                file_hash: file_hash.clone(),
                waiting_for_hash: Vec::new(),
                clock: clock.clone(),
                control: control.clone(),
                supervisor: supervisor.clone(),
                metrics: metrics.clone(),
                virtio: board.virtio().to_vec(),
            })));
        }
        let mut told = None;
        while lock(&supervisor).stopped().is_none() {
            // The file is read while there is nothing else to do, so that nobody waits for it at the end.
            match if is_hashing { events.run_with_timeout(0) } else { events.run() } {
                Ok(0) if is_hashing => is_hashing = !file_hash.advance(),
                Ok(_) => {}
                Err(error) => {
                    control.stop(ExitReason::MonitorError, format!("event loop: {error}"));
                    break;
                }
            }
            let notes = control.notes();
            if notes.kernel_lives
                && let Some(window) = window.take()
            {
                window.close();
            }
            if let Some(step) = notes.step.filter(|step| told.replace(*step) != Some(*step))
                && let Err(error) = status.write(&Event::Step { step: step.to_string() })
            {
                warn!("--status-file: {error}");
            }
        }
        board.release();
        lock(&supervisor).end();
        board.shut_down(CONSOLE_DEADLINE);
        devices.log_unlogged();
        clock.reached("stopped");
        let notes = control.notes();
        let (exit_reason, mut message) = lock(&supervisor)
            .stopped()
            .cloned()
            .or_else(|| notes.end.clone())
            .unwrap_or((ExitReason::MonitorError, "the event loop ended without a reason".to_owned()));
        if of_others && matches!(exit_reason, ExitReason::VcpuError | ExitReason::TripleFault) {
            message.push_str(&looked_for(&shared.buses.ports.absent()));
        }
        Ok(Outcome {
            platform: Some(platform),
            protected,
            identity: Identity { image_hash: is_told.then(|| file_hash.get()).flatten(), ..identity },
            container: manifest_digest.map(|digest| container::status(&digest, protected, &notes)),
            exit_reason,
            exit_code: notes.exit_code,
            message,
            phases: clock.phases(),
        })
    }
}

/// What firmware of others may have failed for: ports of devices that this machine does not have.
fn looked_for(ports: &[u64]) -> String {
    if ports.is_empty() {
        return String::new();
    }
    let ports: Vec<String> = ports.iter().map(|port| format!("{port:#x}")).collect();
    format!("; before that it looked for devices that there are not, at the ports {}", ports.join(", "))
}

fn lock(supervisor: &Mutex<Supervisor>) -> std::sync::MutexGuard<'_, Supervisor> {
    supervisor.lock().unwrap_or_else(PoisonError::into_inner)
}

fn internal<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError::Internal(what, error.to_string())
}

/// From a new VM to one that can run, with its devices.
fn launch(
    config: &DomainConfig,
    resources: Resources,
    control: &Arc<Control>,
    clock: &PhaseClock,
    metrics: &mut DeviceMetrics,
) -> Result<(Launched, Option<LoadWindow>, Board, Buses), StartError> {
    let count = config.machine.vcpu_count;
    let vm = Launch::new(&resources.kvm, resources.platform)?;
    arch::set_up_vm(vm.vm())?;
    clock.reached("vm_created");
    let memory = memory::map(memory_size(config))?;
    let mut launch = vm.add_memory(memory.clone())?;
    clock.reached("memory");
    let mut template = CpuTemplate::new(&resources.kvm, count).map_err(internal("CPUID"))?;
    if !launch.shows_memory_encryption() {
        template.hide_memory_encryption();
    }
    let (entry, window): (Box<dyn EntryState>, _) = match resources.boot {
        Boot::Direct(plan) => {
            let entry = plan.load(&memory)?;
            write_acpi_tables(&memory, count, resources.virtio.len())?;
            (Box::new(entry), None)
        }
        Boot::Image(image, parameters) => {
            let parameters = Parameters { sha_instructions: template.has_sha(), ..parameters };
            let (window, vcpus) = image.import(&mut launch, &mut template, &parameters)?;
            (Box::new(vcpus), Some(window))
        }
    };
    clock.reached("loaded");
    let launch = launch.create_vcpus(count, RESERVED_PINS)?;
    clock.reached("vcpus");

    for (index, vcpu) in (0..).zip(launch.vcpus()) {
        let measured = launch.save_area(index);
        let entry = measured.as_deref().map_or(&*entry, |save_area| save_area as &dyn EntryState);
        arch::set_up(vcpu, index, &mut template, entry)?;
    }
    let shared = launch.private_memory().map(|memory| Arc::new(SharedSide(memory.clone())) as _);
    let (board, buses) =
        Board::new(launch.vm(), &memory, shared, control, resources.console, resources.virtio, metrics)?;
    metrics.vcpus = (0..count).map(|_| Arc::default()).collect();
    if let Some(window) = window.as_ref().filter(|_| launch.private_memory().is_none())
        && let Some(vcpu) = launch.vcpus().first()
    {
        window.prefault(vcpu);
    }
    let launched = launch.finish()?;
    if config.confidential.require_protected && !launched.sealed().protected {
        return Err(ChooseError::Exposed.into());
    }
    clock.reached("launched");
    Ok((launched, window, board, buses))
}

fn write_acpi_tables(memory: &GuestMemoryMmap, vcpus: u8, virtio: usize) -> Result<(), StartError> {
    let mut tables = [0; acpi::MAX_SIZE];
    let config = acpi::Config {
        vcpus,
        virtio_mmio_slots: u8::try_from(virtio).map_err(internal("virtio devices"))?,
        serial: true,
    };
    let length =
        acpi::build(&config, layout::ACPI_TABLES, &mut tables).map_err(internal("the ACPI tables"))?;
    let tables = tables.get(..length).unwrap_or_default();
    memory.write_slice(tables, GuestAddress(layout::ACPI_TABLES)).map_err(internal("the ACPI tables"))
}
