//! `cofferdam-manuals FOLDER`: see the library.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: cofferdam-manuals FOLDER");
        return ExitCode::FAILURE;
    };
    match cofferdam_manuals::make(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cofferdam-manuals: {}: {error}", Path::new(&folder).display());
            ExitCode::FAILURE
        }
    }
}
