//! `cofferdam logs`: what is kept of what a domain has printed.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use crate::args::LogsArgs;
use crate::control::{Domain, Failure, done};
use crate::kept::{Log, LogReader};

/// Time between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(100);

/// Prints a log, and what is added to it until the domain ends if that is wanted.
pub fn logs(args: &LogsArgs) -> u8 {
    done(Domain::find(&args.target).and_then(|domain| print_log(args, &domain)))
}

fn print_log(args: &LogsArgs, domain: &Domain) -> Result<(), Failure> {
    let log = if args.monitor { Log::Monitor } else { Log::Console };
    let id = &domain.entry.id;
    let failed = |error: io::Error| Failure::NotKept(format!("the log of domain {id}: {error}"));
    let mut reader = LogReader::open(&domain.entry.dir, log).map_err(failed)?.ok_or_else(|| {
        Failure::NotKept(match log {
            Log::Console => format!("the console of domain {id} is not kept: it is not on stdio"),
            Log::Monitor => {
                format!("what the monitor of domain {id} says is not kept: it runs in the foreground")
            }
        })
    })?;
    let mut stdout = io::stdout().lock();
    let mut bytes = [0; 16 * 1024];
    let mut ended = !args.follow;
    loop {
        match reader.read(&mut bytes).map_err(failed)? {
            0 if ended => return Ok(()),
            // What it printed last is there when it has ended.
            0 => {
                ended = !domain.run_dir.is_live(&domain.entry)?;
                if !ended {
                    thread::sleep(LOOK);
                }
            }
            count => {
                let text = bytes.get(..count).unwrap_or_default();
                if stdout.write_all(text).and_then(|()| stdout.flush()).is_err() {
                    // Who closed standard output has seen enough.
                    return Ok(());
                }
            }
        }
    }
}
