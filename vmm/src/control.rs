//! What is known of a running domain, and what is wanted of it. Any thread
//! writes here; the event loop is woken and acts.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cofferdam_api::status::ExitReason;
use cofferdam_container_protocol::step::{Report, Step};
use cofferdam_devices::platform::GuestRequests;
use cofferdam_firmware::reason::Reason;
use tracing::{info, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::phases::PhaseClock;

/// Shared knowledge of a domain.
pub struct Control {
    notes: Mutex<Notes>,
    wake: EventFd,
    phases: Arc<PhaseClock>,
    /// A sign of life of the kernel is waited for.
    expecting: AtomicBool,
}

/// What was noted.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Why the domain is to end; the first reason stays.
    pub end: Option<(ExitReason, String)>,
    /// The guest's exit code, the last one given.
    pub exit_code: Option<u8>,
    /// The guest's kernel said that it panicked.
    pub panicked: bool,
    /// The vCPUs are to be held.
    pub paused: bool,
    /// The kernel gave a sign of life, and the first stage is over.
    pub kernel_lives: bool,
    /// How far init of a container's domain says that it has come.
    pub step: Option<Step>,
    /// What failed there: what the domain ends of, else what was reported first.
    pub failure: Option<Report>,
}

impl Control {
    /// Nothing noted yet.
    pub fn new(phases: Arc<PhaseClock>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { notes: Mutex::default(), wake, phases, expecting: AtomicBool::new(false) })
    }

    /// Ends the domain, unless an end is already noted.
    pub fn stop(&self, reason: ExitReason, message: String) {
        self.note(|notes| {
            notes.end.get_or_insert((reason, message));
        });
    }

    /// From here on the first stage runs, and [`Self::guest_acted`] says when it is over.
    pub fn expect_kernel(&self) {
        self.expecting.store(true, Ordering::Relaxed);
    }

    /// The guest accessed a device. The first stage accesses none unless it refuses to go on: so the kernel lives. Called
    /// at every access, and does something at the first one only.
    pub fn guest_acted(&self) {
        if self.expecting.load(Ordering::Relaxed) && self.expecting.swap(false, Ordering::Relaxed) {
            self.note(|notes| notes.kernel_lives = true);
        }
    }

    /// Holds the vCPUs outside the guest.
    pub fn pause(&self) {
        self.note(|notes| notes.paused = true);
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        self.note(|notes| notes.paused = false);
    }

    /// What is noted now.
    pub fn notes(&self) -> Notes {
        self.lock().clone()
    }

    /// Readable when something was noted; the event loop reads it empty.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    fn note(&self, change: impl FnOnce(&mut Notes)) {
        change(&mut self.lock());
        self.wake_up();
    }

    fn wake_up(&self) {
        // It fails only when the counter is full, and then the loop is awake.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestRequests for Control {
    fn power_off(&self) {
        self.stop(ExitReason::PowerOff, "the guest powered off".to_owned());
    }

    fn reset(&self) {
        self.note(|notes| {
            let end = if notes.panicked {
                (ExitReason::Panic, "the guest's kernel panicked and rebooted".to_owned())
            } else {
                (ExitReason::Reboot, "the guest rebooted".to_owned())
            };
            notes.end.get_or_insert(end);
        });
    }

    fn panicked(&self) {
        self.note(|notes| notes.panicked = true);
    }

    fn exit_code(&self, code: u8) {
        self.lock().exit_code = Some(code);
    }

    fn user_space(&self) {
        self.phases.reached("user_space");
    }

    /// Steps go forward only, and one failure is kept. So however much a guest reports, little of it is news.
    fn step(&self, report: u32) {
        let report = Report::from_number(report);
        let (advances, fails) = {
            let notes = &mut *self.lock();
            let advances = notes.step.is_none_or(|step| step.number() < report.step.number());
            let ends = report.fatal && notes.end.is_none();
            let fails = ends || report.reason.is_some() && notes.failure.is_none();
            if advances {
                notes.step = Some(report.step);
            }
            if fails {
                notes.failure = Some(report);
            }
            if ends {
                let message = format!("the guest's init stopped the domain: {report}");
                notes.end = Some((ExitReason::RefusedByGuest, message));
            }
            (advances, fails)
        };
        if advances && Step::ALL.contains(&report.step) {
            self.phases.reached(&format!("init_{}", report.step));
        }
        if fails {
            warn!("the guest's init reports: {report}");
        } else if advances {
            info!("the guest's init reports: {report}");
        }
        if advances || fails {
            self.wake_up();
        }
    }

    fn refused(&self, reason: u8) {
        let message = match Reason::from_code(reason) {
            Some(reason) => format!("the first stage stopped the domain: {reason}"),
            None => format!("the guest stopped itself, for the unknown reason {reason}"),
        };
        self.stop(ExitReason::RefusedByGuest, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        Control::new(Arc::new(PhaseClock::new(None))).unwrap()
    }

    fn end(control: &Control) -> ExitReason {
        control.notes().end.unwrap().0
    }

    #[test]
    fn the_first_reason_stays() {
        let control = control();
        control.power_off();
        control.reset();
        assert_eq!(end(&control), ExitReason::PowerOff);
        assert!(control.wake().read().is_ok());
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let (rebooted, panicked) = (control(), control());
        rebooted.reset();
        panicked.panicked();
        assert!(panicked.notes().end.is_none(), "the guest may still print");
        panicked.reset();
        assert_eq!(end(&rebooted), ExitReason::Reboot);
        assert_eq!(end(&panicked), ExitReason::Panic);
    }

    #[test]
    fn the_first_access_after_the_first_stage_counts() {
        let control = control();
        control.guest_acted();
        assert!(!control.notes().kernel_lives, "nobody waits for it");
        control.expect_kernel();
        assert!(!control.notes().kernel_lives);
        control.guest_acted();
        assert!(control.notes().kernel_lives && control.wake().read().is_ok());
        control.guest_acted();
        assert!(control.wake().read().is_err(), "the second one wakes nobody");
    }

    #[test]
    fn a_refusal_is_told_in_words() {
        for (code, words) in
            [(7, "the first stage stopped the domain: kernel hash mismatch"), (0, "unknown reason 0")]
        {
            let control = control();
            control.refused(code);
            let (reason, message) = control.notes().end.unwrap();
            assert_eq!(reason, ExitReason::RefusedByGuest);
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn steps_go_forward_and_wake_the_loop_then_only() {
        let control = control();
        let woken = || control.wake().read().is_ok();
        for (report, step, news) in [
            (0x7FFF_0002, 2, true),
            (0x7FFF_0002, 2, false),
            (0x7FFF_0001, 2, false),
            (0x7FFF_00C8, 200, true),
        ] {
            control.step(report);
            let notes = control.notes();
            assert_eq!((notes.step, notes.failure), (Some(Step::from_number(step)), None), "{report:#x}");
            assert_eq!(woken(), news, "{report:#x}");
        }
        assert_eq!(control.notes().end, None);
    }

    #[test]
    fn the_first_failure_stays_unless_the_domain_ends_of_another() {
        let control = control();
        let failure = || control.notes().failure.map(|failure| failure.to_string());
        control.step(0x0002_0B08);
        control.step(0x0003_0B08);
        assert_eq!(failure().unwrap(), "running: layer 2 verity failure");
        assert_eq!(control.notes().end, None);
        control.step(0x8001_0B08);
        control.step(0x8000_0B08);
        assert_eq!(failure().unwrap(), "running: layer 1 verity failure");
        let message = "the guest's init stopped the domain: running: layer 1 verity failure".to_owned();
        assert_eq!(control.notes().end, Some((ExitReason::RefusedByGuest, message)));
    }

    #[test]
    fn a_failure_after_the_end_ends_nothing() {
        let control = control();
        control.power_off();
        control.step(0x8001_0B08);
        assert_eq!(end(&control), ExitReason::PowerOff);
    }

    #[test]
    fn the_last_exit_code_counts() {
        let control = control();
        assert_eq!(control.notes().exit_code, None);
        control.exit_code(3);
        control.exit_code(0);
        assert_eq!(control.notes().exit_code, Some(0));
    }
}
