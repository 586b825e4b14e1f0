//! Prometheus text, format 0.0.4.
//!
//! The name of a metric follows from those of the JSON: `cofferdam_`, the group, `_`, the field; without the
//! endings `_count`, `_us` and `_agg`, but with `_total` for a counter and `_seconds` for a time.

use std::fmt::Write;

use crate::group::{Group, Reading};
use crate::latency::Distribution;

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text of `groups`. Members of a family follow each other and have the same fields.
pub fn text(groups: &[Group]) -> String {
    let mut text = String::new();
    for family in groups.chunk_by(|a, b| a.family == b.family) {
        let Some(first) = family.first() else { continue };
        for (index, field) in first.fields.iter().enumerate() {
            let name = name(first.family, &field.name, &field.reading);
            let kind = match field.reading {
                Reading::Counter(_) => "counter",
                Reading::Micros(_) => "gauge",
                Reading::Latency(_) => "histogram",
            };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", escape_help(&field.help));
            for member in family {
                if let Some(field) = member.fields.get(index) {
                    sample(&mut text, &name, label(member), &field.reading);
                }
            }
        }
    }
    text
}

/// The name of field `field` of family `family`.
pub fn name(family: &str, field: &str, reading: &Reading) -> String {
    let family = family.strip_suffix("_us").unwrap_or(family);
    let (ending, unit) = match reading {
        Reading::Counter(_) => ("_count", "total"),
        Reading::Micros(_) => ("_us", "seconds"),
        Reading::Latency(_) => ("_agg", "seconds"),
    };
    format!("cofferdam_{family}_{}_{unit}", field.strip_suffix(ending).unwrap_or(field))
}

fn sample(text: &mut String, name: &str, label: Option<String>, reading: &Reading) {
    let labels = label.as_ref().map(|label| format!("{{{label}}}")).unwrap_or_default();
    let _ = match reading {
        Reading::Counter(count) => writeln!(text, "{name}{labels} {count}"),
        Reading::Micros(time) => {
            writeln!(text, "{name}{labels} {}", seconds(u128::from(*time).saturating_mul(1000)))
        }
        Reading::Latency(times) => histogram(text, name, label.as_deref(), times).and_then(|count| {
            writeln!(text, "{name}_sum{labels} {}\n{name}_count{labels} {count}", seconds(times.sum.into()))
        }),
    };
}

/// Writes the buckets, each with all that are shorter, and says how many there are.
fn histogram(
    text: &mut String,
    name: &str,
    label: Option<&str>,
    times: &Distribution,
) -> Result<u64, std::fmt::Error> {
    let label = label.map(|label| format!("{label},")).unwrap_or_default();
    let mut count = 0_u64;
    let bounds = (0..).map(|bucket| 1000_u128.checked_shl(bucket));
    let last = times.counts.len().saturating_sub(1);
    for (index, (more, bound)) in times.counts.iter().zip(bounds).enumerate() {
        count = count.wrapping_add(*more);
        let bound = bound.filter(|_| index < last).map_or_else(|| "+Inf".to_owned(), seconds);
        writeln!(text, "{name}_bucket{{{label}le=\"{bound}\"}} {count}")?;
    }
    Ok(count)
}

fn label(group: &Group) -> Option<String> {
    let (label, value) = group.member.as_ref()?;
    let value = value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    Some(format!("{label}=\"{value}\""))
}

fn escape_help(help: &str) -> String {
    help.replace('\\', r"\\").replace('\n', r"\n")
}

/// Nanoseconds as seconds, exactly.
fn seconds(nanoseconds: u128) -> String {
    const PER_SECOND: u128 = 1_000_000_000;
    let text = format!("{}.{:09}", nanoseconds / PER_SECOND, nanoseconds % PER_SECOND);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exposition::parse;
    use crate::group::tests::Sample;
    use crate::latency::BUCKETS;

    #[test]
    fn seconds_are_exact() {
        let table = [
            (0, "0"),
            (1, "0.000000001"),
            (1000, "0.000001"),
            (1_500_000_000, "1.5"),
            (10_000_000_000, "10"),
        ];
        for (nanoseconds, text) in table {
            assert_eq!(seconds(nanoseconds), text);
        }
    }

    #[test]
    fn names_have_the_unit_at_the_end() {
        let counter = Reading::Counter(0);
        assert_eq!(name("vsock", "rx_bytes_count", &counter), "cofferdam_vsock_rx_bytes_total");
        assert_eq!(
            name("latencies_us", "pause_vm", &Reading::Micros(0)),
            "cofferdam_latencies_pause_vm_seconds"
        );
        assert_eq!(
            name("block", "read_agg", &Sample::default().work_agg.read()),
            "cofferdam_block_read_seconds"
        );
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let (a, b) = (Sample::doing(&[3, 100]), Sample::doing(&[9_000_000]));
        let groups = [
            Group::member("work", "worker", "a\"\\\n", &a),
            Group::member("work", "worker", "b", &b),
            Group::of("rest", &Sample::default()),
        ];
        let text = text(&groups);
        let families = parse(&text).unwrap();
        let names: Vec<_> = families.iter().map(|family| family.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "cofferdam_work_done_total",
                "cofferdam_work_last_seconds",
                "cofferdam_work_work_seconds",
                "cofferdam_rest_done_total",
                "cofferdam_rest_last_seconds",
                "cofferdam_rest_work_seconds",
            ]
        );
        let value = |index: usize, name: &str, labels: &[(&str, &str)]| families[index].value(name, labels);
        assert_eq!(value(0, "cofferdam_work_done_total", &[("worker", "a\"\\\n")]), Some(2.0));
        assert_eq!(value(1, "cofferdam_work_last_seconds", &[("worker", "a\"\\\n")]), Some(0.0001));
        let bucket =
            |worker, le| value(2, "cofferdam_work_work_seconds_bucket", &[("worker", worker), ("le", le)]);
        assert_eq!(bucket("a\"\\\n", "0.000004"), Some(1.0));
        assert_eq!(bucket("a\"\\\n", "0.000128"), Some(2.0));
        assert_eq!((bucket("b", "8.388608"), bucket("b", "+Inf")), (Some(0.0), Some(1.0)));
        assert_eq!(value(2, "cofferdam_work_work_seconds_sum", &[("worker", "b")]), Some(9.0));
        assert_eq!(text.matches("worker=\"b\",le=").count(), BUCKETS + 1);
        assert!(text.contains("# HELP cofferdam_work_done_total Things done, on two lines\n"), "{text}");
    }
}
