//! Before the start: the configuration is put together.

use std::fmt::Display;
use std::fs::File;
use std::sync::Arc;

use cofferdam_api::actions::{ActionError, ActionResult, Version, VmmAction, VmmData};
use cofferdam_api::config::{DomainConfig, Drive};
use cofferdam_api::draft::Draft;
use cofferdam_api::server::Reply;
use cofferdam_api::status::{VmState, VmStatus};
use cofferdam_api::validate::ConfigError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Inbox, instance, survey};
use crate::domain::Domain;
use crate::observer::Observer;
use crate::phases::PhaseClock;
use crate::signals::StopSignals;
use crate::start::{self, StartError};

/// What a monitor does before its domain has started.
pub struct PreBoot {
    id: String,
    draft: Draft,
    clock: Arc<PhaseClock>,
    observer: Observer,
}

/// A domain that a client has started.
pub struct Started {
    /// The domain, launched.
    pub domain: Domain,
    /// Its configuration.
    pub config: DomainConfig,
    /// Who is told when it runs.
    pub reply: Reply,
}

/// What follows from an action.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// An answer.
    Answer(ActionResult),
    /// The launch of a domain, whose result is the answer.
    Launch(Box<DomainConfig>),
    /// The end of the monitor.
    Stop,
    /// An answer when the domain has stopped.
    Wait,
}

impl PreBoot {
    /// Of a monitor whose domain is called `id`.
    pub fn new(id: &str, clock: Arc<PhaseClock>, observer: Observer) -> Self {
        Self { id: id.to_owned(), draft: Draft::default(), clock, observer }
    }

    /// Serves clients until one has started the domain. A launch that fails changes nothing but its files.
    pub fn serve(
        mut self,
        inbox: &Inbox,
        signals: &StopSignals,
        client: Option<&File>,
    ) -> Result<Started, StartError> {
        loop {
            wait(inbox, signals, client)?;
            inbox.clear();
            while let Some(envelope) = inbox.take() {
                match self.act(envelope.action) {
                    Step::Answer(result) => envelope.reply.send(result),
                    Step::Wait => inbox.waiters.add(envelope.reply),
                    Step::Stop => {
                        envelope.reply.send(Ok(VmmData::Empty));
                        return Err(StartError::Stopped("the API"));
                    }
                    Step::Launch(config) => match self.launch(&config) {
                        Ok(domain) => return Ok(Started { domain, config: *config, reply: envelope.reply }),
                        Err(error) => {
                            envelope.reply.send(Err(ActionError::NotStarted(error.to_string())));
                        }
                    },
                }
            }
        }
    }

    fn launch(&self, config: &DomainConfig) -> Result<Domain, StartError> {
        let before = self.clock.phases();
        Domain::launch(config, &self.clock).inspect_err(|_| self.clock.reset(before))
    }

    pub(super) fn act(&mut self, action: VmmAction) -> Step {
        Step::Answer(match action {
            VmmAction::Start => match self.draft.complete() {
                Ok(config) => return Step::Launch(Box::new(config)),
                Err(error) => Err(error),
            },
            VmmAction::StartWith(config) => match self.observe(&config) {
                Ok(()) => return Step::Launch(config),
                Err(error) => Err(error),
            },
            VmmAction::Stop(_) => return Step::Stop,
            VmmAction::Wait => return Step::Wait,
            VmmAction::PutConfig(config) => {
                let observer = self.observer.clone();
                self.change(
                    |draft| draft.put_config((*config).clone()),
                    |draft| {
                        check_kernel(draft)?;
                        check_drives(draft, |_| true)?;
                        check_container(draft)?;
                        check_vsock(draft)?;
                        check_serial(draft)?;
                        // Last: it takes effect.
                        observer.configure(&config).map_err(failed)
                    },
                )
            }
            VmmAction::PutMachine(machine) => self.change(|draft| draft.put_machine(machine), |_| Ok(())),
            VmmAction::PatchMachine(patch) => self.change(|draft| draft.patch_machine(patch), |_| Ok(())),
            VmmAction::PutBoot(boot) => self.change(|draft| draft.put_boot(boot), check_kernel),
            VmmAction::PutDrive(drive) => {
                let id = drive.drive_id.clone();
                self.change(
                    |draft| draft.put_drive(drive),
                    |draft| check_drives(draft, |drive| drive.drive_id == id),
                )
            }
            VmmAction::PutVsock(vsock) => self.change(|draft| draft.put_vsock(vsock), check_vsock),
            VmmAction::PutSerial(serial) => self.change(|draft| draft.put_serial(serial), check_serial),
            VmmAction::PutLogger(config) => {
                let done = config.validate().map_err(ActionError::from);
                done.and_then(|()| self.observer.logger.configure(&config).map_err(failed))
                    .map(|()| VmmData::Empty)
            }
            VmmAction::PutMetrics(config) => {
                let done = config.validate().map_err(ActionError::from);
                done.and_then(|()| self.observer.metrics.configure(&config).map_err(failed))
                    .map(|()| VmmData::Empty)
            }
            VmmAction::PatchDrive(_)
            | VmmAction::PressPowerButton
            | VmmAction::Pause
            | VmmAction::Resume
            | VmmAction::FlushMetrics
            | VmmAction::ConnectGuest(_) => Err(ActionError::BeforeStart),
            VmmAction::GetInstance => Ok(instance(&self.id, VmState::NotStarted)),
            VmmAction::GetVersion => Ok(VmmData::Version(Version::this())),
            VmmAction::GetConfig => Ok(VmmData::Config(Box::new(self.draft.clone()))),
            VmmAction::GetMachine => Ok(VmmData::Machine(self.draft.machine().clone())),
            VmmAction::GetStatus => Ok(VmmData::Status(Box::new(self.status()))),
            VmmAction::GetHost => survey(true),
            VmmAction::GetMetrics => Ok(VmmData::Metrics(self.observer.metrics.prometheus())),
        })
    }

    /// Has log and metrics go where a good configuration says.
    fn observe(&self, config: &DomainConfig) -> Result<(), ActionError> {
        config.validate()?;
        self.observer.configure(config).map_err(failed)
    }

    /// Changes the configuration, if that makes a good one and `check` finds what it names. That is looked at
    /// again at the start: much can happen until then.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Draft) -> Result<(), ConfigError>,
        check: impl FnOnce(&Draft) -> Result<(), ActionError>,
    ) -> ActionResult {
        let mut draft = self.draft.clone();
        change(&mut draft)?;
        check(&draft)?;
        self.draft = draft;
        Ok(VmmData::Empty)
    }

    fn status(&self) -> VmStatus {
        VmStatus {
            id: self.id.clone(),
            state: VmState::NotStarted,
            platform: None,
            protected: false,
            identity: Default::default(),
            container: None,
            exit_reason: None,
            exit_code: None,
            message: None,
            phases: self.clock.phases(),
        }
    }
}

fn failed(error: impl Display) -> ActionError {
    ActionError::Failed(error.to_string())
}

fn check_kernel(draft: &Draft) -> Result<(), ActionError> {
    draft.boot().map_or(Ok(()), start::check_boot).map_err(failed)
}

fn check_drives(draft: &Draft, which: impl Fn(&Drive) -> bool) -> Result<(), ActionError> {
    let mut drives = draft.drives().iter().enumerate().filter(|(_, drive)| which(drive));
    drives.try_for_each(|(index, drive)| start::check_drive(index, drive)).map_err(failed)
}

fn check_container(draft: &Draft) -> Result<(), ActionError> {
    let check = |container| start::check_container(container, draft.confidential());
    draft.container().map_or(Ok(()), check).map_err(failed)
}

fn check_vsock(draft: &Draft) -> Result<(), ActionError> {
    draft.vsock().map_or(Ok(()), start::check_vsock).map_err(failed)
}

fn check_serial(draft: &Draft) -> Result<(), ActionError> {
    start::check_serial(draft.serial()).map_err(failed)
}

/// Waits until a client asks for something. A signal, or the end of whoever started the monitor, is an error.
fn wait(inbox: &Inbox, signals: &StopSignals, client: Option<&File>) -> Result<(), StartError> {
    let mut descriptors = vec![PollFd::new(inbox, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    // Errors and hang-ups are reported unasked.
    descriptors.extend(client.map(|client| PollFd::new(client, PollFlags::empty())));
    loop {
        match poll(&mut descriptors, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(StartError::Internal("poll", error.to_string())),
        }
    }
    if signals.take() > 0 {
        return Err(StartError::Stopped("a signal"));
    }
    if descriptors.get(2).is_some_and(|client| !client.revents().is_empty()) {
        return Err(StartError::Stopped("the end of whoever started it"));
    }
    Ok(())
}
