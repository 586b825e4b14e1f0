//! One line of JSON, in the form of Firecracker's metrics.
//!
//! ```json
//! {"utc_timestamp_ms": 1541591155180, "vcpu": {"exit_io_in": 3, "exit_io_in_agg": {"min_us": 4, …}}, …}
//! ```
//!
//! Counters say what has come since the line before, so that the sum over all lines is the total; so do the sum
//! and the buckets of a histogram. Times of now, and the shortest and longest time of a histogram, are what they
//! are.

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::group::{Field, Group, Reading};
use crate::latency::Distribution;

/// A line to be.
pub struct JsonLine<'a> {
    /// Milliseconds since 1970.
    pub utc_timestamp_ms: u64,
    /// What is known now.
    pub groups: &'a [Group],
    /// What the line before was made of.
    pub before: &'a [Group],
}

impl Serialize for JsonLine<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("utc_timestamp_ms", &self.utc_timestamp_ms)?;
        for group in self.groups {
            let before = self
                .before
                .iter()
                .find(|before| (before.family, &before.member) == (group.family, &group.member));
            let before = before.map_or(&[][..], |before| &before.fields);
            map.serialize_entry(&group.name(), &Fields { fields: &group.fields, before })?;
        }
        map.end()
    }
}

struct Fields<'a> {
    fields: &'a [Field],
    before: &'a [Field],
}

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.fields.len()))?;
        for field in self.fields {
            let before = self.before.iter().find(|before| before.name == field.name);
            match (&field.reading, before.map(|before| &before.reading)) {
                (Reading::Counter(count), Some(Reading::Counter(before))) => {
                    map.serialize_entry(&field.name, &count.wrapping_sub(*before))?;
                }
                (Reading::Counter(value) | Reading::Micros(value), _) => {
                    map.serialize_entry(&field.name, value)?;
                }
                (Reading::Latency(now), Some(Reading::Latency(before))) => {
                    map.serialize_entry(&field.name, &Times { now, before })?;
                }
                (Reading::Latency(now), _) => {
                    map.serialize_entry(&field.name, &Times { now, before: &Distribution::default() })?;
                }
            }
        }
        map.end()
    }
}

struct Times<'a> {
    now: &'a Distribution,
    before: &'a Distribution,
}

impl Serialize for Times<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { now, before } = self;
        let mut map = serializer.serialize_map(Some(4))?;
        map.serialize_entry("min_us", &(now.min.unwrap_or(0) / 1000))?;
        map.serialize_entry("max_us", &(now.max / 1000))?;
        map.serialize_entry("sum_us", &(now.sum / 1000).saturating_sub(before.sum / 1000))?;
        let pairs = now.counts.iter().zip(before.counts);
        let new: Vec<u64> = pairs.map(|(now, before)| now.wrapping_sub(before)).collect();
        map.serialize_entry("buckets", &new)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::group::tests::Sample;
    use crate::latency::BUCKETS;

    fn line(groups: &[Group], before: &[Group]) -> Value {
        let text = serde_json::to_string(&JsonLine { utc_timestamp_ms: 7, groups, before }).unwrap();
        assert!(!text.contains('\n') && text.starts_with("{\"utc_timestamp_ms\":7,"), "{text}");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn the_first_line_has_everything_and_the_next_what_is_new() {
        let sample = Sample::doing(&[3, 100]);
        let read = || vec![Group::member("work", "worker", "a", &sample), Group::of("work", &sample)];
        let first = read();
        let told = line(&first, &[]);
        let mut buckets = [0; BUCKETS + 1];
        (buckets[2], buckets[7]) = (1, 1);
        let times = json!({"min_us": 3, "max_us": 100, "sum_us": 103, "buckets": buckets});
        assert_eq!(told["work_a"], json!({"done_count": 2, "last": 100, "work_agg": times}));
        assert_eq!(told["work"], told["work_a"]);

        sample.done_count.add(5);
        sample.work_agg.record(std::time::Duration::from_micros(1));
        let told = line(&read(), &first);
        let mut buckets = [0; BUCKETS + 1];
        buckets[0] = 1;
        let times = json!({"min_us": 1, "max_us": 100, "sum_us": 1, "buckets": buckets});
        assert_eq!(told["work_a"], json!({"done_count": 5, "last": 100, "work_agg": times}));
        let told = line(&read(), &read());
        assert_eq!(told["work"]["done_count"], 0);
    }
}
