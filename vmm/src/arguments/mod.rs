//! The command line of `cofferdam-vmm`.

use std::env;
use std::path::PathBuf;

use clap::{Command, CommandFactory, Parser};
use cofferdam_api::observe::{LogFormat, LogLevel, LoggerConfig, MetricsConfig};
use cofferdam_api::server::DEFAULT_MAX_PAYLOAD;
use cofferdam_api::source::Source;

mod plain;

/// As Firecracker's, so that what reads its version reads this one's.
const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

const EXIT_STATUS: &str = "\
Exit status: 0 or the guest's own code after a power-off; 121 reboot or panic; 122 triple fault or vCPU error;
123 launch refused; 124 monitor error; 125 bad configuration or host; 143 stopped by a signal;
148 a thread made a system call that its seccomp policy forbids.

SIGTERM, SIGINT and SIGHUP press the domain's power button; a second one stops it hard.";

/// Name of a domain that was given none: Firecracker's.
const DEFAULT_ID: &str = "anonymous-instance";

/// Run one domain in this process, until it stops.
#[derive(Debug, Default, PartialEq, Eq, Parser)]
#[command(name = "cofferdam-vmm", display_name = "Cofferdam", version = VERSION, after_help = EXIT_STATUS)]
pub struct Arguments {
    /// The domain's configuration, as JSON: a path, or fd:N for an inherited descriptor. The domain starts at
    /// once
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<Source>,
    /// Serve the REST API on this Unix socket: a path, or fd:N for an inherited one that listens [default: the
    /// socket that systemd passes, see sd_listen_fds(3)]. Without --config-file the domain is configured and
    /// started by it
    #[arg(long, value_name = "SOCKET")]
    pub api_sock: Option<Source>,
    /// Serve no API, which is so without a socket too
    #[arg(long, conflicts_with = "api_sock", requires = "config_file")]
    pub no_api: bool,
    /// Largest body of a request to the API that is read, bytes
    #[arg(long, default_value_t = DEFAULT_MAX_PAYLOAD, value_name = "BYTES")]
    pub http_api_max_payload_size: usize,
    /// Accepted for Firecracker's sake: the phases of the boot are always timed
    #[arg(long)]
    pub boot_timer: bool,
    /// Let every thread make any system call
    #[arg(long, conflicts_with = "seccomp_filter")]
    pub no_seccomp: bool,
    /// Seccomp policies in place of the built-in ones, JSON with vmm, vcpu and api: a path, or fd:N
    #[arg(long, value_name = "FILE")]
    pub seccomp_filter: Option<Source>,
    /// Where to write what becomes of the domain, one JSON object per line: a path, or fd:N. When it is a
    /// pipe and its reader goes away, the domain's power button is pressed as for a signal
    #[arg(long, value_name = "FILE")]
    pub status_file: Option<Source>,
    /// The domain's entry in a run directory, named as --id says: a path, or fd:N. It is removed at the end if
    /// nobody reads --status-file any more
    #[arg(long, value_name = "DIR")]
    pub run_entry: Option<Source>,
    /// Name of the domain, for messages
    #[arg(long, default_value = DEFAULT_ID)]
    pub id: String,
    /// CLOCK_MONOTONIC, in microseconds, from which the phases of the launch are counted [default: now]
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_us: Option<u64>,
    /// Where to log: a file, created or appended to, a named pipe, or fd:N [default: standard error]
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,
    /// Least severe messages to log: Off, Error, Warning, Info, Debug, Trace [default: Info]
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<LogLevel>,
    /// Begin lines of the log with their level
    #[arg(long)]
    pub show_level: bool,
    /// Begin lines of the log with the place in the source that they come from
    #[arg(long)]
    pub show_log_origin: bool,
    /// Log only messages of modules whose path begins so: cofferdam_devices::virtio
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,
    /// What a line of the log is: text, or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Where to write metrics, a JSON object per line and minute: a file, created or appended to, a named pipe, or
    /// fd:N
    #[arg(long, value_name = "FILE")]
    pub metrics_path: Option<PathBuf>,
}

impl Arguments {
    /// Those of this process. An error is what there is to print, help too.
    pub fn of_process() -> Result<Self, clap::Error> {
        plain::read(env::args_os().skip(1)).map_or_else(Self::try_parse, Ok)
    }

    /// What is said of the log.
    pub fn logger(&self) -> LoggerConfig {
        LoggerConfig {
            log_path: self.log_path.clone(),
            level: self.level,
            show_level: Some(self.show_level),
            show_log_origin: Some(self.show_log_origin),
            module: self.module.clone(),
            log_format: self.log_format,
        }
    }

    /// What is said of the metrics.
    pub fn metrics(&self) -> Option<MetricsConfig> {
        self.metrics_path.clone().map(|metrics_path| MetricsConfig { metrics_path })
    }
}

/// The definition, of which the manual is made.
pub fn command() -> Command {
    // Not by the name that `--version` tells.
    Arguments::command().display_name("cofferdam-vmm")
}
