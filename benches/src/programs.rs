//! The programs that are measured, as an installation leaves them.
//!
//! A linker writes its file page by page through a mapping, and the page cache keeps the pages single. One that was
//! copied, or read from a disk, lies there in larger pieces, which are mapped in fewer steps: here the monitor, with its
//! 2.6 MB, starts 0.1 ms earlier from a copy, `floor` 0.03 ms. Nobody but a developer runs what the linker wrote, so all
//! sides run from copies.

use std::fs;
use std::path::PathBuf;

use cofferdam_tests::place;

use crate::Result;

fn installed(name: &str) -> PathBuf {
    place::root().join("target/bench").join(name)
}

/// Copies the programs to `target/bench`.
pub fn install() -> Result<()> {
    let _ = fs::remove_dir_all(installed(""));
    fs::create_dir_all(installed(""))?;
    fs::copy(place::monitor(), monitor())?;
    fs::copy(place::jailer(), jailer())?;
    for name in ["floor", "small-server", "namespaces"] {
        fs::copy(place::reference(name), reference(name))?;
    }
    Ok(())
}

/// The monitor.
pub fn monitor() -> PathBuf {
    installed("cofferdam-vmm")
}

/// The jailer.
pub fn jailer() -> PathBuf {
    installed("cofferdam-jailer")
}

/// What one of them is held against: the least that can do a part of its work.
pub fn reference(name: &str) -> PathBuf {
    installed(name)
}
