//! `cofferdam-vmm`: the monitor of one domain.

// Nothing that a guest, a file or a client chooses may panic the monitor. (`unwrap` and its like are the workspace's.)
#![cfg_attr(
    not(test),
    warn(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::env;
use std::io::{ErrorKind, Read};
use std::process::{self, ExitCode};
use std::sync::Arc;

use cofferdam_api::config::{DomainConfig, MAX_CONFIG_SIZE};
use cofferdam_api::source::Source;
use cofferdam_api::status::{Event, ExitReason, Outcome};
use cofferdam_api::validate::check_id;
use cofferdam_vmm::activation;
use cofferdam_vmm::api::{Api, ApiError, PreBoot, Socket, Started};
use cofferdam_vmm::arguments::Arguments;
use cofferdam_vmm::descriptor;
use cofferdam_vmm::domain::{Domain, Remote};
use cofferdam_vmm::logger::Logger;
use cofferdam_vmm::metrics::Metrics;
use cofferdam_vmm::observer::Observer;
use cofferdam_vmm::phases::PhaseClock;
use cofferdam_vmm::run_entry::RunEntry;
use cofferdam_vmm::seccomp::{Policies, violation};
use cofferdam_vmm::signals::StopSignals;
use cofferdam_vmm::start::StartError;
use cofferdam_vmm::status::StatusFile;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

fn main() -> ExitCode {
    // The guest's memory is nobody's to trace or dump. It cannot fail with this argument.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let arguments = match Arguments::of_process() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            let reason = ExitReason::Config.process_exit_code(None);
            return ExitCode::from(if error.use_stderr() { reason } else { 0 });
        }
    };
    let logger = Arc::new(Logger::new(&arguments.id));
    logger.install();
    let clock = Arc::new(PhaseClock::new(arguments.start_time_us));
    clock.reached("monitor");
    let metrics = Arc::new(Metrics::new(clock.clone(), logger.metrics()));
    let observer = Observer { logger, metrics };
    let watched = observer.configure_both(Some(&arguments.logger()), arguments.metrics().as_ref());
    if let Err(error) = watched {
        tracing::error!("{error}");
        return ExitCode::from(ExitReason::Config.process_exit_code(None));
    }
    let mut status = match arguments.status_file.as_ref().map(descriptor::append).transpose() {
        Ok(file) => StatusFile::new(file),
        Err(error) => {
            tracing::error!("--status-file: {error}");
            return ExitCode::from(ExitReason::Config.process_exit_code(None));
        }
    };
    let entry = match arguments.run_entry.as_ref().map(RunEntry::open).transpose() {
        Ok(entry) => entry,
        Err(error) => {
            tracing::error!("--run-entry: {error}");
            return ExitCode::from(ExitReason::Config.process_exit_code(None));
        }
    };
    let mut api = None;
    let outcome = run(&arguments, &clock, &observer, &mut status, &mut api);
    match outcome.exit_reason {
        ExitReason::PowerOff => tracing::info!("{}", outcome.message),
        // Who asked for the end, and whoever reads the status, knows.
        ExitReason::Stopped if api.is_some() => tracing::info!("{}", outcome.message),
        _ if arguments.status_file.is_some() => tracing::info!("{}", outcome.message),
        _ => tracing::error!("{}", outcome.message),
    }
    // A failure is logged and counted.
    let _ = observer.metrics.flush();
    let code = outcome.process_exit_code();
    let told = status.write(&Event::Stopped(outcome.clone()));
    if let Err(error) = &told {
        tracing::warn!("--status-file: {error}");
    }
    let unread = told.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
    if let Some(api) = api {
        api.finish(outcome);
    }
    // Whoever made the entry is gone.
    if unread
        && let Some(entry) = entry
        && let Err(error) = entry.remove(&arguments.id)
    {
        tracing::warn!("--run-entry: {error}");
    }
    observer.logger.finish();
    ExitCode::from(code)
}

fn run(
    arguments: &Arguments,
    clock: &Arc<PhaseClock>,
    observer: &Observer,
    status: &mut StatusFile,
    api: &mut Option<Api>,
) -> Outcome {
    start(arguments, clock, observer, status, api).unwrap_or_else(|error| Outcome {
        platform: None,
        protected: false,
        identity: Default::default(),
        container: None,
        exit_reason: error.reason(),
        exit_code: None,
        message: error.to_string(),
        phases: clock.phases(),
    })
}

/// A socket that is inherited is taken over before anything else is opened, so that nothing can be mistaken for it. A
/// configuration that is slow to come is waited for while a signal still ends this process. A socket of our own is made
/// when signals are blocked: whoever sees it and sends one has the monitor stop in order.
fn start(
    arguments: &Arguments,
    clock: &Arc<PhaseClock>,
    observer: &Observer,
    status: &mut StatusFile,
    api: &mut Option<Api>,
) -> Result<Outcome, StartError> {
    let metrics = &observer.metrics;
    check_id("--id", &arguments.id)?;
    let policies = Arc::new(policies(arguments)?);
    let inherited = inherited_socket(arguments)?;
    let config = arguments.config_file.as_ref().map(read_config).transpose()?;
    let signals = StopSignals::new(metrics.signals.clone()).map_err(StartError::Signals)?;
    let socket = match &arguments.api_sock {
        Some(path @ Source::Path(_)) => Some(Socket::new(path)?),
        _ => inherited,
    };
    let mut inbox = None;
    if let Some(socket) = socket {
        let max_payload = arguments.http_api_max_payload_size;
        let (server, requests) =
            Api::start(socket, &arguments.id, max_payload, metrics.api.clone(), &policies)?;
        *api = Some(server);
        inbox = Some(requests);
        clock.reached("api");
        metrics.api_started();
    }
    match (config, inbox) {
        (Some(config), inbox) => {
            config.validate()?;
            observer.configure(&config)?;
            let domain = Domain::launch(&config, clock)?;
            let remote = inbox.map(|inbox| Remote { inbox, config, reply: None });
            domain.run(signals, status, remote, metrics, &policies)
        }
        (None, Some(inbox)) => {
            let client = status
                .try_clone()
                .map_err(|error| StartError::Internal("--status-file", error.to_string()))?;
            let pre_boot = PreBoot::new(&arguments.id, clock.clone(), observer.clone());
            let Started { domain, config, reply } = pre_boot.serve(&inbox, &signals, client.as_ref())?;
            let remote = Remote { inbox, config, reply: Some(reply) };
            domain.run(signals, status, Some(remote), metrics, &policies)
        }
        (None, None) => Err(StartError::NothingToStart),
    }
}

/// The API's socket, if it is passed to this process.
fn inherited_socket(arguments: &Arguments) -> Result<Option<Socket>, StartError> {
    match &arguments.api_sock {
        Some(descriptor @ Source::Descriptor(_)) => return Ok(Some(Socket::new(descriptor)?)),
        Some(Source::Path(_)) => return Ok(None),
        None if arguments.no_api => return Ok(None),
        None => {}
    }
    match activation::api_socket(|name| env::var(name).ok(), process::id()).map_err(ApiError::from)? {
        Some(fd) => Ok(Some(Socket::inherited("LISTEN_FDS", fd)?)),
        None => Ok(None),
    }
}

/// What the threads may ask of the kernel, and a handler for when they ask for more.
fn policies(arguments: &Arguments) -> Result<Policies, StartError> {
    if arguments.no_seccomp {
        return Ok(Policies::none());
    }
    violation::install()?;
    Ok(match &arguments.seccomp_filter {
        Some(file) => Policies::from_file(file)?,
        None => Policies::built_in(),
    })
}

fn read_config(source: &Source) -> Result<DomainConfig, StartError> {
    let mut text = Vec::new();
    descriptor::open(source)
        // One byte more shows that it is too large.
        .and_then(|file| file.take((MAX_CONFIG_SIZE as u64).saturating_add(1)).read_to_end(&mut text))
        .map_err(|error| StartError::ConfigFile { file: source.to_string(), error })?;
    DomainConfig::from_json(&text)
        .map_err(|error| StartError::BadConfigFile { file: source.to_string(), error })
}
