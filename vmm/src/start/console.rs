//! The files of the serial console.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cofferdam_api::config::{self, SerialMode};
use cofferdam_api::source::Source;
use cofferdam_devices::rate_limiter::TokenBucket;
use rustix::fs::{FileType, fstat};
use rustix::net::sockopt::socket_acceptconn;
use rustix::termios::isatty;

use super::drives::bucket;
use super::{StartError, bad_descriptor, source};
use crate::descriptor::{DescriptorError, Inherited};

/// The field, as messages name it.
const SERIAL_PATH: &str = "serial.serial_out_path";

/// Where the console's bytes come from and go to, if anywhere.
#[derive(Default)]
pub struct ConsoleFiles {
    /// What is typed.
    pub input: Option<OwnedFd>,
    /// What is printed.
    pub output: Option<OwnedFd>,
    /// How much of that there may be; tokens are bytes.
    pub limit: Option<TokenBucket>,
}

/// Checks the console's descriptor, if it has one. A path is tried at the start only: that makes the file.
pub fn check_serial(serial: &config::Serial) -> Result<(), StartError> {
    let Some(path) = &serial.serial_out_path else { return Ok(()) };
    match source(SERIAL_PATH, path)? {
        Source::Path(_) => Ok(()),
        Source::Descriptor(_) => open_serial(path, &mut Inherited::default()).map(drop),
    }
}

pub(super) fn open_console(
    serial: &config::Serial,
    inherited: &mut Inherited,
) -> Result<ConsoleFiles, StartError> {
    let files = match (serial.mode, &serial.serial_out_path) {
        (SerialMode::None, _) => ConsoleFiles::default(),
        (SerialMode::File, Some(path)) => open_serial(path, inherited)?,
        // Validation has refused a mode `File` without a path.
        (SerialMode::Stdio | SerialMode::File, _) => ConsoleFiles {
            input: Some(duplicate("standard input", io::stdin().as_fd())?),
            output: Some(duplicate("standard output", io::stdout().as_fd())?),
            limit: None,
        },
    };
    Ok(ConsoleFiles { limit: serial.rate_limiter.and_then(bucket), ..files })
}

fn open_serial(path: &Path, inherited: &mut Inherited) -> Result<ConsoleFiles, StartError> {
    let field = SERIAL_PATH;
    let fd = match source(field, path)? {
        Source::Descriptor(fd) => fd,
        Source::Path(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                // A pipe without a reader must not hold up the start, when stop signals are not served yet.
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path)
                .map_err(|source| StartError::Console {
                    what: format!("{field}: {}", path.display()),
                    source,
                })?;
            return Ok(ConsoleFiles { output: Some(file.into()), ..Default::default() });
        }
    };
    let (output, readable) = inherited.writable(fd).map_err(bad_descriptor(field))?;
    let is_socket =
        fstat(&output).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
    if is_socket && socket_acceptconn(&output) != Ok(false) {
        return Err(bad_descriptor(field)(DescriptorError::NotConnected(fd)));
    }
    // What has two directions is the console's input too.
    let input = if readable && (is_socket || isatty(&output)) {
        Some(duplicate(field, output.as_fd())?)
    } else {
        None
    };
    Ok(ConsoleFiles { input, output: Some(output), limit: None })
}

fn duplicate(what: &str, fd: BorrowedFd<'_>) -> Result<OwnedFd, StartError> {
    fd.try_clone_to_owned().map_err(|source| StartError::Console { what: what.to_owned(), source })
}
