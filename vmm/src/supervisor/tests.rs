//! The lifecycle, with a domain that has no vCPUs.

use super::*;
use std::sync::{Mutex, mpsc};
use std::thread;

use cofferdam_devices::bus::BusDevice;
use cofferdam_devices::interrupt::InterruptLine;
use cofferdam_devices::platform::GuestRequests;
use event_manager::SubscriberOps;
use rustix::pipe::pipe;

use crate::board::{Buses, EventLoop};
use crate::gate::Gate;
use crate::phases::PhaseClock;
use crate::seccomp::Policies;
use crate::signals::tests::{raise, stop_signals};
use crate::vcpu::Shared;

/// A deadline that no test waits for.
const NEVER: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(20);

struct Line;

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Domain {
    supervisor: Arc<Mutex<Supervisor>>,
    events: EventLoop,
    control: Arc<Control>,
    power_button: Arc<PowerButton>,
    shared: Arc<Shared>,
}

impl Domain {
    fn new(stop_timeout: Duration) -> Self {
        Self::with_client(stop_timeout, None)
    }

    /// Signals must be raised on the thread that calls this.
    fn with_client(stop_timeout: Duration, client: Option<File>) -> Self {
        let control = Arc::new(Control::new(Arc::new(PhaseClock::new(None))).unwrap());
        let shared = Arc::new(Shared {
            buses: Buses::default(),
            page_state: None,
            certificates: None,
            control: control.clone(),
            gate: Gate::default(),
            metrics: Vec::new(),
            policies: Arc::new(Policies::none()),
        });
        let vcpus = Vcpus::start(Vec::new(), shared.clone()).unwrap();
        let power_button = Arc::new(PowerButton::new(Arc::new(Line)));
        let signals = stop_signals(Arc::default());
        let supervisor =
            Supervisor::new(control.clone(), vcpus, signals, power_button.clone(), stop_timeout, client);
        let supervisor = Arc::new(Mutex::new(supervisor.unwrap()));
        let mut events = EventLoop::new().unwrap();
        events.add_subscriber(supervisor.clone());
        Self { supervisor, events, control, power_button, shared }
    }

    /// Serves what has happened.
    fn turn(&mut self) {
        while self.events.run_with_timeout(0).unwrap() > 0 {}
    }

    fn is_pressed(&self) -> bool {
        let mut pending = [0; 4];
        self.power_button.read(0, &mut pending);
        pending != [0; 4]
    }

    fn stopped(&self) -> Option<(ExitReason, String)> {
        self.supervisor.lock().unwrap().stopped().cloned()
    }

    /// Serves what happens until the domain has stopped.
    fn end(&mut self) -> (ExitReason, String) {
        let end = Instant::now() + Duration::from_secs(240);
        while self.stopped().is_none() {
            assert!(Instant::now() < end, "the domain does not stop");
            self.events.run_with_timeout(1000).unwrap();
        }
        self.stopped().unwrap()
    }
}

#[test]
fn a_domain_that_nobody_asked_to_stop_ends_as_its_guest_says() {
    let mut domain = Domain::new(NEVER);
    domain.turn();
    assert_eq!(domain.stopped(), None);
    domain.control.power_off();
    assert_eq!(domain.end().0, ExitReason::PowerOff);
}

#[test]
fn the_first_signal_presses_the_button_and_the_guest_powers_off() {
    let mut domain = Domain::new(NEVER);
    raise(libc::SIGTERM);
    domain.turn();
    assert!(domain.is_pressed());
    assert_eq!(domain.stopped(), None);
    domain.control.power_off();
    assert_eq!(domain.end(), (ExitReason::Stopped, "stopped on request: the guest powered off".into()));
}

#[test]
fn a_guest_that_does_not_power_off_is_stopped_at_the_deadline() {
    let mut domain = Domain::new(SOON);
    raise(libc::SIGHUP);
    let (reason, message) = domain.end();
    assert_eq!(reason, ExitReason::Stopped);
    assert_eq!(message, "stopped hard: the guest did not power off within 20 ms of the request");
}

#[test]
fn the_second_signal_stops_hard() {
    let hard = (ExitReason::Stopped, "stopped hard on request".to_owned());
    let mut one_after_the_other = Domain::new(NEVER);
    raise(libc::SIGTERM);
    one_after_the_other.turn();
    raise(libc::SIGTERM);
    assert_eq!(one_after_the_other.end(), hard);
    let mut together = Domain::new(NEVER);
    raise(libc::SIGTERM);
    raise(libc::SIGINT);
    assert_eq!(together.end(), hard);
}

#[test]
fn without_time_to_power_off_nobody_presses_the_button() {
    let mut no_time = Domain::new(Duration::ZERO);
    raise(libc::SIGTERM);
    assert_eq!(no_time.end(), (ExitReason::Stopped, "stopped hard on request".into()));
    assert!(!no_time.is_pressed());

    let mut paused = Domain::new(NEVER);
    paused.control.pause();
    paused.turn();
    raise(libc::SIGTERM);
    assert_eq!(paused.end(), (ExitReason::Stopped, "stopped hard on request".into()));
    assert!(!paused.is_pressed());
}

#[test]
fn a_guest_that_panicked_may_reboot_and_is_else_stopped() {
    let mut rebooting = Domain::new(NEVER);
    rebooting.control.panicked();
    rebooting.turn();
    assert_eq!(rebooting.stopped(), None, "it may still print");
    rebooting.control.reset();
    assert_eq!(rebooting.end(), (ExitReason::Panic, "the guest's kernel panicked and rebooted".into()));

    // Also while it is stopping, and has more time for that.
    let mut hanging = Domain::new(NEVER);
    raise(libc::SIGTERM);
    hanging.turn();
    hanging.control.panicked();
    assert_eq!(hanging.end(), (ExitReason::Panic, "the guest's kernel panicked".into()));
}

#[test]
fn the_earlier_deadline_counts() {
    let mut domain = Domain::new(SOON);
    raise(libc::SIGTERM);
    domain.turn();
    domain.control.panicked();
    assert_eq!(domain.end().0, ExitReason::Stopped);
}

#[test]
fn whoever_asks_for_a_stop_may_give_it_less_time() {
    let hard = (ExitReason::Stopped, "stopped hard on request".to_owned());
    let stop = |domain: &Domain, time| domain.supervisor.lock().unwrap().stop(time);
    let mut in_time = Domain::new(NEVER);
    stop(&in_time, Some(SOON));
    assert!(in_time.is_pressed());
    let message = "stopped hard: the guest did not power off within 20 ms of the request";
    assert_eq!(in_time.end(), (ExitReason::Stopped, message.to_owned()));
    let mut at_once = Domain::new(NEVER);
    stop(&at_once, Some(Duration::ZERO));
    assert_eq!((at_once.end(), at_once.is_pressed()), (hard.clone(), false));

    let mut again = Domain::new(NEVER);
    for time in [None, None, Some(NEVER * 2)] {
        stop(&again, time);
        again.turn();
        assert_eq!(again.stopped(), None, "{time:?}");
    }
    stop(&again, Some(SOON));
    stop(&again, Some(NEVER));
    assert_eq!(again.end(), (ExitReason::Stopped, message.to_owned()));
    let mut hurried = Domain::new(NEVER);
    stop(&hurried, None);
    stop(&hurried, Some(Duration::ZERO));
    assert_eq!(hurried.end(), hard);
}

#[test]
fn a_client_that_goes_stops_its_domain_in_order() {
    let (reader, writer) = pipe().unwrap();
    let mut domain = Domain::with_client(NEVER, Some(writer.into()));
    domain.turn();
    assert!(!domain.is_pressed());
    drop(reader);
    domain.turn();
    assert!(domain.is_pressed());
    assert_eq!(domain.stopped(), None);
    raise(libc::SIGTERM);
    assert_eq!(domain.end(), (ExitReason::Stopped, "stopped hard on request".into()));
}

#[test]
fn a_client_that_goes_after_its_signal_does_not_ask_twice() {
    let (reader, writer) = pipe().unwrap();
    let mut domain = Domain::with_client(NEVER, Some(writer.into()));
    raise(libc::SIGTERM);
    domain.turn();
    drop(reader);
    domain.turn();
    assert_eq!(domain.stopped(), None);
}

#[test]
fn a_file_is_no_client_that_can_go() {
    let mut domain = Domain::with_client(NEVER, Some(tempfile::tempfile().unwrap()));
    domain.turn();
    assert_eq!(domain.stopped(), None);
    assert!(!domain.is_pressed());
}

#[test]
fn vcpus_pass_only_while_the_domain_runs() {
    let mut domain = Domain::new(NEVER);
    domain.supervisor.lock().unwrap().start();
    domain.control.pause();
    domain.turn();
    let (sender, passed) = mpsc::channel();
    let shared = domain.shared.clone();
    let thread = thread::spawn(move || sender.send(shared.gate.pass()).unwrap());
    assert!(passed.recv_timeout(Duration::from_millis(50)).is_err());
    domain.control.resume();
    domain.turn();
    assert!(passed.recv().unwrap());
    thread.join().unwrap();
    domain.supervisor.lock().unwrap().end();
    assert!(!domain.shared.gate.pass());
}
