//! Messages for a person, on standard error. Nothing here fails: who closed
//! standard error does not want them.

use std::env;
use std::io::{self, IsTerminal, Write};

use cofferdam_api::status::Platform;
use cofferdam_confidential::image::inspect::hex;

/// How a message looks on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it is.
    Plain,
    /// Yellow.
    Warning,
    /// Red.
    Error,
}

/// Prints one line. With a terminal in raw mode, which does not go back to the
/// left edge by itself, `raw` does that.
pub fn say(tone: Tone, message: &str, raw: bool) {
    let end = if raw && io::stderr().is_terminal() { "\r\n" } else { "\n" };
    let line = format_line(tone, message, coloured(&io::stderr()));
    let _ = io::stderr().lock().write_all(format!("{line}{end}").as_bytes());
}

/// Prints what was asked for on standard output. Who closed it does not want it.
pub fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// That domain `id` runs, and what that means; with a container, what binds its manifest.
pub fn running(id: &str, platform: Platform, protected: bool, manifest: Option<&[u8; 32]>) -> String {
    let (name, protection) = (platform_name(platform), protection(protected));
    let Some(digest) = manifest else { return format!("domain {id} runs on platform {name}: {protection}") };
    let bound = if protected { "bound by the launch" } else { "asserted by this host alone" };
    format!("container {id} is on platform {name}: {protection}; manifest sha256:{}, {bound}", hex(digest))
}

/// The name of `platform`.
pub fn platform_name(platform: Platform) -> &'static str {
    match platform {
        Platform::Plain => "plain",
        Platform::Snp => "snp",
    }
}

/// Whether the platform protects a domain, in words.
pub fn protection(protected: bool) -> &'static str {
    if protected { "protected" } else { "not protected" }
}

/// Whether colours may be used on `stream`: on a terminal, unless NO_COLOR is set.
pub fn coloured(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Text that somebody else has chosen, such as a file's name, its maker or a guest: no control codes for the terminal.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn format_line(tone: Tone, message: &str, coloured: bool) -> String {
    let message = plain(message);
    match tone {
        Tone::Warning if coloured => format!("cofferdam: \x1b[33m{message}\x1b[0m"),
        Tone::Error if coloured => format!("cofferdam: \x1b[31m{message}\x1b[0m"),
        _ => format!("cofferdam: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_control_codes() {
        assert_eq!(format_line(Tone::Error, "a\x1b[2Jb\n", false), "cofferdam: a [2Jb ");
        assert_eq!(format_line(Tone::Error, "a", true), "cofferdam: \x1b[31ma\x1b[0m");
        assert_eq!(format_line(Tone::Plain, "a", true), "cofferdam: a");
    }
}
