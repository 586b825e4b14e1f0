//! The status file: what the monitor tells whoever started it, a line each.

use std::fs::File;
use std::io::{self, Write};

use cofferdam_api::status::Event;

/// Writes events, if anybody wants them.
pub struct StatusFile(Option<File>);

impl StatusFile {
    /// Writes to `file`, or nowhere.
    pub fn new(file: Option<File>) -> Self {
        Self(file)
    }

    /// Whether anybody wants them.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Writes one event.
    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        let Some(file) = &mut self.0 else { return Ok(()) };
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        file.write_all(&line)
    }

    /// A second descriptor of the file, to watch for its reader.
    pub fn try_clone(&self) -> io::Result<Option<File>> {
        self.0.as_ref().map(File::try_clone).transpose()
    }
}
