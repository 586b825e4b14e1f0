use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use cofferdam_api::actions::{GuestEnd, VmmAction};
use cofferdam_api::config::DomainConfig;
use cofferdam_api::router::{Call, ROUTES, route};
use cofferdam_api::status::{ExitReason, Platform};
use cofferdam_api::validate::ConfigError;
use cofferdam_devices::interrupt::InterruptLine;
use cofferdam_devices::platform::power::PowerButton;
use cofferdam_devices::virtio::block::{Block, BlockFile, BlockOptions, BlockSource};
use cofferdam_devices::virtio::mmio::MmioTransport;
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::pre_boot::Step;
use super::*;
use crate::board::Buses;
use crate::boot::file::ImageFile;
use crate::control::Control;
use crate::gate::Gate;
use crate::image::FileHash;
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

/// Files for all tests, in place of `KERNEL`, `DISK` and `LARGER`. Drives only read them.
fn files() -> &'static TempDir {
    static FILES: OnceLock<TempDir> = OnceLock::new();
    FILES.get_or_init(|| {
        let files = tempfile::tempdir().unwrap();
        for (name, size) in [("KERNEL", 512), ("DISK", 512), ("LARGER", 4096)] {
            std::fs::write(files.path().join(name), vec![1; size]).unwrap();
        }
        files
    })
}

/// `text` with the paths of the files.
fn with_files(text: &str) -> String {
    let path = |name| files().path().join(name).display().to_string();
    ["KERNEL", "DISK", "LARGER"].iter().fold(text.to_owned(), |text, name| text.replace(name, &path(name)))
}

const CONFIG: &str = r#"{"boot-source": {"kernel_image_path": "KERNEL"},
                         "drives": [{"drive_id": "d", "path_on_host": "DISK", "is_read_only": true}]}"#;

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
    /// 400: the domain has stopped.
    Gone,
    /// 400, for another reason.
    Refused,
}

use Is::{Done, End, Gone, Later, Launch, Refused, Told, TooEarly, TooLate};

/// Every request, and what it comes to before the start, while the domain runs, while it is paused, and when it has
/// stopped.
const TABLE: &[(&str, &str, [Is; 4])] = &[
    ("GET /", "", [Told, Told, Told, Gone]),
    ("GET /version", "", [Told, Told, Told, Gone]),
    ("GET /host", "", [Told, Told, Told, Gone]),
    ("GET /vm/config", "", [Told, Told, Told, Gone]),
    ("GET /machine-config", "", [Told, Told, Told, Gone]),
    ("GET /vm", "", [Told, Told, Told, Gone]),
    ("GET /vm/wait", "", [Later, Later, Later, Later]),
    ("PUT /machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#, [Done, TooLate, TooLate, Gone]),
    ("PATCH /machine-config", r#"{"vcpu_count": 2}"#, [Done, TooLate, TooLate, Gone]),
    ("PUT /boot-source", r#"{"kernel_image_path": "KERNEL"}"#, [Done, TooLate, TooLate, Gone]),
    ("PUT /boot-source", r#"{"kernel_image_path": "nowhere"}"#, [Refused, TooLate, TooLate, Gone]),
    ("PUT /drives/e", r#"{"drive_id": "e", "path_on_host": "DISK"}"#, [Done, TooLate, TooLate, Gone]),
    ("PUT /drives/e", r#"{"drive_id": "e", "path_on_host": "nowhere"}"#, [Refused, TooLate, TooLate, Gone]),
    ("PATCH /drives/d", r#"{"drive_id": "d", "path_on_host": "LARGER"}"#, [TooEarly, Done, Done, Gone]),
    (
        "PATCH /drives/d",
        r#"{"drive_id": "d", "path_on_host": "nowhere"}"#,
        [TooEarly, Refused, Refused, Gone],
    ),
    ("PATCH /drives/e", r#"{"drive_id": "e"}"#, [TooEarly, Refused, Refused, Gone]),
    ("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#, [Done, TooLate, TooLate, Gone]),
    ("PUT /serial", "{}", [Done, TooLate, TooLate, Gone]),
    ("PUT /logger", r#"{"level": "Off"}"#, [Done, TooLate, TooLate, Gone]),
    ("PUT /metrics", r#"{"metrics_path": "/dev/null"}"#, [Done, TooLate, TooLate, Gone]),
    ("GET /metrics", "", [Told, Told, Told, Gone]),
    ("PUT /actions", r#"{"action_type": "FlushMetrics"}"#, [TooEarly, Done, Done, Gone]),
    ("PUT /vm", CONFIG, [Done, TooLate, TooLate, Gone]),
    ("PUT /vm?start=true", CONFIG, [Launch, TooLate, TooLate, Gone]),
    ("PUT /actions", r#"{"action_type": "InstanceStart"}"#, [Launch, TooLate, TooLate, Gone]),
    ("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#, [TooEarly, Done, Done, Gone]),
    ("PATCH /vm", r#"{"state": "Paused"}"#, [TooEarly, Done, Done, Gone]),
    ("PATCH /vm", r#"{"state": "Resumed"}"#, [TooEarly, Done, Done, Gone]),
    ("DELETE /vm", "", [End, Done, Done, Done]),
    // This domain has no container. With one: tests/tests/container.
    ("POST /container/exec", r#"{"args": ["a"]}"#, [TooEarly, Refused, Refused, Gone]),
    ("GET /container/exec/x", "", [TooEarly, Refused, Refused, Gone]),
    ("POST /container/kill", r#"{"signal": "TERM"}"#, [TooEarly, Refused, Refused, Gone]),
    ("POST /container/resize", r#"{"columns": 80, "rows": 24}"#, [TooEarly, Refused, Refused, Gone]),
    ("GET /container/stats", "", [TooEarly, Refused, Refused, Gone]),
];

fn action(request: &str, body: &str) -> VmmAction {
    let (method, target) = request.split_once(' ').unwrap();
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    match route(method, path, query, with_files(body).as_bytes()).unwrap() {
        Call::Act(action) => action,
        Call::Wait(_) => VmmAction::Wait,
        Call::Container(_) => {
            VmmAction::ConnectGuest(GuestEnd(Arc::new(UnixStream::pair().unwrap().0.into())))
        }
        Call::Document => panic!("the monitor is not asked for the document"),
    }
}

fn kind(result: ActionResult) -> Is {
    match result {
        Ok(VmmData::Empty) => Done,
        Ok(_) => Told,
        Err(ActionError::BeforeStart) => TooEarly,
        Err(ActionError::AfterStart) => TooLate,
        Err(ActionError::Stopped) => Gone,
        Err(_) => Refused,
    }
}

fn config() -> DomainConfig {
    DomainConfig::from_json(with_files(CONFIG).as_bytes()).unwrap()
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
        page_state: None,
        certificates: None,
        control: control.clone(),
        gate: Gate::default(),
        metrics: Vec::new(),
        policies: Arc::new(Policies::none()),
    };
    let vcpus = Vcpus::start(Vec::new(), Arc::new(shared)).unwrap();
    let button = Arc::new(PowerButton::new(Arc::new(Line)));
    let signals = StopSignals::new(Arc::default()).unwrap();
    let timeout = Duration::from_secs(3600);
    let supervisor = Supervisor::new(control.clone(), vcpus, signals, button, timeout, None).unwrap();
    let metrics = Arc::new(Metrics::new(clock.clone(), Arc::default()));
    let drive = BlockOptions {
        read_only: true,
        ..BlockOptions::new(BlockSource::Path(files().path().join("DISK")), "d")
    };
    let drive = Block::new(BlockFile::open(drive).unwrap()).unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
    let drive = MmioTransport::new(Box::new(drive), memory, None, Arc::new(Line)).unwrap();
    RunTime {
        identity: Default::default(),
        manifest_digest: None,
        file_hash: Arc::new(FileHash::none()),
        waiting_for_hash: Vec::new(),
        inbox,
        virtio: vec![Arc::new(drive)],
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
    for (request, body, [before, running, paused, _]) in TABLE {
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
fn each_action_when_the_domain_has_stopped() {
    // The main thread has given up the inbox, with a request in it, and has not told the outcome yet.
    let (sender, envelopes) = mpsc::channel();
    let ready = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let waiters = Waiters::default();
    let inbox = Inbox { id: "i".to_owned(), envelopes, ready, waiters: waiters.clone() };
    let ask = |request, body| {
        let (reply, answer) = Reply::pair();
        (Envelope { action: action(request, body), reply }, answer)
    };
    let mut rows: Vec<_> =
        TABLE.iter().map(|(request, body, is)| (request, body, is[3], ask(request, body))).collect();
    let late = rows.split_off(TABLE.len() / 2);
    let mut answers = Vec::new();
    for (request, body, is, (envelope, answer)) in rows {
        sender.send(envelope).unwrap();
        answers.push((request, body, is, answer));
    }
    drop(inbox);
    for (request, body, is, (envelope, answer)) in late {
        let SendError(envelope) = sender.send(envelope).unwrap_err();
        waiters.too_late(envelope);
        answers.push((request, body, is, answer));
    }
    for (request, body, is, mut answer) in answers {
        let told = answer.now().map_or(Later, kind);
        assert_eq!(told, is, "{request} {body}");
        if is == Later {
            for reply in waiters.lock().replies.drain(..) {
                reply.send(Ok(VmmData::Empty));
            }
            assert_eq!(answer.now(), Some(Ok(VmmData::Empty)));
        }
    }
}

/// The event loop takes no longer for a turn because somebody has asked for the hash of a large file.
#[test]
fn an_image_is_read_between_other_requests() {
    let image = crate::boot::testing::file(&vec![7; 1 << 20]);
    let (sender, envelopes) = mpsc::channel();
    let mut run_time = run_time();
    run_time.inbox.envelopes = envelopes;
    run_time.file_hash = Arc::new(FileHash::of(Arc::new(ImageFile::open(image.path().into()).unwrap())));
    let ask = |request| {
        let (reply, answer) = Reply::pair();
        sender.send(Envelope { action: action(request, ""), reply }).unwrap();
        answer
    };
    let mut answers = [ask("GET /vm"), ask("GET /vm")];
    let mut turns = 0;
    while answers[0].now().is_none_or(|answer| {
        let Ok(VmmData::Status(status)) = answer else { panic!("{answer:?}") };
        assert!(status.identity.image_hash.is_some());
        false
    }) {
        let mut other = ask("GET /");
        run_time.turn();
        assert!(matches!(other.now(), Some(Ok(VmmData::Instance(_)))));
        turns += 1;
        let again = rustix::io::read(&run_time.inbox, &mut [0; 8]).is_ok();
        assert_eq!(again, turns < 9, "turn {turns}: another one comes as long as there is something to read");
    }
    assert_eq!(turns, 9, "one for each 128 KiB, and the end");
    assert!(matches!(answers[1].now(), Some(Ok(VmmData::Status(_)))));
}

#[test]
fn who_asks_once_the_outcome_is_told_hears_it_at_once() {
    let waiters = Waiters::default();
    let Some(Ok(VmmData::Status(status))) = run_time().act(action("GET /vm", "")) else {
        panic!("no status")
    };
    let wait = || {
        let (reply, answer) = Reply::pair();
        waiters.too_late(Envelope { action: action("GET /vm/wait", ""), reply });
        answer
    };
    let mut before = wait();
    assert_eq!(before.now(), None);
    waiters.tell(*status.clone());
    let told = Some(Ok(VmmData::Status(status)));
    assert_eq!((before.now(), wait().now()), (told.clone(), told));
}

#[test]
fn a_drive_gets_another_file_and_other_limits_or_nothing_of_both() {
    let mut run_time = run_time();
    let drive = |run_time: &RunTime| run_time.config.drives()[0].clone();
    let capacity =
        |run_time: &RunTime| run_time.virtio[0].with_device(|block: &mut Block| block.file().size()).unwrap();
    let before = drive(&run_time);
    for (patch, message) in [
        (r#"{"drive_id": "d", "path_on_host": "nowhere"}"#, "drives[0].path_on_host: nowhere: no such file"),
        (r#"{"drive_id": "d", "path_on_host": ""}"#, "drives[0].path_on_host: is empty"),
        (
            r#"{"drive_id": "d", "path_on_host": "fd:x"}"#,
            "drives[0].path_on_host: \"x\" is not a descriptor from 3 on",
        ),
        (
            r#"{"drive_id": "d", "path_on_host": "fd:987654"}"#,
            "drives[0].path_on_host: fd:987654: no such descriptor is open",
        ),
        (
            r#"{"drive_id": "d", "path_on_host": "nowhere", "rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}"#,
            "drives[0].path_on_host: nowhere: no such file",
        ),
        (r#"{"drive_id": "e", "path_on_host": "LARGER"}"#, "drives: there is no drive \"e\""),
    ] {
        let id = if patch.contains("\"e\"") { "e" } else { "d" };
        match run_time.act(action(&format!("PATCH /drives/{id}"), patch)) {
            Some(Err(error)) => assert_eq!(error.to_string(), message),
            other => panic!("{patch}: {other:?}"),
        }
        assert_eq!((drive(&run_time), capacity(&run_time)), (before.clone(), 512), "{patch}");
    }
    let patch = r#"{"drive_id": "d", "path_on_host": "LARGER", "rate_limiter": {"ops": {"size": 5, "refill_time": 1}}}"#;
    assert_eq!(run_time.act(action("PATCH /drives/d", patch)), Some(Ok(VmmData::Empty)));
    let after = drive(&run_time);
    assert_eq!((after.path_on_host.ends_with("LARGER"), capacity(&run_time)), (true, 4096));
    assert_eq!(after.rate_limiter.unwrap().ops.unwrap().size, 5);
    assert_eq!(run_time.act(action("PATCH /drives/d", r#"{"drive_id": "d"}"#)), Some(Ok(VmmData::Empty)));
    assert_eq!(drive(&run_time), after);
}

#[test]
fn what_a_piece_names_is_looked_at_when_it_comes() {
    let mut pre_boot = pre_boot();
    for (request, body, field) in [
        ("PUT /boot-source", r#"{"kernel_image_path": "nowhere"}"#, "boot-source.kernel_image_path"),
        ("PUT /boot-source", r#"{"kernel_image_path": "/"}"#, "boot-source.kernel_image_path"),
        ("PUT /boot-source", r#"{"kernel_image_path": "fd:987654"}"#, "boot-source.kernel_image_path"),
        (
            "PUT /boot-source",
            r#"{"kernel_image_path": "KERNEL", "initrd_path": "nowhere"}"#,
            "boot-source.initrd_path",
        ),
        ("PUT /drives/d", r#"{"drive_id": "d", "path_on_host": "nowhere"}"#, "drives[0].path_on_host"),
        (
            "PUT /drives/d",
            r#"{"drive_id": "d", "path_on_host": "DISK", "block_size": 4096}"#,
            "drives[0].path_on_host",
        ),
        ("PUT /drives/d", r#"{"drive_id": "d", "path_on_host": "fd:987654"}"#, "drives[0].path_on_host"),
        ("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "fd:987654"}"#, "vsock.uds_path"),
        ("PUT /serial", r#"{"serial_out_path": "fd:987654"}"#, "serial.serial_out_path"),
        ("PUT /vm", r#"{"boot-source": {"kernel_image_path": "nowhere"}}"#, "boot-source.kernel_image_path"),
        (
            "PUT /vm",
            r#"{"boot-source": {"kernel_image_path": "KERNEL"}, "drives": [{"drive_id": "d", "path_on_host": "/"}]}"#,
            "drives[0].path_on_host",
        ),
    ] {
        match pre_boot.act(action(request, body)) {
            Step::Answer(Err(error)) => {
                assert!(error.to_string().starts_with(&format!("{field}: ")), "{error}")
            }
            other => panic!("{request} {body}: {other:?}"),
        }
    }
    assert_eq!(
        pre_boot.act(VmmAction::GetConfig),
        self::pre_boot().act(VmmAction::GetConfig),
        "nothing has changed"
    );
    // A path that is made, and is not there to be looked at yet.
    for (request, body) in [
        ("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "/no/where"}"#),
        ("PUT /serial", r#"{"serial_out_path": "/no/where"}"#),
    ] {
        assert_eq!(pre_boot.act(action(request, body)), Step::Answer(Ok(VmmData::Empty)));
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
        ("PUT /boot-source", r#"{"kernel_image_path": "KERNEL"}"#),
        ("PUT /drives/d", r#"{"drive_id": "d", "path_on_host": "DISK", "is_read_only": true}"#),
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
    assert_eq!(error, format!("--api-sock: fd:{fd}: it was not inherited, or is taken already"));
}
