//! The command `cofferdam`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    cofferdam_cli::main()
}
