//! After the start: the domain is watched and controlled; of its configuration only drives may get other files and
//! limits. A subscriber of the domain's event loop.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cofferdam_api::actions::{ActionError, ActionResult, GuestEnd, Version, VmmAction, VmmData};
use cofferdam_api::draft::Draft;
use cofferdam_api::requests::DrivePatch;
use cofferdam_api::server::{Envelope, Reply};
use cofferdam_api::status::{ExitReason, Identity, Platform, VmState, VmStatus};
use cofferdam_container_protocol::step::Step;
use cofferdam_devices::virtio::block::{Block, BlockFile};
use cofferdam_devices::virtio::mmio::MmioTransport;
use cofferdam_devices::virtio::vsock::Vsock;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Inbox, instance, survey};
use crate::container;
use crate::control::Control;
use crate::descriptor::Inherited;
use crate::image::FileHash;
use crate::metrics::Metrics;
use crate::phases::PhaseClock;
use crate::start::{StartError, block_source, drive_field, limit_change};
use crate::supervisor::Supervisor;

/// What a monitor does for clients while its domain runs.
pub struct RunTime {
    /// What they ask for.
    pub inbox: Inbox,
    /// The configuration.
    pub config: Draft,
    /// The platform that the domain runs on.
    pub platform: Platform,
    /// Whether it protects the domain.
    pub protected: bool,
    /// What the domain is.
    pub identity: Identity,
    /// SHA-256 of its container's manifest.
    pub manifest_digest: Option<[u8; 32]>,
    /// The hash of its image's file, which is read when somebody asks for the status.
    pub file_hash: Arc<FileHash>,
    /// Those who have asked for it, and wait until the file is read.
    pub waiting_for_hash: Vec<Reply>,
    /// When phases were reached.
    pub clock: Arc<PhaseClock>,
    /// What is known of the domain.
    pub control: Arc<Control>,
    /// What holds and stops it.
    pub supervisor: Arc<Mutex<Supervisor>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Its virtio devices: the drives, in the order of the configuration, come first.
    pub virtio: Vec<Arc<MmioTransport>>,
}

impl RunTime {
    /// Does what is asked. Nothing is answered yet to those who wait for the end.
    pub(super) fn act(&mut self, action: VmmAction) -> Option<ActionResult> {
        Some(match action {
            VmmAction::Pause => self.pause(),
            VmmAction::Resume => {
                let start = Instant::now();
                self.supervise(Supervisor::resume);
                self.metrics.vmm.resume_count.count();
                self.metrics.latencies.resume_vm.set(start.elapsed());
                Ok(VmmData::Empty)
            }
            VmmAction::FlushMetrics => match self.metrics.flush() {
                Ok(()) => Ok(VmmData::Empty),
                Err(error) => Err(ActionError::Failed(error.to_string())),
            },
            VmmAction::PressPowerButton => match self.supervise(|supervisor| supervisor.press_power_button())
            {
                Ok(()) => Ok(VmmData::Empty),
                Err(error) => Err(ActionError::Failed(format!("the power button: {error}"))),
            },
            VmmAction::Stop(time) => {
                self.supervise(|supervisor| supervisor.stop(time));
                Ok(VmmData::Empty)
            }
            VmmAction::Wait => return None,
            VmmAction::PatchDrive(patch) => self.patch_drive(&patch),
            VmmAction::ConnectGuest(end) => self.connect_guest(end),
            VmmAction::Start
            | VmmAction::StartWith(_)
            | VmmAction::PutConfig(_)
            | VmmAction::PutMachine(_)
            | VmmAction::PatchMachine(_)
            | VmmAction::PutBoot(_)
            | VmmAction::PutDrive(_)
            | VmmAction::PutVsock(_)
            | VmmAction::PutSerial(_)
            | VmmAction::PutLogger(_)
            | VmmAction::PutMetrics(_) => Err(ActionError::AfterStart),
            VmmAction::GetInstance => Ok(instance(&self.inbox.id, self.state())),
            VmmAction::GetVersion => Ok(VmmData::Version(Version::this())),
            VmmAction::GetConfig => Ok(VmmData::Config(Box::new(self.config.clone()))),
            VmmAction::GetMachine => Ok(VmmData::Machine(self.config.machine().clone())),
            VmmAction::GetStatus => Ok(VmmData::Status(Box::new(self.status()))),
            VmmAction::GetHost => survey(false),
            VmmAction::GetMetrics => Ok(VmmData::Metrics(self.metrics.prometheus())),
        })
    }

    fn supervise<T>(&self, what: impl FnOnce(&mut Supervisor) -> T) -> T {
        what(&mut self.supervisor.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn pause(&self) -> ActionResult {
        let start = Instant::now();
        if self.supervise(Supervisor::pause) {
            self.metrics.vmm.pause_count.count();
            self.metrics.latencies.pause_vm.set(start.elapsed());
            return Ok(VmmData::Empty);
        }
        Err(ActionError::Failed("the vCPUs did not leave the guest in time; they run again".to_owned()))
    }

    /// Gives a drive another file (or the same one, whose size has changed), other limits, or both.
    fn patch_drive(&mut self, patch: &DrivePatch) -> ActionResult {
        let no_drive = || ActionError::Failed(format!("drives: there is no drive {:?}", patch.drive_id));
        let (index, drive) = self.config.patched_drive(patch).ok_or_else(no_drive)??;
        let device = self.virtio.get(index).ok_or_else(no_drive)?;
        let mut inherited = Inherited::default();
        let file = match &patch.path_on_host {
            Some(path) => Some(reopen(device, index, path, &mut inherited)?.ok_or_else(no_drive)?),
            None => None,
        };
        // Nothing is changed up to here, and from here on nothing fails: a bucket that limits nothing is none.
        if let Some(limits) = patch.rate_limiter {
            let change = device.with_device(|block: &mut Block| block.limit(limit_change(limits)));
            change.ok_or_else(no_drive)?.map_err(|error| failed(StartError::Limits { index, error }))?;
        }
        if let Some(file) = file {
            device.reconfigure(|block: &mut Block| block.replace(file));
        }
        inherited.take_over();
        self.config.put_drive(drive)?;
        Ok(VmmData::Empty)
    }

    /// Hands a connection to the guest, whose init serves requests from the step `running` on.
    fn connect_guest(&self, GuestEnd(end): GuestEnd) -> ActionResult {
        let failed = |message: String| Err(ActionError::Failed(format!("container: {message}")));
        if self.config.container().is_none() {
            return failed("the domain has none".to_owned());
        }
        let notes = self.control.notes();
        match notes.step {
            Some(Step::Running | Step::Stopping) if notes.paused => {
                return failed("the domain is paused".to_owned());
            }
            Some(Step::Running | Step::Stopping) => {}
            Some(step) => return failed(format!("it does not run yet; the guest is at the step {step}")),
            None => return failed("it does not run yet; the guest is at no step".to_owned()),
        }
        let adopt = |vsock: &mut Vsock| Arc::into_inner(end).map(|end| vsock.adopt(end));
        // Vsock is the last of the devices.
        match self.virtio.last().and_then(|device| device.with_device(adopt)).flatten() {
            Some(Ok(())) => Ok(VmmData::Empty),
            Some(Err(error)) => failed(error.to_string()),
            None => failed("the domain has no vsock device".to_owned()),
        }
    }

    /// Does what has been asked for.
    pub(super) fn turn(&mut self) {
        self.inbox.clear();
        while let Some(Envelope { action, reply }) = self.inbox.take() {
            if action == VmmAction::GetStatus {
                self.waiting_for_hash.push(reply);
                continue;
            }
            match self.act(action) {
                Some(result) => reply.send(result),
                None => self.inbox.waiters.add(reply),
            }
        }
        self.tell_status();
    }

    /// Answers those who have asked for the status, once the image's file is read. A turn of the event loop reads a piece of
    /// it, so that the devices go on.
    fn tell_status(&mut self) {
        if self.waiting_for_hash.is_empty() {
            return;
        }
        if !self.file_hash.advance() {
            return self.inbox.ring();
        }
        let status = self.status();
        for reply in self.waiting_for_hash.drain(..) {
            reply.send(Ok(VmmData::Status(Box::new(status.clone()))));
        }
    }

    fn state(&self) -> VmState {
        if self.control.notes().paused { VmState::Paused } else { VmState::Running }
    }

    fn status(&self) -> VmStatus {
        let notes = self.control.notes();
        VmStatus {
            id: self.inbox.id.clone(),
            state: self.state(),
            platform: Some(self.platform),
            protected: self.protected,
            identity: Identity { image_hash: self.file_hash.get(), ..self.identity.clone() },
            container: self.manifest_digest.map(|digest| container::status(&digest, self.protected, &notes)),
            exit_reason: None,
            exit_code: notes.exit_code,
            message: None,
            phases: self.clock.phases(),
        }
    }
}

/// Opens `path` in place of the file of drive `index`. `None`: `device` is no drive.
fn reopen(
    device: &MmioTransport,
    index: usize,
    path: &Path,
    inherited: &mut Inherited,
) -> Result<Option<BlockFile>, ActionError> {
    let known = device.with_device(|block: &mut Block| (block.file(), block.metrics()));
    let Some((file, metrics)) = known else { return Ok(None) };
    // Not under the device's lock: to open a file may take the host's storage a while.
    let reopened = block_source(&drive_field(index), path, inherited)
        .and_then(|source| file.reopen(source).map_err(|source| StartError::Drive { index, source }));
    reopened.map(Some).map_err(|error| {
        metrics.update_fails.count();
        failed(error)
    })
}

fn failed(error: StartError) -> ActionError {
    ActionError::Failed(error.to_string())
}

impl MutEventSubscriber for RunTime {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.inbox, EventSet::IN)) {
            self.control.stop(ExitReason::MonitorError, format!("event loop: {error}"));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.turn();
    }
}
