//! `cofferdam logs`: what is kept of what a domain has printed. That of a container's process comes on two streams, as
//! it was written.

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
    let failed = |error| failed(domain, error);
    let mut readers = open(args, domain)?;
    let mut bytes = [0; 16 * 1024];
    let mut ended = !args.follow;
    loop {
        let mut printed = false;
        for (log, reader) in &mut readers {
            let count = reader.read(&mut bytes).map_err(failed)?;
            let text = bytes.get(..count).unwrap_or_default();
            let result = match log {
                Log::Stderr => io::stderr().lock().write_all(text),
                _ => io::stdout().lock().write_all(text).and_then(|()| io::stdout().lock().flush()),
            };
            if result.is_err() {
                // Who closed the stream has seen enough.
                return Ok(());
            }
            printed |= count > 0;
        }
        if printed {
            continue;
        }
        if ended {
            return Ok(());
        }
        // What it printed last is there when it has ended.
        ended = !domain.run_dir.is_live(&domain.entry)?;
        if !ended {
            thread::sleep(LOOK);
        }
    }
}

/// The logs that are wanted: by default what a container's process, or else the console has printed.
fn open<'a>(args: &LogsArgs, domain: &'a Domain) -> Result<Vec<(Log, LogReader<'a>)>, Failure> {
    let find = |log| {
        let reader = LogReader::open(&domain.entry.dir, log).map_err(|error| failed(domain, error))?;
        Ok::<_, Failure>(reader.map(|reader| (log, reader)))
    };
    let id = &domain.entry.id;
    if args.monitor {
        let missing = format!("what the monitor of domain {id} says is not kept: it runs in the foreground");
        return one(find(Log::Monitor)?, domain, missing);
    }
    let of_container = if args.console { [None, None] } else { [find(Log::Stdout)?, find(Log::Stderr)?] };
    let of_container: Vec<_> = of_container.into_iter().flatten().collect();
    if !of_container.is_empty() {
        return Ok(of_container);
    }
    let missing = format!("the console of domain {id} is not kept: it is not on stdio");
    one(find(Log::Console)?, domain, missing)
}

/// The log that was looked for, or why there is none: that of a domain that ends meanwhile goes with it.
fn one<T>(log: Option<T>, domain: &Domain, missing: String) -> Result<Vec<T>, Failure> {
    match log {
        Some(log) => Ok(vec![log]),
        None if domain.run_dir.is_live(&domain.entry)? => Err(Failure::NotKept(missing)),
        None => Err(Failure::Ended(domain.entry.id.clone())),
    }
}

fn failed(domain: &Domain, error: io::Error) -> Failure {
    Failure::NotKept(format!("the log of domain {}: {error}", domain.entry.id))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};
    use crate::run_dir::RunDir;

    #[test]
    fn what_is_not_kept_is_told_from_what_went_with_its_domain() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let own = RunDir::open_or_make(&run_dir).unwrap().make_entry("d").unwrap();
        let args = |which: &[&str]| {
            let words = ["cofferdam", "logs", "d", "--run-dir", run_dir.to_str().unwrap()];
            match Cli::try_parse_from(words.iter().chain(which)).unwrap().command {
                Command::Logs(args) => args,
                _ => unreachable!("the command line says logs"),
            }
        };
        let (console, monitor) = (args(&[]), args(&["--monitor"]));
        let domain = Domain::find(&console.target).unwrap();
        let refusal = |args| print_log(args, &domain).unwrap_err().to_string();
        assert_eq!(refusal(&console), "the console of domain d is not kept: it is not on stdio");
        let foreground = "what the monitor of domain d says is not kept: it runs in the foreground";
        assert_eq!(refusal(&monitor), foreground);
        drop(own);
        assert_eq!([refusal(&console), refusal(&monitor)], ["domain d has ended"; 2]);
    }
}
