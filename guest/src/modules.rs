//! The kernel's modules in the initial RAM disk, which are loaded when it is known that this domain needs them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use cofferdam_container_protocol::modules::{self, Need};
use cofferdam_container_protocol::step::{Object, Reason};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::failure::{Failure, Reasoned, index};

/// Where they are, and their list.
const FOLDER: &str = "/modules";
const ORDER: &str = "order";

/// What is in the RAM disk.
#[derive(Debug)]
pub struct Modules {
    order: String,
    /// Lines of `order`.
    loaded: BTreeSet<usize>,
}

impl Modules {
    /// Reads their list.
    ///
    /// # Errors
    /// If it is not there.
    pub fn read() -> Result<Self, Failure> {
        let order = fs::read_to_string(Path::new(FOLDER).join(ORDER)).because(Reason::Missing)?;
        Ok(Self { order, loaded: BTreeSet::new() })
    }

    /// Loads what is needed for that and not loaded yet; with none, what is always needed.
    ///
    /// # Errors
    /// If the kernel refuses one.
    pub fn load(&mut self, need: Option<Need>) -> Result<(), Failure> {
        for (at, line) in self.order.lines().enumerate() {
            if let Some(file) = modules::file(line, need)
                && self.loaded.insert(at)
            {
                let path = Path::new(FOLDER).join(file);
                let of = |failure: Failure| failure.of(Object::Module(index(at)));
                load(&path).because(Reason::LoadFailed).map_err(of)?;
                // It is in memory twice otherwise.
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }
}

impl Drop for Modules {
    /// What nobody needs is not to take memory.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(FOLDER);
    }
}

fn load(path: &Path) -> rustix::io::Result<()> {
    let module = File::open(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    match finit_module(&module, c"", 0) {
        // What it drives is not there; or it is built in.
        Err(Errno::NODEV | Errno::EXIST) => Ok(()),
        loaded => loaded,
    }
}
