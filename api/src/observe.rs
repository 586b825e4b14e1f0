//! How the monitor itself is watched: where its log and its metrics go. Not part of a domain's configuration, though
//! a configuration file may say it too. Names and defaults are Firecracker's.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::validate::{ConfigError, check_path};

/// Body of `PUT /logger`. What is left out stays, but for the level.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LoggerConfig {
    /// A file, created or appended to, or a named pipe; `fd:N` for an inherited descriptor. Before one is given the log
    /// goes to standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Least severe messages to log: `Off`, `Error`, `Warning`, `Info`, `Debug` or `Trace`, in any case; `Info` if left
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines of text have the level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines have the place in the source that they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of modules whose path begins so are logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// What a line is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
}

impl LoggerConfig {
    /// Checks what can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.log_path.as_deref().map_or(Ok(()), |path| check_path("logger.log_path", path))
    }
}

/// Least severe messages to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LogLevel {
    /// None.
    Off,
    /// What failed.
    Error,
    /// What is wrong and gone on with.
    Warning,
    /// What happens to the domain.
    #[default]
    Info,
    /// What happens in it.
    Debug,
    /// Everything.
    Trace,
}

/// A name that no level has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is none of Off, Error, Warning, Info, Debug, Trace")]
pub struct NoLevel(String);

impl FromStr for LogLevel {
    type Err = NoLevel;

    fn from_str(text: &str) -> Result<Self, NoLevel> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(NoLevel(text.to_owned())),
        }
    }
}

impl TryFrom<String> for LogLevel {
    type Error = NoLevel;

    fn try_from(text: String) -> Result<Self, NoLevel> {
        text.parse()
    }
}

/// What a line of the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LogFormat {
    /// Text for people, as Firecracker's.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

/// A name that no format has.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is neither text nor json")]
pub struct NoFormat(String);

impl FromStr for LogFormat {
    type Err = NoFormat;

    fn from_str(text: &str) -> Result<Self, NoFormat> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(NoFormat(text.to_owned())),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MetricsConfig {
    /// A file, created or appended to, or a named pipe; `fd:N` for an inherited descriptor.
    pub metrics_path: PathBuf,
}

impl MetricsConfig {
    /// Checks what can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_path("metrics.metrics_path", &self.metrics_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_in_any_case_and_written_so_that_they_can_be_read() {
        for (text, level) in [
            ("OFF", LogLevel::Off),
            ("Error", LogLevel::Error),
            ("Warning", LogLevel::Warning),
            ("warn", LogLevel::Warning),
            ("iNFO", LogLevel::Info),
            ("debug", LogLevel::Debug),
            ("Trace", LogLevel::Trace),
        ] {
            assert_eq!(text.parse(), Ok(level));
            let json = serde_json::to_string(&level).unwrap();
            assert_eq!(serde_json::from_str::<LogLevel>(&json).unwrap(), level);
        }
        let error = serde_json::from_str::<LoggerConfig>(r#"{"level": "loud"}"#).unwrap_err().to_string();
        assert!(error.contains("\"loud\" is none of Off, Error"), "{error}");
    }

    #[test]
    fn formats_are_text_and_json() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("xml".parse::<LogFormat>().is_err());
    }

    #[test]
    fn paths_are_checked() {
        let logger = LoggerConfig { log_path: Some("".into()), ..Default::default() };
        assert_eq!(logger.validate().unwrap_err().to_string(), "logger.log_path: is empty");
        LoggerConfig::default().validate().unwrap();
        let metrics = MetricsConfig { metrics_path: "a\0b".into() };
        assert_eq!(metrics.validate().unwrap_err().field(), Some("metrics.metrics_path"));
    }
}
