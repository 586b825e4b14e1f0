//! The options of `cofferdam run` about containers.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use cofferdam_container_manifest::Signal;

use crate::container::derive::Changes;
use crate::units::parse_size;

/// What makes a domain that of a container.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options for containers")]
pub struct ContainerArgs {
    /// Run a container: a folder of `cofferdam container build`, or a source, which is built into the store on first use
    #[arg(
        long = "container",
        id = "container",
        value_name = "DIR|SOURCE",
        conflicts_with_all = ["kernel", "initrd", "cmdline", "boot", "boot_protocol", "drives", "host_data"]
    )]
    pub source: Option<String>,
    /// Use this manifest exactly as it is, with the layers of --container
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Where sources are built [default: $XDG_DATA_HOME/cofferdam, else ~/.local/share/cofferdam]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Let the container read standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal, with standard input
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// User of the process, and group: names of the image's, or numbers
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Keep what the container writes on an encrypted device of this size instead of in the domain's memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    scratch: Option<u64>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Let `cofferdam exec` run exactly this command, words with blanks between them; may be given several times
    #[arg(long, value_name = "COMMAND")]
    allow_exec: Vec<Words>,
    /// Let the host send this signal, as USR1; may be given several times
    #[arg(long, value_name = "SIGNAL", value_parser = parse_signal)]
    allow_signal: Vec<Signal>,
    /// Program and arguments, instead of the image's command but behind its entry point
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// A command whose words have blanks between them.
#[derive(Clone, Debug)]
struct Words(Vec<String>);

impl FromStr for Words {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let words: Vec<String> = text.split_ascii_whitespace().map(str::to_owned).collect();
        if words.is_empty() { Err("it has no words") } else { Ok(Self(words)) }
    }
}

impl ContainerArgs {
    /// An option that says something of a container. (That it needs `--container`, clap does not say if another option
    /// excludes that.)
    pub fn first_given(&self) -> Option<&'static str> {
        let given = [
            ("--manifest", self.manifest.is_some()),
            ("--store", self.store.is_some()),
            ("--interactive", self.interactive),
            ("--tty", self.tty),
            ("--env", !self.env.is_empty()),
            ("--user", self.user.is_some()),
            ("--scratch", self.scratch.is_some()),
            ("--read-only", self.read_only),
            ("--allow-exec", !self.allow_exec.is_empty()),
            ("--allow-signal", !self.allow_signal.is_empty()),
            ("COMMAND", !self.command.is_empty()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }

    /// What the manifest is to say.
    pub fn changes(&self) -> Changes {
        Changes {
            command: self.command.clone(),
            env: self.env.clone(),
            user: self.user.clone(),
            scratch: self.scratch,
            read_only: self.read_only,
            terminal: self.tty,
            stdin: self.interactive,
            exec: self.allow_exec.iter().map(|words| words.0.clone()).collect(),
            signals: self.allow_signal.clone(),
        }
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("it is NAME=VALUE".to_owned()),
    }
}

/// Reads the name of a signal that a manifest can allow.
pub fn parse_signal(text: &str) -> Result<Signal, String> {
    Signal::from_name(text).ok_or_else(|| {
        format!("{text:?} is not a signal that a manifest can allow, such as TERM, INT or USR1")
    })
}
