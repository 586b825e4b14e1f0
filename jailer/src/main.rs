//! `cofferdam-jailer`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    cofferdam_jailer::main()
}
