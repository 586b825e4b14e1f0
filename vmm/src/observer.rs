//! How this process is watched: its log and its metrics.

use std::sync::Arc;

use cofferdam_api::config::DomainConfig;
use cofferdam_api::observe::{LoggerConfig, MetricsConfig};
use thiserror::Error;

use crate::logger::{Logger, LoggerError};
use crate::metrics::{Metrics, MetricsError};

/// Why it is not watched as it was to be.
#[derive(Debug, Error)]
pub enum ObserveError {
    /// The log does not go there.
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// The metrics do not.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// Log and metrics of this process.
#[derive(Clone)]
pub struct Observer {
    /// The log.
    pub logger: Arc<Logger>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Observer {
    /// Does what a configuration says of them. On an error all stays as it is.
    pub fn configure(&self, config: &DomainConfig) -> Result<(), ObserveError> {
        self.configure_both(config.logger.as_ref(), config.metrics.as_ref())
    }

    /// The same, of either alone.
    pub fn configure_both(
        &self,
        logger: Option<&LoggerConfig>,
        metrics: Option<&MetricsConfig>,
    ) -> Result<(), ObserveError> {
        let logger = logger.map(|config| self.logger.prepare(config)).transpose()?;
        metrics.map_or(Ok(()), |config| self.metrics.configure_if_new(config))?;
        if let Some(settings) = logger {
            self.logger.apply(settings);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_api::observe::LogLevel;
    use tracing::Subscriber;
    use tracing::level_filters::LevelFilter;

    use super::*;
    use crate::phases::PhaseClock;

    #[test]
    fn what_is_refused_in_part_changes_nothing() {
        let logger = Arc::new(Logger::new("i"));
        let metrics = Arc::new(Metrics::new(Arc::new(PhaseClock::new(None)), logger.metrics()));
        let observer = Observer { logger, metrics };
        let log = |path: &str| LoggerConfig {
            log_path: Some(path.into()),
            level: Some(LogLevel::Error),
            ..LoggerConfig::default()
        };
        let to = |path: &str| MetricsConfig { metrics_path: path.into() };
        for (logger, metrics) in [("/dev/null", "/nowhere/m"), ("/nowhere/l", "/dev/null")] {
            assert!(observer.configure_both(Some(&log(logger)), Some(&to(metrics))).is_err());
            assert!(!observer.metrics.are_configured());
            assert_eq!(observer.logger.max_level_hint(), Some(LevelFilter::INFO));
        }
        observer.configure_both(Some(&log("/dev/null")), Some(&to("/dev/null"))).unwrap();
        assert!(observer.metrics.are_configured());
        assert_eq!(observer.logger.max_level_hint(), Some(LevelFilter::ERROR));
        // A configuration that is put again says the same again.
        observer.configure_both(None, Some(&to("/dev/null"))).unwrap();
        assert!(observer.configure_both(None, Some(&to("/dev/zero"))).is_err());
    }
}
