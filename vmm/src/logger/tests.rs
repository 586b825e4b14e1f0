use std::fs;
use std::path::{Path, PathBuf};

use tracing::{Level, debug, enabled, error, info, subscriber, warn};

use super::*;

/// A log in a file.
struct Log {
    logger: Arc<Logger>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Log {
    fn new(config: LoggerConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let logger = Arc::new(Logger::new("domain-1"));
        logger.configure(&LoggerConfig { log_path: Some(path.clone()), ..config }).unwrap();
        Self { logger, path, _directory: directory }
    }

    /// What the log has after `action`.
    fn after(&self, action: impl FnOnce()) -> String {
        subscriber::with_default(self.logger.clone(), action);
        fs::read_to_string(&self.path).unwrap()
    }
}

fn level(level: LogLevel) -> LoggerConfig {
    LoggerConfig { level: Some(level), ..LoggerConfig::default() }
}

#[test]
fn lines_of_text_have_what_is_asked_for() {
    let log = Log::new(LoggerConfig::default());
    let text = log.after(|| warn!(count = 3, dropped = None::<u64>, name = %"x", "what {}", "happened"));
    let thread = thread::current().name().unwrap().to_owned();
    let (time, rest) = text.split_once(' ').unwrap();
    assert_eq!((time.len(), time.ends_with('Z')), ("2026-11-27T03:52:19.541626731Z".len(), true), "{time}");
    assert_eq!(rest, format!("[domain-1:{thread}] what happened count=3 name=x\n"));

    let log =
        Log::new(LoggerConfig { show_level: Some(true), show_log_origin: Some(true), ..Default::default() });
    let (text, line) = (log.after(|| warn!("what")), line!());
    assert!(text.ends_with(&format!("[domain-1:{thread}:WARN:{}:{line}] what\n", file!())), "{text}");
}

#[test]
fn a_message_cannot_begin_another_line() {
    let log = Log::new(LoggerConfig::default());
    let text = log.after(|| warn!("{}", "a\n2026 [x] forged\x1b[2J"));
    assert_eq!((text.lines().count(), text.contains('\x1b')), (1, false), "{text}");
}

#[test]
fn lines_of_json_are_objects() {
    let log = Log::new(LoggerConfig {
        log_format: Some(LogFormat::Json),
        show_log_origin: Some(true),
        ..Default::default()
    });
    let text = log.after(|| {
        error!(dropped = Some(7_u64), flag = true, "a \"quoted\"\nline");
        info!("plain");
    });
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["level"], "ERROR");
    assert_eq!(lines[0]["id"], "domain-1");
    assert_eq!(lines[0]["module"], module_path!());
    assert_eq!((&lines[0]["file"], &lines[0]["message"]), (&file!().into(), &"a \"quoted\"\nline".into()));
    assert_eq!(lines[0]["fields"], serde_json::json!({"dropped": 7, "flag": true}));
    assert!(lines[1].get("fields").is_none() && lines[1]["timestamp"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn levels_and_modules_are_chosen_and_can_be_changed() {
    let say = || {
        error!("an error");
        warn!("a warning");
        info!("an info");
        debug!("a debug");
    };
    let log = Log::new(level(LogLevel::Warning));
    assert_eq!(log.after(say).lines().count(), 2);
    log.logger.configure(&level(LogLevel::Debug)).unwrap();
    assert_eq!(log.after(say).lines().count(), 2 + 4);
    log.after(|| assert!(enabled!(Level::DEBUG) && !enabled!(Level::TRACE)));
    log.logger.configure(&level(LogLevel::Off)).unwrap();
    assert_eq!(log.after(say).lines().count(), 6);
    // Without a level it is Info again.
    log.logger.configure(&LoggerConfig::default()).unwrap();
    assert_eq!(log.after(say).lines().count(), 6 + 3);
    let module = |name: &str| LoggerConfig { module: Some(name.to_owned()), ..LoggerConfig::default() };
    log.logger.configure(&module("cofferdam_vmm::api")).unwrap();
    assert_eq!(log.after(say).lines().count(), 9);
    log.logger.configure(&module("cofferdam_vmm::log")).unwrap();
    assert_eq!(log.after(say).lines().count(), 9 + 3);
}

#[test]
fn a_log_that_cannot_be_opened_changes_nothing() {
    let log = Log::new(LoggerConfig::default());
    let bad = |path: &str| LoggerConfig { log_path: Some(path.into()), ..level(LogLevel::Off) };
    let error = log.logger.configure(&bad("/nowhere/log")).unwrap_err().to_string();
    assert!(error.starts_with("log_path: /nowhere/log: No such file"), "{error}");
    assert!(log.logger.configure(&bad("fd:0")).is_err());
    assert_eq!(log.after(|| info!("still here")).lines().count(), 1);
}

#[test]
fn what_cannot_be_written_is_counted() {
    let log = Log::new(LoggerConfig::default());
    log.logger
        .configure(&LoggerConfig { log_path: Some(Path::new("/dev/full").into()), ..Default::default() })
        .unwrap();
    log.after(|| {
        warn!("lost");
        warn!("lost");
        debug!("not wanted");
    });
    assert_eq!(log.logger.metrics().missed_log_count.total(), 2);
}

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00.000000007Z"),
        (951_782_399, "2000-02-28T23:59:59.000000007Z"),
        (951_782_400, "2000-02-29T00:00:00.000000007Z"),
        (1_709_251_199, "2024-02-29T23:59:59.000000007Z"),
        (1_735_689_599, "2024-12-31T23:59:59.000000007Z"),
        (1_795_751_539, "2026-11-27T03:52:19.000000007Z"),
        (4_107_542_400, "2100-03-01T00:00:00.000000007Z"),
    ] {
        assert_eq!(timestamp(Duration::new(seconds, 7)), text);
    }
    assert!(timestamp(Duration::MAX).ends_with('Z'));
}
