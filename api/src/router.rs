//! Which request asks for what: one table, from which requests are served and the OpenAPI document is made.
//!
//! [`route`] is a pure function of method, path, query and body. Whatever it refuses is answered with 400 and a
//! message, as Firecracker does: there is no 404.

use std::time::Duration;

use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::actions::VmmAction;
use crate::config::{BootSource, DomainConfig, Drive, MachineConfig, Serial, Vsock};
use crate::json;
use crate::lacking;
use crate::observe::{LoggerConfig, MetricsConfig};
use crate::requests::{
    ActionType, DrivePatch, Exec, InstanceAction, Kill, MachinePatch, Resize, StateChange, WantedState,
};
use crate::validate::{ConfigError, check_id};

/// Longest `timeout_ms` of any request, milliseconds: a day.
pub const MAX_TIMEOUT_MS: u64 = 24 * 60 * 60 * 1000;

/// What [`Route::answer`] is for one that answers with text and not with JSON.
pub const TEXT: &str = "Text";

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// An action of the monitor.
    Act(VmmAction),
    /// The end of the domain, or its status after that time.
    Wait(Option<Duration>),
    /// A request to the container's init.
    Container(ContainerCall),
    /// The OpenAPI document.
    Document,
}

/// What can be asked of a container's init.
#[derive(Clone, Debug, PartialEq)]
pub enum ContainerCall {
    /// A further process, and how long its end is waited for.
    Exec(Exec, Option<Duration>),
    /// The end of such a process, and how long it is waited for.
    Wait(String, Option<Duration>),
    /// A signal.
    Kill(Kill),
    /// Another size of a terminal.
    Resize(Resize),
    /// What the container uses.
    Stats,
}

/// Why a request asks for nothing that there is.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RouteError {
    /// No such path, or not with this method.
    #[error("Invalid request method and/or path: {0} {1}.")]
    NoRoute(String, String),
    /// Something of Firecracker's that this monitor does not have.
    #[error("{}", lacking::refusal(.0, .1))]
    Lacking(&'static str, &'static str),
    /// The body is missing.
    #[error("Empty {0} request.")]
    NoBody(String),
    /// A body where none is read.
    #[error("{0} request cannot have a body.")]
    Body(String),
    /// The body is not what the route reads.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(String),
    /// The body has a value that makes no sense.
    #[error("{0}")]
    Value(#[from] ConfigError),
    /// Path and body name two drives.
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    TwoIds {
        /// In the path.
        path: String,
        /// In the body.
        body: String,
    },
    /// A query that the route does not have, or not with that value.
    #[error("Invalid query: {0:?}{1}")]
    Query(String, String),
}

/// One method of one path.
pub struct Route {
    /// Its method.
    pub method: &'static str,
    /// Its path; a segment in braces stands for any one.
    pub path: &'static str,
    /// By what name its requests are counted: Firecracker's, where it counts such.
    pub counted: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Name of the schema of its body.
    pub body: Option<&'static str>,
    /// Name and type of its query parameter.
    pub query: Option<(&'static str, &'static str)>,
    /// Name of the schema of what it answers, or [`TEXT`]; without one it answers 204.
    pub answer: Option<&'static str>,
    parse: fn(&Request) -> Result<Call, RouteError>,
}

impl Route {
    const fn get(
        path: &'static str,
        counted: &'static str,
        summary: &'static str,
        answer: &'static str,
        parse: fn(&Request) -> Result<Call, RouteError>,
    ) -> Self {
        Self { method: "GET", path, counted, summary, body: None, query: None, answer: Some(answer), parse }
    }

    const fn change(
        method: &'static str,
        path: &'static str,
        counted: &'static str,
        summary: &'static str,
        body: &'static str,
        parse: fn(&Request) -> Result<Call, RouteError>,
    ) -> Self {
        Self { method, path, counted, summary, body: Some(body), query: None, answer: None, parse }
    }

    const fn with_query(mut self, name: &'static str, schema: &'static str) -> Self {
        self.query = Some((name, schema));
        self
    }
}

/// A request whose route is found.
struct Request<'a> {
    /// What stands for the segment in braces.
    parameter: &'a str,
    query: Option<&'a str>,
    body: &'a [u8],
}

impl Request<'_> {
    fn body<T: DeserializeOwned>(&self) -> Result<T, RouteError> {
        json::read(self.body).map_err(RouteError::Json)
    }

    fn same_id(&self, body: &str) -> Result<(), RouteError> {
        if self.parameter == body {
            return Ok(());
        }
        Err(RouteError::TwoIds { path: self.parameter.to_owned(), body: body.to_owned() })
    }

    /// The value of query parameter `name`.
    fn query<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, RouteError> {
        let Some(query) = self.query else { return Ok(None) };
        let wrong = |hint: String| RouteError::Query(query.to_owned(), hint);
        let value = query.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
        let value = value.ok_or_else(|| wrong(format!("; it can only be {name}=")))?;
        value.parse().map(Some).map_err(|_| wrong(String::new()))
    }

    /// The value of query parameter `timeout_ms`.
    fn timeout(&self) -> Result<Option<Duration>, RouteError> {
        match self.query("timeout_ms")? {
            Some(timeout) if timeout > MAX_TIMEOUT_MS => Err(RouteError::Query(
                format!("timeout_ms={timeout}"),
                format!("; at most {MAX_TIMEOUT_MS} are possible"),
            )),
            timeout => Ok(timeout.map(Duration::from_millis)),
        }
    }
}

fn act(action: VmmAction) -> Result<Call, RouteError> {
    Ok(Call::Act(action))
}

/// Every route.
pub const ROUTES: &[Route] = &[
    Route::get(
        "/",
        "instance_info",
        "Name, state and version of this monitor's domain",
        "InstanceInfo",
        |_| act(VmmAction::GetInstance),
    ),
    Route::get("/version", "vmm_version", "Versions of the interface and of the monitor", "Version", |_| {
        act(VmmAction::GetVersion)
    }),
    Route::get("/openapi.json", "openapi", "This document", "Object", |_| Ok(Call::Document)),
    Route::get("/host", "host", "What `cofferdam host check --json` prints", "Object", |_| {
        act(VmmAction::GetHost)
    }),
    Route::get("/vm/config", "vm_config", "The whole configuration", "Draft", |_| act(VmmAction::GetConfig)),
    Route::get("/machine-config", "machine_cfg", "vCPUs and memory", "MachineConfig", |_| {
        act(VmmAction::GetMachine)
    }),
    Route::change(
        "PUT",
        "/machine-config",
        "machine_cfg",
        "Sets vCPUs and memory",
        "MachineConfig",
        |request| act(VmmAction::PutMachine(request.body::<MachineConfig>()?)),
    ),
    Route::change(
        "PATCH",
        "/machine-config",
        "machine_cfg",
        "Changes vCPUs or memory",
        "MachinePatch",
        |request| act(VmmAction::PatchMachine(request.body::<MachinePatch>()?)),
    ),
    Route::change("PUT", "/boot-source", "boot_source", "Sets what is started", "BootSource", |request| {
        act(VmmAction::PutBoot(request.body::<BootSource>()?))
    }),
    Route::change(
        "PUT",
        "/drives/{drive_id}",
        "drive",
        "Adds a drive, or replaces the one of that id",
        "Drive",
        |request| {
            let drive = request.body::<Drive>()?;
            request.same_id(&drive.drive_id)?;
            act(VmmAction::PutDrive(drive))
        },
    ),
    Route::change(
        "PATCH",
        "/drives/{drive_id}",
        "drive",
        "Gives a drive another file, or the same one with another size, or other limits",
        "DrivePatch",
        |request| {
            let patch = request.body::<DrivePatch>()?;
            request.same_id(&patch.drive_id)?;
            act(VmmAction::PatchDrive(patch))
        },
    ),
    Route::change("PUT", "/vsock", "vsock", "Sets the vsock device", "Vsock", |request| {
        act(VmmAction::PutVsock(request.body::<Vsock>()?))
    }),
    Route::change("PUT", "/serial", "serial", "Sets where the serial console goes", "Serial", |request| {
        act(VmmAction::PutSerial(request.body::<Serial>()?))
    }),
    Route::change(
        "PUT",
        "/logger",
        "logger",
        "Sets where and what the monitor logs",
        "LoggerConfig",
        |request| {
            let config = request.body::<LoggerConfig>()?;
            act(VmmAction::PutLogger(config))
        },
    ),
    Route::change(
        "PUT",
        "/metrics",
        "metrics",
        "Sets where metrics are written",
        "MetricsConfig",
        |request| act(VmmAction::PutMetrics(request.body::<MetricsConfig>()?)),
    ),
    Route::get("/metrics", "metrics", "The metrics as Prometheus text", TEXT, |_| act(VmmAction::GetMetrics)),
    Route::change(
        "PUT",
        "/actions",
        "actions",
        "Starts the domain, presses its power button, or writes the metrics now",
        "InstanceAction",
        |request| match request.body::<InstanceAction>()?.action_type {
            ActionType::InstanceStart => act(VmmAction::Start),
            ActionType::SendCtrlAltDel => act(VmmAction::PressPowerButton),
            ActionType::FlushMetrics => act(VmmAction::FlushMetrics),
        },
    ),
    Route::get("/vm", "vm", "State, platform, protection, end and phases of the domain", "VmStatus", |_| {
        act(VmmAction::GetStatus)
    }),
    Route::get(
        "/vm/wait",
        "vm_wait",
        "Answers when the domain has stopped, or at the time-out",
        "VmStatus",
        |request| request.timeout().map(Call::Wait),
    )
    .with_query("timeout_ms", "integer"),
    Route::change(
        "PUT",
        "/vm",
        "vm",
        "Replaces the whole configuration, and with `start=true` starts the domain",
        "DomainConfig",
        |request| {
            let start = request.query("start")?.unwrap_or(false);
            let config = Box::new(request.body::<DomainConfig>()?);
            act(if start { VmmAction::StartWith(config) } else { VmmAction::PutConfig(config) })
        },
    )
    .with_query("start", "boolean"),
    Route::change("PATCH", "/vm", "vm", "Holds the vCPUs, or lets them run", "StateChange", |request| {
        act(match request.body::<StateChange>()?.state {
            WantedState::Paused => VmmAction::Pause,
            WantedState::Resumed => VmmAction::Resume,
        })
    }),
    Route {
        method: "DELETE",
        path: "/vm",
        counted: "vm",
        summary: "Asks for an orderly stop, and a hard one at the time-out",
        body: None,
        query: Some(("timeout_ms", "integer")),
        answer: None,
        parse: |request| act(VmmAction::Stop(request.timeout()?)),
    },
    Route {
        method: "POST",
        path: "/container/exec",
        counted: "container_exec",
        summary: "Runs a command beside the container's process; answers when it has ended, or at the time-out",
        body: Some("Exec"),
        query: Some(("timeout_ms", "integer")),
        answer: Some("Executed"),
        parse: |request| {
            let exec = request.body::<Exec>()?;
            exec.validate()?;
            Ok(Call::Container(ContainerCall::Exec(exec, request.timeout()?)))
        },
    },
    Route::get(
        "/container/exec/{id}",
        "container_exec",
        "How a command that was run has ended; answers when it has, or at the time-out",
        "Executed",
        |request| {
            check_id("id", request.parameter)?;
            let id = request.parameter.to_owned();
            Ok(Call::Container(ContainerCall::Wait(id, request.timeout()?)))
        },
    )
    .with_query("timeout_ms", "integer"),
    Route::change(
        "POST",
        "/container/kill",
        "container_kill",
        "Sends a signal to the container's process, or to that of an exec",
        "Kill",
        |request| {
            let kill = request.body::<Kill>()?;
            kill.validate()?;
            Ok(Call::Container(ContainerCall::Kill(kill)))
        },
    ),
    Route::change(
        "POST",
        "/container/resize",
        "container_resize",
        "Changes the size of a terminal",
        "Resize",
        |request| {
            let resize = request.body::<Resize>()?;
            resize.validate()?;
            Ok(Call::Container(ContainerCall::Resize(resize)))
        },
    ),
    Route::get(
        "/container/stats",
        "container_stats",
        "What the container uses, and what its init has refused",
        "ContainerStats",
        |_| Ok(Call::Container(ContainerCall::Stats)),
    ),
];

/// What Firecracker has and this monitor has not, by the first segment of the path; and what to use instead.
pub const LACKING: &[(&str, &str)] = &[
    ("network-interfaces", lacking::NETWORK),
    ("balloon", lacking::BALLOON),
    ("mmds", lacking::MMDS),
    ("snapshot", lacking::SNAPSHOT),
    ("pmem", lacking::PMEM),
    ("hotplug", lacking::HOTPLUG),
    ("cpu-config", lacking::CPU_CONFIG),
    ("entropy", lacking::ENTROPY),
];

/// Where in [`ROUTES`] that of `method` on `path` is, if there is one.
pub fn position(method: &str, path: &str) -> Option<usize> {
    ROUTES.iter().position(|route| route.method == method && matches(route.path, path).is_some())
}

/// What `method` on `path` with `query` and `body` asks for.
pub fn route(method: &str, path: &str, query: Option<&str>, body: &[u8]) -> Result<Call, RouteError> {
    let route = position(method, path).and_then(|index| ROUTES.get(index));
    let Some((route, parameter)) = route.and_then(|route| Some((route, matches(route.path, path)?))) else {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        return Err(match LACKING.iter().find(|(name, _)| *name == first) {
            Some((name, instead)) => RouteError::Lacking(name, instead),
            None => RouteError::NoRoute(method.to_owned(), path.to_owned()),
        });
    };
    match (route.body, body.is_empty()) {
        (Some(_), true) => return Err(RouteError::NoBody(method.to_owned())),
        (None, false) => return Err(RouteError::Body(method.to_owned())),
        _ => {}
    }
    if let Some(query) = query
        && route.query.is_none()
    {
        return Err(RouteError::Query(query.to_owned(), "; this path has none".to_owned()));
    }
    (route.parse)(&Request { parameter, query, body })
}

/// What stands for the segment in braces (nothing, if there is none), if `path` is of `pattern`.
fn matches<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    if pattern == path {
        return Some("");
    }
    let prefix = pattern.split_once('{')?.0;
    path.strip_prefix(prefix).filter(|rest| !rest.is_empty() && !rest.contains('/'))
}

#[cfg(test)]
mod tests;
