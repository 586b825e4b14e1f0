use std::fs;

use event_manager::{EventManager, SubscriberOps};
use serde_json::Value;

use super::*;

fn metrics() -> Metrics {
    Metrics::new(Arc::new(PhaseClock::new(None)), Arc::default())
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn config(path: impl Into<std::path::PathBuf>) -> MetricsConfig {
    MetricsConfig { metrics_path: path.into() }
}

#[test]
fn each_line_has_what_came_since_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    let metrics = metrics();
    assert!(metrics.flush().is_ok() && !metrics.are_configured());
    metrics.configure(&config(&path)).unwrap();
    let drive = Arc::<BlockMetrics>::default();
    let devices = DeviceMetrics { drives: vec![("root".into(), drive.clone())], ..DeviceMetrics::default() };
    drive.read_count.add(3);
    metrics.flush().unwrap();
    metrics.add_devices(devices);
    metrics.flush().unwrap();
    drive.read_count.add(4);
    metrics.vmm.pause_count.count();
    metrics.flush().unwrap();
    let lines = lines(&path);
    assert_eq!(lines.len(), 3);
    assert!(lines[0].get("block_root").is_none());
    let count = |group: &str| lines.iter().map(|line| line[group]["read_count"].as_u64()).collect::<Vec<_>>();
    assert_eq!(count("block_root"), [None, Some(3), Some(4)]);
    assert_eq!(count("block"), [Some(0), Some(3), Some(4)]);
    assert_eq!((&lines[1]["vmm"]["pause_count"], &lines[2]["vmm"]["pause_count"]), (&0.into(), &1.into()));
}

#[test]
fn what_could_not_be_written_is_in_the_next_line_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let logger = Arc::<LoggerMetrics>::default();
    let metrics = Metrics::new(Arc::new(PhaseClock::new(None)), logger.clone());
    metrics.configure(&config(&path)).unwrap();
    let mut written = 0;
    let flush = || {
        metrics.vmm.resume_count.count();
        metrics.flush()
    };
    while flush().is_ok() {
        written += 1;
        assert!(written < 1000, "a pipe without a reader has an end");
    }
    assert!(flush().is_err());
    assert_eq!(logger.missed_metrics_count.total(), 2);
    let mut pipe = fs::File::options().read(true).custom(rustix::fs::OFlags::NONBLOCK).open(&path).unwrap();
    let mut text = Vec::new();
    let _ = std::io::Read::read_to_end(&mut pipe, &mut text);
    flush().unwrap();
    let _ = std::io::Read::read_to_end(&mut pipe, &mut text);
    let lines: Vec<Value> =
        String::from_utf8(text).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), written + 1);
    let resumed: Vec<u64> = lines.iter().map(|line| line["vmm"]["resume_count"].as_u64().unwrap()).collect();
    assert_eq!(resumed.iter().sum::<u64>(), written as u64 + 3);
    assert_eq!(resumed.last(), Some(&3));
    assert_eq!(lines.last().unwrap()["logger"]["missed_metrics_count"], 2);
}

/// Opening with flags.
trait Custom {
    fn custom(&mut self, flags: rustix::fs::OFlags) -> &mut Self;
}

impl Custom for fs::OpenOptions {
    fn custom(&mut self, flags: rustix::fs::OFlags) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, flags.bits() as i32)
    }
}

#[test]
fn metrics_are_configured_once() {
    let metrics = metrics();
    assert!(matches!(metrics.configure(&config("/nowhere/m")), Err(MetricsError::Open { .. })));
    metrics.configure(&config("/dev/null")).unwrap();
    let again = metrics.configure(&config("/dev/null")).unwrap_err();
    assert_eq!(again.to_string(), "Reinitialization of metrics not allowed.");
    metrics.configure_if_new(&config("/dev/null")).unwrap();
    assert!(metrics.configure_if_new(&config("/dev/full")).is_err());
}

#[test]
fn a_full_disk_is_an_error_that_is_counted() {
    let logger = Arc::<LoggerMetrics>::default();
    let metrics = Metrics::new(Arc::new(PhaseClock::new(None)), logger.clone());
    metrics.configure(&config("/dev/full")).unwrap();
    for _ in 0..3 {
        assert!(
            metrics.flush().unwrap_err().to_string().starts_with("metrics cannot be written to /dev/full: ")
        );
    }
    assert_eq!(logger.missed_metrics_count.total(), 3);
}

#[test]
fn the_text_is_good_with_and_without_devices() {
    let metrics = metrics();
    let names = |text: &str| {
        let families = cofferdam_metrics::exposition::parse(text).unwrap();
        families.into_iter().map(|family| family.name).collect::<Vec<_>>()
    };
    let before = names(&metrics.prometheus());
    assert!(before.contains(&"cofferdam_vcpu_exit_io_in_total".to_owned()));
    assert!(!before.iter().any(|name| name.starts_with("cofferdam_block")));
    let drives = ["a", "b"].map(|id| (id.to_owned(), Arc::default()));
    metrics.add_devices(DeviceMetrics { drives: drives.into(), ..DeviceMetrics::default() });
    let text = metrics.prometheus();
    assert!(names(&text).contains(&"cofferdam_block_read_seconds".to_owned()));
    assert_eq!(text.matches("cofferdam_block_read_bytes_total{drive=").count(), 2);
}

#[test]
fn the_timer_writes_line_after_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    let metrics = Arc::new(metrics());
    metrics.configure(&config(&path)).unwrap();
    let timer = FlushTimer::new(metrics, Duration::from_millis(1)).unwrap();
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(Arc::new(Mutex::new(timer)));
    for _ in 0..3 {
        events.run().unwrap();
    }
    assert_eq!(lines(&path).len(), 3);
}

/// The table of `docs/metrics.md`.
fn table() -> String {
    let clock = Arc::new(PhaseClock::new(None));
    clock.reached("{phase}");
    let metrics = Metrics::new(clock, Arc::default());
    let drives = vec![("{drive_id}".to_owned(), Arc::default())];
    metrics.add_devices(DeviceMetrics { drives, ..DeviceMetrics::default() });
    let mut table = "| in the JSON | for Prometheus | kind | meaning |\n|---|---|---|---|\n".to_owned();
    for group in metrics.groups(false) {
        for field in &group.fields {
            let name = prometheus::name(group.family, &field.name, &field.reading);
            let label = group.member.as_ref().map(|(label, _)| format!("{{{label}}}")).unwrap_or_default();
            let kind = match field.reading {
                Reading::Counter(_) if field.name.contains("bytes") => "counter, bytes",
                Reading::Counter(_) => "counter",
                Reading::Micros(_) => "time, µs or s",
                Reading::Latency(_) => "histogram",
            };
            let (group, field, help) = (group.name(), &field.name, &field.help);
            table.push_str(&format!("| `{group}.{field}` | `{name}{label}` | {kind} | {help} |\n"));
        }
    }
    table
}

#[test]
fn the_documentation_has_every_metric() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once("<!-- begin -->\n").unwrap();
    let (documented, after) = rest.split_once("<!-- end -->\n").unwrap();
    if std::env::var_os("COFFERDAM_UPDATE").is_some() {
        return fs::write(path, format!("{before}<!-- begin -->\n{}<!-- end -->\n{after}", table())).unwrap();
    }
    assert_eq!(documented, table(), "COFFERDAM_UPDATE=1 writes it anew");
}
