//! A strict reader of Prometheus text 0.0.4, for tests: it refuses what a lenient one would mend.

use std::collections::HashSet;

/// A metric and its samples.
#[derive(Debug)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// Its help text.
    pub help: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Its samples.
    pub samples: Vec<Sample>,
}

/// One line with a value.
#[derive(Debug)]
pub struct Sample {
    /// The name of the line: the family's, or of a histogram that and an ending.
    pub name: String,
    /// Labels in their order.
    pub labels: Vec<(String, String)>,
    /// The value.
    pub value: f64,
}

impl Family {
    /// The value of the sample `name` with exactly these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let same = |sample: &&Sample| {
            let own = sample.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            sample.name == name && own.eq(labels.iter().copied())
        };
        self.samples.iter().find(same).map(|sample| sample.value)
    }
}

/// The families of `text`, or what is wrong with it.
pub fn parse(text: &str) -> Result<Vec<Family>, String> {
    let text = text.strip_suffix('\n').ok_or("the last line does not end")?;
    let mut families: Vec<Family> = Vec::new();
    let mut lines = text.split('\n').peekable();
    let mut names = HashSet::new();
    while let Some(line) = lines.next() {
        let wrong = |what: &str| format!("{what}: {line:?}");
        let (name, help) = line
            .strip_prefix("# HELP ")
            .and_then(|rest| rest.split_once(' '))
            .ok_or_else(|| wrong("no HELP at the beginning of a family"))?;
        let kind = lines
            .next()
            .and_then(|line| line.strip_prefix("# TYPE "))
            .and_then(|rest| rest.strip_prefix(name)?.strip_prefix(' '))
            .ok_or_else(|| wrong("no TYPE after"))?;
        if !is_name(name) || !names.insert(name) || help.is_empty() {
            return Err(wrong("a bad, a second or an unexplained name"));
        }
        let mut family =
            Family { name: name.into(), help: help.into(), kind: kind.into(), samples: Vec::new() };
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            family.samples.push(sample(line).ok_or_else(|| format!("no sample: {line:?}"))?);
        }
        check(&family)?;
        families.push(family);
    }
    Ok(families)
}

fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
    text.bytes().all(good) && text.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at_checked(end)?;
    let mut labels = Vec::new();
    let value = match rest.strip_prefix('{') {
        None => rest,
        Some(mut rest) => loop {
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.push((label.to_owned(), value));
            match after.strip_prefix(',') {
                Some(after) => rest = after,
                None => break after.strip_prefix('}')?,
            }
        },
    };
    let value = value.strip_prefix(' ')?;
    let good = is_name(name) && labels.iter().all(|(label, _)| is_name(label) && !label.contains(':'));
    let plain = value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let value = value.parse().ok().filter(|_| good && plain)?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quotation mark, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.chars();
    loop {
        value.push(match chars.next()? {
            '"' => return Some((value, chars.as_str())),
            '\\' => match chars.next()? {
                'n' => '\n',
                escaped @ ('"' | '\\') => escaped,
                _ => return None,
            },
            plain => plain,
        });
    }
}

fn check(family: &Family) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{}: {what}", family.name));
    let mut series = HashSet::new();
    for sample in &family.samples {
        if !series.insert((&sample.name, &sample.labels)) {
            return wrong("a series is there twice");
        }
    }
    match family.kind.as_str() {
        "counter" if !family.name.ends_with("_total") => wrong("a counter's name ends with _total"),
        "counter" | "gauge" => match family.samples.iter().all(|sample| sample.name == family.name) {
            true if !family.samples.is_empty() => Ok(()),
            _ => wrong("samples of its own, and no others"),
        },
        "histogram" => check_histogram(family),
        _ => wrong("what kind is that"),
    }
}

/// Each histogram is buckets whose bounds and counts grow, the last one without bound, then sum and count.
fn check_histogram(family: &Family) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{}: {what}", family.name));
    let mut samples = family.samples.iter().peekable();
    if samples.peek().is_none() {
        return wrong("no samples");
    }
    while samples.peek().is_some() {
        let (mut bound, mut count) = (f64::NEG_INFINITY, 0.0);
        let mut own: Option<&[(String, String)]> = None;
        while let Some(bucket) = samples.next_if(|sample| sample.name == format!("{}_bucket", family.name)) {
            let Some(((name, le), labels)) = bucket.labels.split_last().filter(|((name, _), _)| name == "le")
            else {
                return wrong("a bucket without le at the end");
            };
            let next = if le == "+Inf" { Ok(f64::INFINITY) } else { le.parse::<f64>() };
            let grows = next.as_ref().is_ok_and(|next| *next > bound) && bucket.value >= count;
            if name != "le" || !grows || own.replace(labels).is_some_and(|own| own != labels) {
                return wrong("buckets that do not grow");
            }
            (bound, count) = (next.unwrap_or(bound), bucket.value);
        }
        let Some(own) = own.filter(|_| bound == f64::INFINITY) else { return wrong("no bucket +Inf") };
        let mut next = |ending: &str| {
            samples
                .next()
                .filter(|sample| sample.name == format!("{}_{ending}", family.name) && sample.labels == own)
                .map(|sample| sample.value)
        };
        if next("sum").is_none() || next("count") != Some(count) {
            return wrong("sum and count are not what the buckets say");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total Help.\n# TYPE a_total counter\na_total{x=\"1\"} 1\na_total{x=\"2\"} 2\n\
                        # HELP h Help.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3.5\nh_count 2\n";

    #[test]
    fn each_rule_is_kept() {
        assert_eq!(parse(GOOD).unwrap().len(), 2);
        for (from, to) in [
            ("h_count 2\n", "h_count 2"),
            ("# HELP a_total Help.\n", ""),
            ("# TYPE h histogram", "# TYPE g histogram"),
            ("# TYPE h histogram", "# TYPE h summary"),
            ("x=\"2\"", "x=\"1\""),
            ("x=\"2\"", "x=\"2"),
            ("x=\"2\"", "x=\"\\x\""),
            ("a_total{x=\"2\"} 2", "b_total{x=\"2\"} 2"),
            ("a_total", "a"),
            ("a_total{x=\"2\"} 2", "a_total{x=\"2\"} -2"),
            ("le=\"1\"} 1", "le=\"1\"} 3"),
            ("h_bucket{le=\"+Inf\"} 2\n", ""),
            ("h_count 2", "h_count 1"),
            ("h_sum 3.5\n", ""),
            ("HELP h ", "HELP a_total "),
        ] {
            let bad = GOOD.replace(from, to);
            assert_ne!(bad, GOOD, "{from}");
            assert!(parse(&bad).is_err(), "{bad}");
        }
    }
}
