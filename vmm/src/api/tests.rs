use std::time::Duration;

use cofferdam_api::actions::VmmAction;
use cofferdam_api::config::DomainConfig;
use cofferdam_api::router::{Call, ROUTES, route};
use cofferdam_api::status::{ExitReason, Platform};
use cofferdam_api::validate::ConfigError;
use cofferdam_devices::interrupt::InterruptLine;
use cofferdam_devices::platform::power::PowerButton;

use super::pre_boot::Step;
use super::*;
use crate::board::Buses;
use crate::control::Control;
use crate::gate::Gate;
use crate::logger::Logger;
use crate::metrics::Metrics;
use crate::observer::Observer;
use crate::phases::PhaseClock;
use crate::signals::StopSignals;
use crate::supervisor::Supervisor;
use crate::vcpu::{Shared, Vcpus};

struct Line;

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

const CONFIG: &str = r#"{"boot-source": {"kernel_image_path": "k"},
                         "drives": [{"drive_id": "d", "path_on_host": "p"}]}"#;

/// What an action comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Is {
    /// 204.
    Done,
    /// 200.
    Told,
    /// A launch.
    Launch,
    /// The end of the monitor.
    End,
    /// An answer later.
    Later,
    /// 400: only after the start.
    TooEarly,
    /// 400: only before it.
    TooLate,
    /// 400, for another reason.
    Refused,
}

use Is::{Done, End, Later, Launch, Refused, Told, TooEarly, TooLate};

/// Every request, and what it comes to before the start, while the domain runs, and while it is paused.
const TABLE: &[(&str, &str, [Is; 3])] = &[
    ("GET /", "", [Told; 3]),
    ("GET /version", "", [Told; 3]),
    ("GET /host", "", [Told; 3]),
    ("GET /vm/config", "", [Told; 3]),
    ("GET /machine-config", "", [Told; 3]),
    ("GET /vm", "", [Told; 3]),
    ("GET /vm/wait", "", [Later; 3]),
    ("PUT /machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#, [Done, TooLate, TooLate]),
    ("PATCH /machine-config", r#"{"vcpu_count": 2}"#, [Done, TooLate, TooLate]),
    ("PUT /boot-source", r#"{"kernel_image_path": "k"}"#, [Done, TooLate, TooLate]),
    ("PUT /drives/e", r#"{"drive_id": "e", "path_on_host": "p"}"#, [Done, TooLate, TooLate]),
    ("PATCH /drives/d", r#"{"drive_id": "d", "path_on_host": "p"}"#, [TooEarly, Refused, Refused]),
    ("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#, [Done, TooLate, TooLate]),
    ("PUT /serial", "{}", [Done, TooLate, TooLate]),
    ("PUT /logger", r#"{"level": "Off"}"#, [Done, TooLate, TooLate]),
    ("PUT /metrics", r#"{"metrics_path": "/dev/null"}"#, [Done, TooLate, TooLate]),
    ("GET /metrics", "", [Told; 3]),
    ("PUT /actions", r#"{"action_type": "FlushMetrics"}"#, [TooEarly, Done, Done]),
    ("PUT /vm", CONFIG, [Done, TooLate, TooLate]),
    ("PUT /vm?start=true", CONFIG, [Launch, TooLate, TooLate]),
    ("PUT /actions", r#"{"action_type": "InstanceStart"}"#, [Launch, TooLate, TooLate]),
    ("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#, [TooEarly, Done, Done]),
    ("PATCH /vm", r#"{"state": "Paused"}"#, [TooEarly, Done, Done]),
    ("PATCH /vm", r#"{"state": "Resumed"}"#, [TooEarly, Done, Done]),
    ("DELETE /vm", "", [End, Done, Done]),
];

fn action(request: &str, body: &str) -> VmmAction {
    let (method, target) = request.split_once(' ').unwrap();
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    match route(method, path, query, body.as_bytes()).unwrap() {
        Call::Act(action) => action,
        Call::Wait(_) => VmmAction::Wait,
        Call::Document => panic!("the monitor is not asked for the document"),
    }
}

fn kind(result: ActionResult) -> Is {
    match result {
        Ok(VmmData::Empty) => Done,
        Ok(_) => Told,
        Err(ActionError::BeforeStart) => TooEarly,
        Err(ActionError::AfterStart) => TooLate,
        Err(_) => Refused,
    }
}

fn config() -> DomainConfig {
    DomainConfig::from_json(CONFIG.as_bytes()).unwrap()
}

fn pre_boot() -> PreBoot {
    let (clock, logger) = (Arc::new(PhaseClock::new(None)), Arc::new(Logger::new("i")));
    let metrics = Arc::new(Metrics::new(clock.clone(), logger.metrics()));
    PreBoot::new("i", clock, Observer { logger, metrics })
}

fn run_time() -> RunTime {
    let (_, envelopes) = mpsc::channel();
    let ready = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let inbox = Inbox { id: "i".to_owned(), envelopes, ready, waiters: Waiters::default() };
    let clock = Arc::new(PhaseClock::new(None));
    let control = Arc::new(Control::new(clock.clone()).unwrap());
    let shared = Shared {
        buses: Buses::default(),
        control: control.clone(),
        gate: Gate::default(),
        metrics: Vec::new(),
    };
    let vcpus = Vcpus::start(Vec::new(), Arc::new(shared)).unwrap();
    let button = Arc::new(PowerButton::new(Arc::new(Line)));
    let signals = StopSignals::new(Arc::default()).unwrap();
    let timeout = Duration::from_secs(3600);
    let supervisor = Supervisor::new(control.clone(), vcpus, signals, button, timeout, None).unwrap();
    let metrics = Arc::new(Metrics::new(clock.clone(), Arc::default()));
    RunTime {
        inbox,
        config: config().into(),
        platform: Platform::Plain,
        protected: false,
        clock,
        control,
        supervisor: Arc::new(Mutex::new(supervisor)),
        metrics,
    }
}

fn state(run_time: &mut RunTime) -> (VmState, VmState) {
    match (run_time.act(VmmAction::GetInstance), run_time.act(VmmAction::GetStatus)) {
        (Some(Ok(VmmData::Instance(info))), Some(Ok(VmmData::Status(status)))) => (info.state, status.state),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_action_in_each_state() {
    for (request, body, [before, running, paused]) in TABLE {
        let action = || action(request, body);
        let mut pre_boot = pre_boot();
        assert_eq!(pre_boot.act(VmmAction::PutConfig(Box::new(config()))), Step::Answer(Ok(VmmData::Empty)));
        let is = match pre_boot.act(action()) {
            Step::Answer(result) => kind(result),
            Step::Launch(_) => Launch,
            Step::Stop => End,
            Step::Wait => Later,
        };
        assert_eq!(is, *before, "{request} {body} before the start");

        let mut run_time = run_time();
        assert_eq!(run_time.act(action()).map_or(Later, kind), *running, "{request} {body} while it runs");

        let mut run_time = self::run_time();
        assert_eq!(run_time.act(VmmAction::Pause), Some(Ok(VmmData::Empty)));
        assert_eq!(
            run_time.act(action()).map_or(Later, kind),
            *paused,
            "{request} {body} while it is paused"
        );
        let resumed = action() == VmmAction::Resume;
        let expected = if resumed { VmState::Running } else { VmState::Paused };
        assert_eq!(state(&mut run_time), (expected, expected), "{request} {body}");
    }
}

#[test]
fn the_table_has_every_route() {
    for route in ROUTES.iter().filter(|route| route.path != "/openapi.json") {
        let prefix = route.path.split('{').next().unwrap();
        let has = TABLE.iter().any(|(request, _, _)| {
            let path = request.split_once(' ').unwrap().1.split('?').next().unwrap();
            request.starts_with(route.method)
                && if prefix == route.path { path == prefix } else { path.starts_with(prefix) }
        });
        assert!(has, "{} {}", route.method, route.path);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn after_any_sequence_of_requests_the_monitor_answers(
        requests in proptest::collection::vec(0..TABLE.len(), 0..40),
    ) {
        let (mut before, mut after) = (pre_boot(), run_time());
        // The survey asks the host, which takes its time and changes nothing.
        for (request, body, _) in requests.iter().map(|index| TABLE[*index]).filter(|row| row.0 != "GET /host") {
            before.act(action(request, body));
            after.act(action(request, body));
        }
        let told = before.act(VmmAction::GetInstance);
        proptest::prop_assert!(matches!(told, Step::Answer(Ok(VmmData::Instance(_)))));
        let (state, _) = state(&mut after);
        let last = requests.iter().rev().find_map(|index| match TABLE[*index].1 {
            r#"{"state": "Paused"}"# => Some(VmState::Paused),
            r#"{"state": "Resumed"}"# => Some(VmState::Running),
            _ => None,
        });
        proptest::prop_assert_eq!(state, last.unwrap_or(VmState::Running));
    }
}

#[test]
fn what_is_put_together_is_what_is_launched() {
    let mut pre_boot = pre_boot();
    let start = || action("PUT /actions", r#"{"action_type": "InstanceStart"}"#);
    assert_eq!(pre_boot.act(start()), Step::Answer(Err(ActionError::NoBootSource)));
    for (request, body) in [
        ("PUT /boot-source", r#"{"kernel_image_path": "k"}"#),
        ("PUT /drives/d", r#"{"drive_id": "d", "path_on_host": "p"}"#),
    ] {
        assert_eq!(pre_boot.act(action(request, body)), Step::Answer(Ok(VmmData::Empty)));
    }
    assert_eq!(pre_boot.act(start()), Step::Launch(Box::new(config())));
    assert_eq!(
        pre_boot.act(action("PUT /vm?start=true", r#"{"boot-source": {"kernel_image_path": ""}}"#)),
        Step::Answer(Err(ActionError::Config(ConfigError::Empty {
            field: "boot-source.kernel_image_path".to_owned()
        })))
    );
    // A start that was refused, or failed, leaves the configuration that was there.
    assert_eq!(pre_boot.act(start()), Step::Launch(Box::new(config())));
}

#[test]
fn a_stop_is_asked_for_once_however_often_it_is_asked() {
    let mut run_time = run_time();
    for _ in 0..3 {
        assert_eq!(run_time.act(VmmAction::Stop(None)), Some(Ok(VmmData::Empty)));
    }
    assert!(run_time.control.notes().end.is_none(), "it was stopped hard");
    run_time.control.stop(ExitReason::PowerOff, "off".to_owned());
    assert_eq!(run_time.act(VmmAction::Stop(None)), Some(Ok(VmmData::Empty)));
}

#[test]
fn a_path_that_is_taken_or_no_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = Source::Path(directory.path().join("api.sock"));
    let socket = Socket::new(&path).unwrap();
    let taken = Socket::new(&path).err().unwrap().to_string();
    assert!(taken.starts_with("--api-sock: socket ") && taken.contains("EADDRINUSE"), "{taken}");
    drop(socket);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_descriptor_that_does_not_listen_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    let error = Socket::new(&Source::Descriptor(fd)).err().unwrap().to_string();
    assert!(error.starts_with(&format!("--api-sock fd:{fd}: ")), "{error}");
}
