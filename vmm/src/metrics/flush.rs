//! Metrics as lines of JSON in a file: now and then, when asked, and at the end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cofferdam_api::source::Source;
use cofferdam_metrics::{Group, JsonLine};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use thiserror::Error;
use tracing::warn;
use vmm_sys_util::timerfd::TimerFd;

use super::Metrics;
use crate::lines::Lines;
use crate::logger::LoggerMetrics;

/// Time between two lines.
pub const PERIOD: Duration = Duration::from_secs(60);

/// Why metrics are not written.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// They go somewhere already.
    #[error("Reinitialization of metrics not allowed.")]
    Again,
    /// Where they are to go cannot be opened.
    #[error("metrics_path: {path}: {error}")]
    Open {
        /// Where they are to go.
        path: String,
        /// What is wrong with that.
        #[source]
        error: io::Error,
    },
    /// A line cannot be written.
    #[error("metrics cannot be written to {path}: {error}")]
    Write {
        /// Where they go.
        path: String,
        /// What is wrong with that.
        #[source]
        error: io::Error,
    },
}

/// Writes lines, each with what has come since the one before.
pub struct Flusher {
    path: PathBuf,
    lines: Lines,
    /// What the last line was made of.
    before: Vec<Group>,
    /// The last line could not be written.
    failing: bool,
}

impl Flusher {
    /// To `path`, which may be `fd:N`.
    pub fn open(path: &Path) -> Result<Self, MetricsError> {
        let name = path.to_string_lossy();
        let lines = Source::of(path)
            .map_err(io::Error::other)
            .and_then(|source| Lines::open(&source))
            .map_err(|error| MetricsError::Open { path: name.into_owned(), error })?;
        Ok(Self { path: path.to_owned(), lines, before: Vec::new(), failing: false })
    }

    /// Where lines go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a line of `groups`. If it cannot be written, the next one has what it was to have; that is counted in
    /// `logger`, and the first time of several in a row it is logged.
    pub fn write(&mut self, groups: Vec<Group>, logger: &LoggerMetrics) -> Result<(), MetricsError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let utc_timestamp_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let line = JsonLine { utc_timestamp_ms, groups: &groups, before: &self.before };
        let written = serde_json::to_vec(&line).map_err(io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            self.lines.write(&line)
        });
        let failed_before = std::mem::replace(&mut self.failing, written.is_err());
        if let Err(error) = written {
            let error = MetricsError::Write { path: self.path.display().to_string(), error };
            logger.missed_metrics_count.count();
            if !failed_before {
                warn!("{error}; further failures are only counted");
            }
            return Err(error);
        }
        self.before = groups;
        Ok(())
    }
}

/// Has a line written now and then. A subscriber of the event loop.
pub struct FlushTimer {
    metrics: Arc<Metrics>,
    timer: TimerFd,
}

impl FlushTimer {
    /// A timer that runs.
    pub fn new(metrics: Arc<Metrics>, period: Duration) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(period, Some(period))?;
        Ok(Self { metrics, timer })
    }
}

impl MutEventSubscriber for FlushTimer {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            warn!("metrics are only written when asked for: event loop: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It is readable, so this does not wait.
        let _ = self.timer.wait();
        // A failure was logged and counted.
        let _ = self.metrics.flush();
    }
}
