//! What comes out: rows of a table, and the same as JSON.

use serde::Serialize;

/// Whether less of it is better, or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates.
    Higher,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The unit of `ours` and `reference`.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// What Cofferdam has, a median.
    pub ours: f64,
    /// What it is held against, a median.
    pub reference: f64,
    /// Who that is.
    pub reference_name: String,
    /// `ours / reference`.
    pub ratio: f64,
    /// The ratio asked for: at most this where lower is better, at least where higher is. Null where none is.
    pub goal: Option<f64>,
}

/// What a row is about, before there are numbers.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// See [`Row::name`].
    pub name: &'static str,
    /// See [`Row::unit`].
    pub unit: &'static str,
    /// See [`Row::better`].
    pub better: Better,
    /// See [`Row::goal`].
    pub goal: Option<f64>,
}

impl Subject {
    /// The row with the medians of both.
    pub fn row(&self, ours: &[f64], reference: &[f64], reference_name: &str) -> Row {
        let (ours, reference) = (median(ours), median(reference));
        Row {
            name: self.name.to_owned(),
            unit: self.unit,
            better: self.better,
            ours: rounded(ours),
            reference: rounded(reference),
            reference_name: reference_name.to_owned(),
            ratio: rounded(ours / reference),
            goal: self.goal,
        }
    }
}

impl Row {
    /// Whether the goal is reached, if there is one.
    pub fn reached(&self) -> Option<bool> {
        self.goal.map(|goal| match self.better {
            Better::Lower => self.ratio <= goal,
            Better::Higher => self.ratio >= goal,
        })
    }
}

/// The middle of `samples`, which are not empty.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (Some(below), Some(above)) if sorted.len().is_multiple_of(2) => (below + above) / 2.0,
        (_, Some(middle)) => *middle,
        _ => f64::NAN,
    }
}

/// Four digits say all there is.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * digits).round() / digits
}

/// The table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<40} {:>9} {:>9} {:<7} {:>6} {:>6}  {}\n",
        "", "ours", "reference", "", "ratio", "goal", "reference is"
    );
    for row in rows {
        let sign = if row.better == Better::Lower { "≤" } else { "≥" };
        let goal = row.goal.map_or_else(|| "-".to_owned(), |goal| format!("{sign} {goal}"));
        let verdict = if row.reached() == Some(false) { "  MISSED" } else { "" };
        text += &format!(
            "{:<40} {:>9} {:>9} {:<7} {:>6.2} {:>6}  {}{verdict}\n",
            row.name, row.ours, row.reference, row.unit, row.ratio, goal, row.reference_name
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 30.0]), 3.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_goal_is_a_bound_on_the_side_that_is_worse() {
        let subject = |better, goal| Subject { name: "n", unit: "u", better, goal };
        let reached = |better, ours| subject(better, Some(1.5)).row(&[ours], &[2.0], "r").reached();
        assert_eq!(reached(Better::Lower, 3.0), Some(true));
        assert_eq!(reached(Better::Lower, 3.1), Some(false));
        assert_eq!(reached(Better::Higher, 3.1), Some(true));
        assert_eq!(reached(Better::Higher, 2.9), Some(false));
        assert_eq!(subject(Better::Lower, None).row(&[1.0], &[2.0], "r").reached(), None);
    }

    #[test]
    fn a_row_has_exactly_the_fields_asked_for() {
        let subject = Subject { name: "n", unit: "ms", better: Better::Lower, goal: Some(1.5) };
        let text = serde_json::to_string(&subject.row(&[1.23456], &[2.0], "floor")).unwrap();
        assert_eq!(
            text,
            r#"{"name":"n","unit":"ms","better":"lower","ours":1.235,"reference":2.0,"reference_name":"floor","ratio":0.6173,"goal":1.5}"#
        );
    }
}
