//! Values that the host gives at a start.

use regex_lite::{Regex, RegexBuilder};

use crate::types::{Process, StartVariable};
use crate::validate::MAX_START_VALUE;

/// Most memory that a compiled pattern takes, in bytes.
const PATTERN_MEMORY: usize = 64 << 10;

/// Why values for a start are refused. Values are not quoted: they may be confidential.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The manifest does not declare the variable.
    #[error("the manifest does not declare the variable {0:?} for a start (process.start_env)")]
    Undeclared(String),
    /// The value does not match.
    #[error("the value of {name:?} does not match {pattern:?} (process.start_env)")]
    Mismatch {
        /// The variable.
        name: String,
        /// Its pattern.
        pattern: String,
    },
    /// Two values for one variable.
    #[error("two values for the variable {0:?}")]
    Twice(String),
}

impl Process {
    /// The environment with the values that the host `given` for this start, pairs of name and value.
    ///
    /// # Errors
    /// For a variable that the manifest does not declare, twice the same, or a value that does not match.
    pub fn start_environment(&self, given: &[(String, String)]) -> Result<Vec<String>, StartError> {
        let mut env = self.env.clone();
        for (index, (name, value)) in given.iter().enumerate() {
            if given.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(StartError::Twice(name.clone()));
            }
            let variable = self.start_env.iter().find(|variable| variable.name == *name);
            let variable = variable.ok_or_else(|| StartError::Undeclared(name.clone()))?;
            if !variable.accepts(value) {
                return Err(StartError::Mismatch { name: name.clone(), pattern: variable.pattern.clone() });
            }
            let entry = format!("{name}={value}");
            match env.iter_mut().find(|entry| entry.split_once('=').is_some_and(|(known, _)| known == name)) {
                Some(default) => *default = entry,
                None => env.push(entry),
            }
        }
        Ok(env)
    }
}

impl StartVariable {
    /// Whether the host may give it this value.
    fn accepts(&self, value: &str) -> bool {
        value.len() <= MAX_START_VALUE
            && !value.contains('\0')
            && compile(&self.pattern).is_some_and(|regex| regex.is_match(value))
    }
}

/// The pattern, made to match whole values.
pub(crate) fn compile(pattern: &str) -> Option<Regex> {
    let build = |pattern: &str| RegexBuilder::new(pattern).size_limit(PATTERN_MEMORY).build().ok();
    // By itself too, so that it cannot close the group around it: `a)|(b` would match more than whole values.
    build(pattern)?;
    build(&format!(r"\A(?:{pattern})\z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_values_match() {
        let accepts = |pattern: &str, value: &str| {
            StartVariable { name: "A".to_owned(), pattern: pattern.to_owned() }.accepts(value)
        };
        assert!(accepts("[0-9]{1,3}", "123"));
        assert!(accepts("a|ab", "ab"));
        assert!(accepts("", ""));
        for (pattern, value) in [
            ("[0-9]{1,3}", "1234"),
            ("[0-9]+", "1\n"),
            ("a|b", "ac"),
            ("a", ""),
            (".*", "a\0b"),
            (".*", "a\nb"),
        ] {
            assert!(!accepts(pattern, value), "{pattern} {value:?}");
        }
        assert!(accepts("a*", &"a".repeat(MAX_START_VALUE)));
        assert!(!accepts("a*", &"a".repeat(MAX_START_VALUE + 1)));
    }

    #[test]
    fn patterns_that_are_none() {
        for pattern in ["(", "a)|(b", "[", "*", "(?x)a#", "(?:a{1000}){1000}"] {
            assert!(compile(pattern).is_none(), "{pattern}");
        }
    }
}
