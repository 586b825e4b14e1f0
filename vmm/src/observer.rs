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
