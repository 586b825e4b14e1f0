//! The command line as programs write it, read without clap.
//!
//! clap builds all that it can say about every option before it looks at the first word, which is a tenth of a start.
//! What is read here it would read alike; all else, from help to mistakes, is left to it.

use std::ffi::OsString;
use std::str::FromStr;

use cofferdam_api::server::DEFAULT_MAX_PAYLOAD;

use super::{Arguments, DEFAULT_ID};

/// Reads the words after the program's name; `None` where clap has to.
pub(super) fn read(words: impl IntoIterator<Item = OsString>) -> Option<Arguments> {
    let mut read = Arguments::default();
    let (mut id, mut max_payload) = (None, None);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let word = word.into_string().ok()?;
        let switch = match word.as_str() {
            "--no-api" => &mut read.no_api,
            "--boot-timer" => &mut read.boot_timer,
            "--no-seccomp" => &mut read.no_seccomp,
            "--show-level" => &mut read.show_level,
            "--show-log-origin" => &mut read.show_log_origin,
            _ => {
                let (name, text) = match word.split_once('=') {
                    Some((name, text)) => (name, text.to_owned()),
                    None => (word.as_str(), words.next()?.into_string().ok()?),
                };
                match name {
                    "--config-file" => set(&mut read.config_file, &text)?,
                    "--api-sock" => set(&mut read.api_sock, &text)?,
                    "--http-api-max-payload-size" => set(&mut max_payload, &text)?,
                    "--seccomp-filter" => set(&mut read.seccomp_filter, &text)?,
                    "--status-file" => set(&mut read.status_file, &text)?,
                    "--run-entry" => set(&mut read.run_entry, &text)?,
                    "--id" => set(&mut id, &text)?,
                    "--start-time-us" => set(&mut read.start_time_us, &text)?,
                    "--log-path" => set(&mut read.log_path, &text)?,
                    "--level" => set(&mut read.level, &text)?,
                    "--module" => set(&mut read.module, &text)?,
                    "--log-format" => set(&mut read.log_format, &text)?,
                    "--metrics-path" => set(&mut read.metrics_path, &text)?,
                    _ => return None,
                }
                continue;
            }
        };
        // Nothing is said twice.
        if std::mem::replace(switch, true) {
            return None;
        }
    }
    let contradicts = read.no_api && (read.api_sock.is_some() || read.config_file.is_none())
        || read.no_seccomp && read.seccomp_filter.is_some();
    (!contradicts).then(|| Arguments {
        id: id.unwrap_or_else(|| DEFAULT_ID.to_owned()),
        http_api_max_payload_size: max_payload.unwrap_or(DEFAULT_MAX_PAYLOAD),
        ..read
    })
}

fn set<T: FromStr>(value: &mut Option<T>, text: &str) -> Option<()> {
    // What is empty, or like an option, may mean something else.
    if value.is_some() || text.is_empty() || text.starts_with('-') {
        return None;
    }
    *value = Some(text.parse().ok()?);
    Some(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn with_clap(words: &[OsString]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from([OsString::from("vmm")].iter().chain(words))
    }

    /// A value that the option `name` takes.
    fn value(name: &str) -> &'static str {
        match name {
            "level" => "debug",
            "log-format" => "json",
            _ => "7",
        }
    }

    #[test]
    fn every_option_is_read_as_clap_reads_it() {
        assert_eq!(read(words(&[])), with_clap(&[]).ok());
        for option in Arguments::command().get_arguments() {
            let name = option.get_long().unwrap();
            if ["help", "version"].contains(&name) {
                continue;
            }
            let long = format!("--{name}");
            let takes_value = option.get_action().takes_values();
            let mut spellings = vec![words(&[&long])];
            if takes_value {
                let equals = format!("{long}={}", value(name));
                spellings = vec![words(&[&long, value(name)]), words(&[&equals])];
            }
            for mut spelling in spellings {
                if name == "no-api" {
                    spelling.extend(words(&["--config-file", "7"]));
                }
                let plain = read(spelling.clone());
                assert!(plain.is_some(), "{spelling:?}");
                assert_ne!(plain, read([]), "{spelling:?}");
                assert_eq!(plain, with_clap(&spelling).ok(), "{spelling:?}");
            }
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_clap() {
        for not_plain in [
            &["--help"][..],
            &["-V"],
            &["--version"],
            &["word"],
            &["--"],
            &["--id"],
            &["--no-api=true"],
            &["--id", "--id"],
            &["--id", "a", "--id", "a"],
            &["--boot-timer", "--boot-timer"],
            &["--no-api"],
            &["--no-api", "--config-file", "a", "--api-sock", "b"],
            &["--no-seccomp", "--seccomp-filter", "a"],
            &["--id="],
            &["--level", "loud"],
        ] {
            assert_eq!(read(words(not_plain)), None, "{not_plain:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_clap_reads_alike(seeds in prop::collection::vec((0_usize..32, 0_usize..12), 0..6)) {
            let values = ["fd:3", "fd:1", "/a=b", "7", "+7", "-7", "", "json", "WARNING", "--", "--no-api", "7.0"];
            let options: Vec<_> = Arguments::command()
                .get_arguments()
                .filter_map(|option| Some(format!("--{}", option.get_long()?)))
                .collect();
            let mut words = Vec::new();
            for (option, kind) in seeds {
                let Some(option) = options.get(option) else {
                    words.push(OsString::from(values[kind]));
                    continue;
                };
                let (name, value) = (option.as_str(), values[kind]);
                match kind % 3 {
                    0 => words.push(OsString::from(format!("{name}={value}"))),
                    1 => words.extend([name, value].map(OsString::from)),
                    _ => words.push(OsString::from(name)),
                }
            }
            if let Some(plain) = read(words.clone()) {
                prop_assert_eq!(Some(plain), with_clap(&words).ok());
            }
        }
    }
}
