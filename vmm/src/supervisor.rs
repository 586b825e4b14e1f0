//! The lifecycle of a running domain, as a subscriber of the event loop.
//!
//! ```text
//! running ──(pause)──▶ paused ──(resume)──▶ running
//!    │ a reason is noted: the guest powered off, rebooted, panicked, a vCPU failed,
//!    │ a second stop signal, the deadline after the first one
//!    ▼
//! stopped(reason)
//! ```
//!
//! The first stop signal presses the power button (the init of a container's domain is asked by vsock instead) and sets
//! a deadline; the end of
//! the client does the same, once, as nobody is left to ask for it, and so does the API,
//! which may ask as often as it likes. A guest that
//! says it panicked gets a moment to print and to reboot by itself.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_container_protocol::step::Step;
use cofferdam_devices::platform::power::PowerButton;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{info, warn};
use vmm_sys_util::timerfd::TimerFd;

use crate::control::Control;
use crate::signals::StopSignals;
use crate::stop_request::{Answer, StopRequest};
use crate::vcpu::Vcpus;

/// How long vCPUs may take to leave the guest: a vCPU serves an access to a device in microseconds.
const HOLD_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a guest that panicked may go on.
const PANIC_GRACE: Duration = Duration::from_secs(1);

const WAKE: u32 = 0;
const SIGNAL: u32 = 1;
const DEADLINE: u32 = 2;
const CLIENT: u32 = 3;
const CONTAINER: u32 = 4;

/// Watches a running domain, and says when and why it has stopped.
pub struct Supervisor {
    control: Arc<Control>,
    vcpus: Vcpus,
    signals: StopSignals,
    power_button: Arc<PowerButton>,
    /// What is asked for a stop in place of the power button.
    container: Option<StopRequest>,
    stop_timeout: Duration,
    /// The writing end of the status pipe: an error on it means that the reader is gone.
    client: Option<File>,
    timer: TimerFd,
    deadline: Option<Deadline>,
    stop_asked: bool,
    paused: bool,
    panicked: bool,
    stopped: Option<(ExitReason, String)>,
}

/// What happens to a domain that has not ended by itself until then.
struct Deadline {
    at: Instant,
    reason: ExitReason,
    message: String,
}

impl Supervisor {
    /// Watches the domain of `vcpus`.
    pub fn new(
        control: Arc<Control>,
        vcpus: Vcpus,
        signals: StopSignals,
        power_button: Arc<PowerButton>,
        stop_timeout: Duration,
        client: Option<File>,
    ) -> io::Result<Self> {
        Ok(Self {
            control,
            vcpus,
            signals,
            power_button,
            container: None,
            stop_timeout,
            client,
            timer: TimerFd::new()?,
            deadline: None,
            stop_asked: false,
            paused: false,
            panicked: false,
            stopped: None,
        })
    }

    /// Has `request` take the place of the power button.
    pub fn ask_container(&mut self, request: StopRequest) {
        self.container = Some(request);
    }

    /// Why the domain has stopped, once it has.
    pub fn stopped(&self) -> Option<&(ExitReason, String)> {
        self.stopped.as_ref()
    }

    /// Lets the vCPUs run.
    pub fn start(&self) {
        self.vcpus.resume();
    }

    /// Ends the vCPU threads.
    pub fn end(&mut self) {
        self.vcpus.end();
    }

    /// Holds the vCPUs. When this returns `true` they are outside the guest; else they run again.
    pub fn pause(&mut self) -> bool {
        self.control.pause();
        self.look();
        let held = self.vcpus.wait_held(HOLD_TIMEOUT);
        if !held {
            self.resume();
        }
        held
    }

    /// Lets the vCPUs run again.
    pub fn resume(&mut self) {
        self.control.resume();
        self.look();
    }

    /// Presses the power button, or asks the container's init to stop. What the guest does then is its own affair.
    pub fn press_power_button(&mut self) -> io::Result<()> {
        let Some(request) = &mut self.container else { return self.power_button.press() };
        // Before that nobody listens, and nothing runs that could be stopped in order.
        match self.control.notes().step {
            Some(Step::Running | Step::Stopping) => request.send(),
            _ => Err(io::Error::new(io::ErrorKind::NotConnected, "the container does not run")),
        }
    }

    /// Asks for a stop as the first signal does, unless one was asked for; the hard stop comes after `time`, or
    /// else after the time that is configured. Asked again, it can only come earlier.
    pub fn stop(&mut self, time: Option<Duration>) {
        match time {
            _ if !self.stop_asked => self.stop_within(time.unwrap_or(self.stop_timeout)),
            Some(time) => self.stop_hard_after(time),
            None => {}
        }
        self.look();
    }

    /// Acts on what was noted.
    fn look(&mut self) {
        let notes = self.control.notes();
        if notes.panicked && !self.panicked {
            self.panicked = true;
            self.set_deadline(PANIC_GRACE, ExitReason::Panic, "the guest's kernel panicked".to_owned());
        }
        if notes.paused != self.paused {
            self.paused = notes.paused;
            if self.paused { self.vcpus.pause() } else { self.vcpus.resume() }
        }
        self.stopped = notes.end.map(|end| match end {
            (ExitReason::PowerOff, _) if self.stop_asked => {
                (ExitReason::Stopped, "stopped on request: the guest powered off".to_owned())
            }
            end => end,
        });
    }

    fn stop_signal(&mut self) {
        let time = if self.stop_asked { Duration::ZERO } else { self.stop_timeout };
        self.stop_within(time);
    }

    /// Presses the power button, and stops the domain hard after `time`; at once if there is no time, or if it is
    /// paused.
    fn stop_within(&mut self, time: Duration) {
        if time.is_zero() || self.paused {
            self.stop_hard_after(Duration::ZERO);
            return;
        }
        self.stop_asked = true;
        info!("asking the guest to power off");
        match self.press_power_button() {
            Ok(()) => self.stop_hard_after(time),
            Err(error) if self.container.is_some() => self.stop_container_hard(&error),
            Err(error) => {
                warn!("the power button: {error}");
                self.stop_hard_after(time);
            }
        }
    }

    /// Nobody there can stop the container in order.
    fn stop_container_hard(&self, why: &dyn Display) {
        self.control.stop(ExitReason::Stopped, format!("stopped hard on request: {why}"));
    }

    /// The container's init has said something to the request to stop.
    fn container_answered(&mut self, ops: &mut EventOps) {
        let Some(request) = &mut self.container else { return };
        let answer = request.read();
        if answer == Answer::None {
            return;
        }
        // The request stays, as there is to be no other one.
        let _ = ops.remove(Events::empty_raw(request.as_raw_fd()));
        let refusal = "the container's init does not stop it in order";
        match answer {
            Answer::Refused if self.stop_asked => self.stop_container_hard(&refusal),
            Answer::Refused => warn!("{refusal}"),
            Answer::Begun => info!("the container's init has begun to stop"),
            _ => warn!("the container's init gives no answer to the request to stop"),
        }
    }

    fn stop_hard_after(&mut self, time: Duration) {
        if time.is_zero() {
            self.control.stop(ExitReason::Stopped, "stopped hard on request".to_owned());
            return;
        }
        let message = format!(
            "stopped hard: the guest did not power off within {} ms of the request",
            time.as_millis()
        );
        self.set_deadline(time, ExitReason::Stopped, message);
    }

    /// The client is gone. Who had asked for a stop before it went gets no second one.
    fn client_gone(&mut self) {
        warn!("whoever started the domain is gone");
        self.stop(None);
    }

    /// Sets the deadline, unless there is an earlier one.
    fn set_deadline(&mut self, after: Duration, reason: ExitReason, message: String) {
        let now = Instant::now();
        let at = now.checked_add(after).unwrap_or(now);
        if self.deadline.as_ref().is_some_and(|deadline| deadline.at <= at) {
            return;
        }
        match self.timer.reset(after, None) {
            Ok(()) => self.deadline = Some(Deadline { at, reason, message }),
            Err(error) => self.control.stop(reason, format!("{message} (no timer: {error})")),
        }
    }

    /// The timer has expired, unless it was set anew meanwhile: reading it would then block.
    fn deadline(&mut self) {
        if let Some(deadline) = self.deadline.take_if(|deadline| deadline.at <= Instant::now()) {
            let _ = self.timer.wait();
            self.control.stop(deadline.reason, deadline.message);
        }
    }
}

impl MutEventSubscriber for Supervisor {
    fn init(&mut self, ops: &mut EventOps) {
        let mut events = vec![
            Events::with_data(self.control.wake(), WAKE, EventSet::IN),
            Events::with_data(&self.signals, SIGNAL, EventSet::IN),
            Events::with_data(&self.timer, DEADLINE, EventSet::IN),
        ];
        if let Some(client) = &self.client {
            // Errors and hang-ups are reported unasked.
            events.push(Events::with_data(client, CLIENT, EventSet::empty()));
        }
        if let Some(request) = &self.container {
            events.push(Events::with_data(request, CONTAINER, EventSet::IN));
        }
        for event in events {
            let is_client = event.data() == CLIENT;
            if let Err(error) = ops.add(event) {
                // A regular file cannot hang up, and cannot be watched.
                if is_client {
                    continue;
                }
                self.control.stop(ExitReason::MonitorError, format!("event loop: {error}"));
            }
        }
        self.look();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                let _ = self.control.wake().read();
            }
            SIGNAL => (0..self.signals.take()).for_each(|_| self.stop_signal()),
            DEADLINE => self.deadline(),
            CONTAINER => self.container_answered(ops),
            _ => {
                if let Some(client) = self.client.take() {
                    let _ = ops.remove(Events::empty_raw(client.as_raw_fd()));
                }
                self.client_gone();
            }
        }
        self.look();
    }
}

#[cfg(test)]
mod tests;
