//! When the driver is told of what was answered: at once, or together with what follows.
//!
//! An interrupt is dear to a guest: over virtio-mmio it costs two exits to the monitor beside the interruption itself. A
//! drive in the page cache answers a request before the guest has made the next, so each would have its own, and a guest
//! whose CPU is busy with many requests would spend much of its time on them.
//!
//! How many requests the guest keeps going is not visible to a device that is quicker than the guest. So now and then a
//! *probe* withholds the interrupt until nothing more comes: by then all of the guest's requests wait for an
//! answer, and their number is what the guest keeps going. Up to the next probe half of them are told of together: the
//! guest has the other half to go on with, and one that keeps up to three requests going is told at once. Should
//! less come than that, it is as after a probe.
//!
//! Nothing more comes, it is taken, when nothing has come for some times as long as it usually takes.

use std::time::{Duration, Instant};

/// The longest time for which the driver is not told.
const LONGEST: Duration = Duration::from_millis(1);
/// How many times as long as usual it takes until nothing more comes.
const PATIENCE: u32 = 4;
/// Weight of the latest time between two answers in the usual one: one in so many.
const WEIGHT: u32 = 8;
/// Interrupts from one probe to the next; twice as many after each that shows that the guest is to be told at once.
const PROBE_AFTER: u32 = 128;
const PROBE_AFTER_MOST: u32 = 1024;
/// Requests that a guest is taken to keep going, at most.
const MOST: u32 = 32;

/// What is known of the guest's ways.
#[derive(Debug)]
pub(super) struct Moderation {
    /// Answers that the driver was not told of.
    held: u32,
    /// Answers that are told of together.
    batch: u32,
    /// Time between two turns with answers, usually.
    usual: Duration,
    /// When the latest answer was given.
    latest: Instant,
    /// Interrupts until the next probe; 0: this is one.
    until_probe: u32,
    probe_after: u32,
}

impl Moderation {
    /// Of a guest of which nothing is known, as of `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            held: 0,
            batch: 1,
            usual: LONGEST,
            latest: now,
            until_probe: PROBE_AFTER,
            probe_after: PROBE_AFTER,
        }
    }

    /// A turn has answered `count` requests, one at least.
    pub(super) fn answered(&mut self, count: u32, now: Instant) {
        let time = now.saturating_duration_since(self.latest).min(LONGEST);
        let sum = self.usual.saturating_mul(WEIGHT.saturating_sub(1)).saturating_add(time);
        self.usual = sum.checked_div(WEIGHT).unwrap_or(time);
        self.latest = now;
        self.held = self.held.saturating_add(count);
    }

    /// Whether there are answers that the driver was not told of.
    pub(super) fn holds(&self) -> bool {
        self.held > 0
    }

    /// How long the driver need not be told yet, as of `now`; `None`: it is to be told.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        if self.until_probe > 0 && self.held >= self.batch {
            self.until_probe = self.until_probe.saturating_sub(1);
            return None;
        }
        let patience = self.usual.saturating_mul(PATIENCE).min(LONGEST);
        let wait = patience.saturating_sub(now.saturating_duration_since(self.latest));
        if self.held < MOST && !wait.is_zero() {
            return Some(wait);
        }
        // Nothing more comes.
        self.batch = (self.held / 2).clamp(1, MOST / 2);
        self.probe_after = match self.batch {
            1 => self.probe_after.saturating_mul(2).min(PROBE_AFTER_MOST),
            _ => PROBE_AFTER,
        };
        self.until_probe = self.probe_after;
        None
    }

    /// The driver was told.
    pub(super) fn told(&mut self) {
        self.held = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that keeps `depth` requests going, and needs `step` to make the next one.
    struct Guest {
        moderation: Moderation,
        now: Instant,
        /// Requests that it may make without an answer.
        ready: u32,
        interrupts: u32,
        answers: u32,
    }

    impl Guest {
        fn new(depth: u32) -> Self {
            let now = Instant::now();
            Self { moderation: Moderation::new(now), now, ready: depth, interrupts: 0, answers: 0 }
        }

        /// Makes `count` requests; returns for how long it could make none.
        fn run(&mut self, count: u32, step: Duration) -> Duration {
            let mut idle = Duration::ZERO;
            let mut made = 0;
            while made < count {
                if self.ready > 0 {
                    self.now += step;
                    self.ready -= 1;
                    made += 1;
                    self.answers += 1;
                    self.moderation.answered(1, self.now);
                } else {
                    assert!(self.moderation.holds(), "the guest waits for an interrupt that will not come");
                }
                match self.moderation.wait(self.now) {
                    None => {
                        self.ready += self.moderation.held;
                        self.moderation.told();
                        self.interrupts += 1;
                    }
                    Some(wait) if self.ready == 0 => {
                        assert!(wait <= LONGEST);
                        self.now += wait;
                        idle += wait;
                    }
                    Some(_) => {}
                }
            }
            idle
        }
    }

    const STEPS: [Duration; 3] =
        [Duration::from_micros(3), Duration::from_micros(30), Duration::from_micros(300)];

    #[test]
    fn one_that_keeps_many_going_gets_few_interrupts() {
        for step in STEPS {
            for (depth, least) in [(4, 1.8), (8, 3.5), (32, 12.0), (256, 12.0)] {
                let mut guest = Guest::new(depth);
                guest.run(1_000, step);
                (guest.answers, guest.interrupts) = (0, 0);
                let idle = guest.run(10_000, step);
                let each = f64::from(guest.answers) / f64::from(guest.interrupts);
                assert!(each > least, "depth {depth}, {step:?}: {each} answers each");
                let share = idle.as_secs_f64() / (10_000.0 * step.as_secs_f64());
                assert!(share < 0.03, "depth {depth}, {step:?}: idle for {share} of the time");
            }
        }
    }

    #[test]
    fn one_that_keeps_few_going_hardly_waits() {
        for step in STEPS {
            for depth in 1..=3 {
                let mut guest = Guest::new(depth);
                guest.run(10_000, step);
                let idle = guest.run(10_000, step);
                let share = idle.as_secs_f64() / (10_000.0 * step.as_secs_f64());
                assert!(share < 0.01, "depth {depth}, {step:?}: idle for {share} of the time");
            }
        }
    }

    #[test]
    fn one_that_changes_its_ways_waits_once() {
        for (before, after) in [(8, 1), (8, 3), (32, 2)] {
            let mut guest = Guest::new(before);
            guest.run(2_000, STEPS[0]);
            guest.ready = guest.ready.saturating_sub(before - after);
            let idle = guest.run(100, STEPS[0]);
            assert!(idle <= 2 * LONGEST, "{before} to {after}: {idle:?}");
        }
        let mut guest = Guest::new(1);
        guest.run(100_000, STEPS[0]);
        guest.ready += 7;
        guest.run(2 * PROBE_AFTER_MOST, STEPS[0]);
        assert!(guest.moderation.batch >= 4);
    }

    #[test]
    fn seldom_requests_are_told_of_at_once() {
        let mut guest = Guest::new(1);
        let mut idle = 0;
        for _ in 0..1_000 {
            idle += u32::from(guest.run(1, Duration::from_millis(20)) > Duration::ZERO);
        }
        assert!(idle < 10, "{idle} of 1,000 had to wait");
    }
}
