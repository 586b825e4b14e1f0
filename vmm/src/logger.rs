//! The monitor's log: a subscriber of `tracing` whose settings can be changed at any time.
//!
//! Lines of text are Firecracker's:
//!
//! ```text
//! 2026-11-27T03:52:19.541626731Z [ID:THREAD:WARN:vmm/src/start.rs:218] message field=value
//! ```
//!
//! with level and origin if they are asked for; lines of JSON are objects. Writing never waits: a line that
//! cannot be written is counted, and lost.

use std::fmt::{self, Write};
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{iter, thread};

use cofferdam_api::observe::{LogFormat, LogLevel, LoggerConfig};
use cofferdam_api::source::Source;
use cofferdam_metrics::{Counter, group};
use serde_json::{Map, Value};
use thiserror::Error;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber, callsite};

use crate::lines::Lines;
use crate::seccomp::violation;

/// How long the last line may take when the monitor ends.
const FAREWELL: Duration = Duration::from_secs(1);

group! {
    /// Of log and metrics.
    pub struct LoggerMetrics {
        /// Times that metrics could not be written
        pub missed_metrics_count: Counter,
        /// Lines of the log that could not be written
        pub missed_log_count: Counter,
    }
}

/// Why the log does not go where it is wanted.
#[derive(Debug, Error)]
#[error("log_path: {path}: {error}")]
pub struct LoggerError {
    /// Where it was to go.
    path: String,
    /// What is wrong with that.
    #[source]
    error: io::Error,
}

/// Settings that can be applied.
pub struct Settings<'a> {
    target: Option<Lines>,
    config: &'a LoggerConfig,
}

/// The log of this process.
pub struct Logger {
    id: String,
    metrics: Arc<LoggerMetrics>,
    state: Mutex<State>,
}

struct State {
    target: Option<Lines>,
    /// Whether that is not standard error.
    is_elsewhere: bool,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
    format: LogFormat,
}

impl Logger {
    /// The log of the domain `id`, on standard error until it is configured otherwise.
    pub fn new(id: &str) -> Self {
        let stderr = io::stderr().as_fd().try_clone_to_owned();
        Self {
            id: id.to_owned(),
            metrics: Arc::default(),
            state: Mutex::new(State {
                target: stderr.ok().map(Lines::shared),
                is_elsewhere: false,
                level: LevelFilter::INFO,
                show_level: false,
                show_origin: false,
                module: None,
                format: LogFormat::Text,
            }),
        }
    }

    /// Makes it the log of everything in this process.
    pub fn install(self: &Arc<Self>) {
        // It fails only where there is one already.
        let _ = tracing::subscriber::set_global_default(self.clone());
    }

    /// What is counted of the log, and of writing metrics.
    pub fn metrics(&self) -> Arc<LoggerMetrics> {
        self.metrics.clone()
    }

    /// Does what `config` says. On an error all stays as it is.
    pub fn configure(&self, config: &LoggerConfig) -> Result<(), LoggerError> {
        self.apply(self.prepare(config)?);
        Ok(())
    }

    /// What of `config` may fail.
    pub fn prepare<'a>(&self, config: &'a LoggerConfig) -> Result<Settings<'a>, LoggerError> {
        let target = config.log_path.as_deref().map(|path| {
            Source::of(path)
                .map_err(io::Error::other)
                .and_then(|source| Lines::open(&source))
                .map_err(|error| LoggerError { path: path.to_string_lossy().into_owned(), error })
        });
        Ok(Settings { target: target.transpose()?, config })
    }

    /// The rest of it.
    pub fn apply(&self, Settings { target, config }: Settings<'_>) {
        let mut state = self.lock();
        let former = target.map(|target| {
            state.is_elsewhere = true;
            state.target.replace(target)
        });
        state.level = match config.level.unwrap_or_default() {
            LogLevel::Off => LevelFilter::OFF,
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warning => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        };
        state.show_level = config.show_level.unwrap_or(state.show_level);
        state.show_origin = config.show_log_origin.unwrap_or(state.show_origin);
        state.format = config.log_format.unwrap_or(state.format);
        if config.module.is_some() {
            state.module.clone_from(&config.module);
        }
        if let (true, Some(target)) = (state.is_elsewhere, &state.target) {
            violation::set_log(target.descriptor(), state.format == LogFormat::Json);
        }
        drop(state);
        // Not before nobody finds it any more.
        drop(former);
        // Each place that logs remembers whether it is wanted, and asks again now.
        callsite::rebuild_interest_cache();
    }

    /// Gives the last line a moment to be written.
    pub fn finish(&self) {
        if let Some(target) = &mut self.lock().target {
            target.finish(FAREWELL);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let state = self.lock();
        let of_module = state.module.as_ref().is_none_or(|module| metadata.target().starts_with(module));
        !metadata.is_span() && *metadata.level() <= state.level && of_module
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.lock().level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut state = self.lock();
        let line = state.line(&self.id, event);
        let written = state.target.as_mut().map(|target| target.write(line.as_bytes()));
        if !matches!(written, Some(Ok(()))) {
            self.metrics.missed_log_count.count();
        }
    }

    // The monitor has no spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

impl State {
    fn line(&self, id: &str, event: &Event<'_>) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut said = Said::default();
        event.record(&mut said);
        let metadata = event.metadata();
        let thread = thread::current();
        let head = Head {
            time: timestamp(now),
            id,
            thread: thread.name().unwrap_or("-"),
            level: metadata.level().as_str(),
            module: metadata.target(),
            origin: metadata.file().zip(metadata.line()).filter(|_| self.show_origin),
        };
        match self.format {
            LogFormat::Text => head.text(&said, self.show_level),
            LogFormat::Json => head.json(said),
        }
    }
}

/// What a line begins with.
struct Head<'a> {
    time: String,
    id: &'a str,
    thread: &'a str,
    level: &'a str,
    module: &'a str,
    origin: Option<(&'a str, u32)>,
}

impl Head<'_> {
    fn text(&self, said: &Said, show_level: bool) -> String {
        let mut text = format!("{} [{}:{}", self.time, self.id, self.thread);
        // Writing to a string cannot fail.
        if show_level {
            let _ = write!(text, ":{}", self.level);
        }
        if let Some((file, line)) = self.origin {
            let _ = write!(text, ":{file}:{line}");
        }
        let _ = write!(text, "] {}", said.message);
        for (name, value) in &said.fields {
            let _ = match value {
                Value::String(value) => write!(text, " {name}={value}"),
                value => write!(text, " {name}={value}"),
            };
        }
        // A name from a file or a client must not begin another line, nor talk to a terminal.
        text.chars()
            .map(|char| if char.is_control() { '\u{FFFD}' } else { char })
            .chain(iter::once('\n'))
            .collect()
    }

    fn json(&self, said: Said) -> String {
        let mut map = Map::new();
        let mut put = |name: &str, value: Value| map.insert(name.to_owned(), value);
        put("timestamp", self.time.as_str().into());
        put("level", self.level.into());
        put("id", self.id.into());
        put("thread", self.thread.into());
        put("module", self.module.into());
        if let Some((file, line)) = self.origin {
            put("file", file.into());
            put("line", line.into());
        }
        put("message", said.message.into());
        if !said.fields.is_empty() {
            put("fields", said.fields.into());
        }
        format!("{}\n", Value::Object(map))
    }
}

/// What an event says.
#[derive(Default)]
struct Said {
    message: String,
    fields: Map<String, Value>,
}

impl Said {
    fn add(&mut self, field: &Field, value: Value) {
        self.fields.insert(field.name().to_owned(), value);
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.add(field, format!("{value:?}").into());
        }
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
}

/// A time since 1970 as RFC 3339 has it, in UTC.
fn timestamp(time: Duration) -> String {
    let (days, second) = (time.as_secs() / 86_400, time.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let nanosecond = time.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanosecond:09}Z")
}

/// Year, month and day of day number `days` since 1970.
fn date(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146,097 days, whatever they begin with.
    let mut year = (days / 146_097).saturating_mul(400).saturating_add(1970);
    let mut rest = days % 146_097;
    while let Some(less) = rest.checked_sub(if leap(year) { 366 } else { 365 }) {
        (year, rest) = (year.saturating_add(1), less);
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1_u64;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        let Some(less) = rest.checked_sub(length) else { break };
        (month, rest) = (month.saturating_add(1), less);
    }
    (year, month, rest.saturating_add(1))
}

#[cfg(test)]
mod tests;
