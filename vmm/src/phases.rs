//! When each phase of a launch was reached.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cofferdam_api::status::Phases;
use rustix::time::{ClockId, clock_gettime};

/// Notes the first time of each phase, in microseconds since a start.
pub struct PhaseClock {
    start: u64,
    phases: Mutex<Phases>,
}

impl PhaseClock {
    /// `start` is a reading of `CLOCK_MONOTONIC` in microseconds (the command line's own exec), by default now.
    pub fn new(start: Option<u64>) -> Self {
        Self { start: start.unwrap_or_else(now), phases: Mutex::default() }
    }

    /// Phase `name` is reached. Only the first time counts.
    pub fn reached(&self, name: &str) {
        let elapsed = now().saturating_sub(self.start);
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        // The guest may say the same again as often as it likes, and gets no allocation for it.
        if !phases.contains_key(name) {
            phases.insert(name.to_owned(), elapsed);
        }
    }

    /// Goes back to what was reached before a launch that failed.
    pub fn reset(&self, phases: Phases) {
        *self.phases.lock().unwrap_or_else(PoisonError::into_inner) = phases;
    }

    /// What was reached so far.
    pub fn phases(&self) -> Phases {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `CLOCK_MONOTONIC` in microseconds.
fn now() -> u64 {
    micros(ClockId::Monotonic)
}

/// What this process has had of processors so far, all threads together.
pub fn processor_time() -> Duration {
    Duration::from_micros(micros(ClockId::ProcessCPUTime))
}

fn micros(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).saturating_mul(1_000_000).saturating_add(part(time.tv_nsec) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_counts_and_times_grow() {
        let clock = PhaseClock::new(Some(now() - 1000));
        clock.reached("a");
        let first = clock.phases()["a"];
        assert!(first >= 1000);
        std::thread::sleep(Duration::from_millis(2));
        clock.reached("a");
        clock.reached("b");
        assert_eq!(clock.phases()["a"], first);
        assert!(clock.phases()["b"] > first);
    }
}
