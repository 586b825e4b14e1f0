//! Log lines about what a guest can make happen at will: not one each.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_metrics::Counter;

/// Most lines of one kind in a [`PERIOD`].
const LINES: u32 = 5;
const PERIOD: Duration = Duration::from_secs(60);

/// Counts occasions of one kind, of which five a minute are worth a line in the log. So the log of a flood is short,
/// and what happens after a quiet time is seen.
#[derive(Debug, Default)]
pub struct Tally(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When the present period began.
    start: Option<Instant>,
    /// Lines in it.
    lines: u32,
    /// Occasions since the last line.
    unsaid: u64,
}

/// A line that is worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// How many occasions since the line before got none, if any did.
    pub dropped: Option<u64>,
}

impl Tally {
    /// Counts one more. Without a line it is counted in `dropped` too.
    pub fn count(&self, dropped: &Counter) -> Option<Line> {
        self.count_at(Instant::now(), dropped)
    }

    fn count_at(&self, now: Instant, dropped: &Counter) -> Option<Line> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.start.is_none_or(|start| now.saturating_duration_since(start) >= PERIOD) {
            state.start = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES {
            state.unsaid = state.unsaid.saturating_add(1);
            dropped.count();
            return None;
        }
        state.lines = state.lines.saturating_add(1);
        Some(Line { dropped: Some(std::mem::take(&mut state.unsaid)).filter(|count| *count > 0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_worth_few_lines_and_the_next_one_says_how_large_it_was() {
        let (tally, dropped, start) = (Tally::default(), Counter::default(), Instant::now());
        let at = |seconds: f64| tally.count_at(start + Duration::from_secs_f64(seconds), &dropped);
        let lines: Vec<Line> = (0..1000).filter_map(|n| at(f64::from(n) * 0.01)).collect();
        assert_eq!(lines, [Line { dropped: None }; 5]);
        assert_eq!(dropped.total(), 995);
        assert_eq!(at(59.9), None);
        assert_eq!(at(60.0), Some(Line { dropped: Some(996) }));
        assert_eq!(at(60.1), Some(Line { dropped: None }));
        assert_eq!(dropped.total(), 996);
    }

    #[test]
    fn what_is_rare_is_always_said() {
        let (tally, dropped, start) = (Tally::default(), Counter::default(), Instant::now());
        for minute in 0..100 {
            let now = start + PERIOD * minute;
            assert_eq!(tally.count_at(now, &dropped), Some(Line { dropped: None }));
        }
        assert_eq!(dropped.total(), 0);
    }
}
