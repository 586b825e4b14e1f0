//! Tables for people.

use std::fmt::Write as _;

/// A table with a head. Columns of numbers stand at the right.
pub fn table<const N: usize>(
    head: [&str; N],
    right: [bool; N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let lines: Vec<[String; N]> = [head.map(str::to_owned)].into_iter().chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        let mut words = String::new();
        for ((cell, width), right) in line.iter().zip(widths).zip(right) {
            // Writing to a String cannot fail.
            let _ = if right { write!(words, "{cell:>width$}  ") } else { write!(words, "{cell:width$}  ") };
        }
        text.push_str(words.trim_end());
        text.push('\n');
    }
    text
}
