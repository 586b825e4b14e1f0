//! The command line of `cofferdam-vmm`.

use clap::{Command, CommandFactory, Parser};
use cofferdam_api::server::DEFAULT_MAX_PAYLOAD;

use crate::descriptor::Source;

/// As Firecracker's, so that what reads its version reads this one's.
const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

const EXIT_STATUS: &str = "\
Exit status: 0 or the guest's own code after a power-off; 121 reboot or panic; 122 triple fault or vCPU error;
123 launch refused; 124 monitor error; 125 bad configuration or host; 143 stopped by a signal.

SIGTERM, SIGINT and SIGHUP press the domain's power button; a second one stops it hard.";

/// Run one domain in this process, until it stops.
#[derive(Debug, Parser)]
#[command(name = "cofferdam-vmm", display_name = "Cofferdam", version = VERSION, after_help = EXIT_STATUS)]
pub struct Arguments {
    /// The domain's configuration, as JSON: a path, or fd:N for an inherited descriptor. The domain starts at
    /// once
    #[arg(long, value_name = "FILE", required_unless_present = "api_sock")]
    pub config_file: Option<Source>,
    /// Serve the REST API on this Unix socket: a path, or fd:N for an inherited one that listens. Without
    /// --config-file the domain is configured and started by it
    #[arg(long, value_name = "SOCKET")]
    pub api_sock: Option<Source>,
    /// Serve no API, which is so without --api-sock too
    #[arg(long, conflicts_with = "api_sock", requires = "config_file")]
    pub no_api: bool,
    /// Largest body of a request to the API that is read, bytes
    #[arg(long, default_value_t = DEFAULT_MAX_PAYLOAD, value_name = "BYTES")]
    pub http_api_max_payload_size: usize,
    /// Accepted for Firecracker's sake: the phases of the boot are always timed
    #[arg(long)]
    pub boot_timer: bool,
    /// Where to write what becomes of the domain, one JSON object per line: a path, or fd:N. When it is a
    /// pipe and its reader goes away, the domain's power button is pressed as for a signal
    #[arg(long, value_name = "FILE")]
    pub status_file: Option<Source>,
    /// Name of the domain, for messages
    #[arg(long, default_value = "anonymous-instance")]
    pub id: String,
    /// CLOCK_MONOTONIC, in microseconds, from which the phases of the launch are counted [default: now]
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_us: Option<u64>,
    /// Least severe messages to log on standard error
    #[arg(long, default_value = "warn", value_name = "LEVEL")]
    pub level: tracing::Level,
}

/// The definition, of which the manual is made.
pub fn command() -> Command {
    // Not by the name that `--version` tells.
    Arguments::command().display_name("cofferdam-vmm")
}
