//! A timer for the event loop.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A descriptor that becomes readable once, after a time.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    /// A timer that does not run.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// The descriptor.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.0
    }

    /// Starts the timer anew, or stops it; either way it is no longer readable.
    pub(super) fn set(&self, wait: Option<Duration>) -> io::Result<()> {
        // A time of 0 would stop it.
        let wait = wait.map_or(Duration::ZERO, |wait| wait.max(Duration::from_nanos(1)));
        let it_value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec as PollTime, poll};

    fn readable(timer: &Timer, wait: i64) -> bool {
        let mut descriptors = [PollFd::new(timer.descriptor(), PollFlags::IN)];
        poll(&mut descriptors, Some(&PollTime { tv_sec: wait, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn it_fires_and_setting_it_takes_that_back() {
        let timer = Timer::new().unwrap();
        assert!(!readable(&timer, 0));
        timer.set(Some(Duration::ZERO)).unwrap();
        assert!(readable(&timer, 10));
        timer.set(Some(Duration::from_secs(1000))).unwrap();
        assert!(!readable(&timer, 0));
        timer.set(Some(Duration::ZERO)).unwrap();
        assert!(readable(&timer, 10));
        timer.set(None).unwrap();
        assert!(!readable(&timer, 0));
    }
}
