//! The monitor that Cofferdam is held against: Debian's QEMU with its `microvm`
//! machine, which runs inside the rig. Fetched for the benchmarks only.

use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::apt::Apt;
use crate::cache::Cache;
use crate::tool;

/// The release it is taken from.
const RELEASE: &str = "bookworm";

/// QEMU, its data, and the libraries that it is linked to as far as a small
/// Debian system does not have them.
const PACKAGES: [&str; 25] = [
    "qemu-system-x86",
    "qemu-system-data",
    "libaio1",
    "libbpf1",
    "libcapstone4",
    "libdaxctl1",
    "libelf1",
    "libfdt1",
    "libfuse3-3",
    "libgnutls30",
    "libibverbs1",
    "libjpeg62-turbo",
    "libndctl6",
    "libnl-3-200",
    "libnl-route-3-200",
    "libnuma1",
    "libpmem1",
    "libpng16-16",
    "librdmacm1",
    "libsasl2-2",
    "libseccomp2",
    "libslirp0",
    "liburing2",
    "libvdeplug2",
    "libudev1",
];

/// QEMU as Debian ships it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Its files, as they would lie below `/`.
    pub root: PathBuf,
    /// What it says of its version, such as `7.2.22`.
    pub version: String,
}

impl Peer {
    /// Debian's build for microVMs alone: quickest to start, but without io_uring and vhost.
    pub const SMALL: &'static str = "usr/bin/qemu-system-x86_64-microvm";
    /// The build with everything.
    pub const FULL: &'static str = "usr/bin/qemu-system-x86_64";

    /// Fetches it, if it is not in the cache.
    pub fn fetch() -> Result<Self, Error> {
        let cache = Cache::open()?;
        let recipe: Vec<&[u8]> = PACKAGES.iter().map(|package| package.as_bytes()).collect();
        let root = cache.entry("qemu-peer", &recipe, |directory| {
            let apt = Apt::new(&cache, RELEASE, &["deb main bookworm"])?;
            PACKAGES.iter().try_for_each(|package| apt.unpack(package, directory))
        })?;
        let mut peer = Self { root, version: String::new() };
        // Both are started: a library may be missing.
        tool::run(peer.command(Self::SMALL).arg("--version"))?;
        let text = tool::run(peer.command(Self::FULL).arg("--version"))?;
        let text = String::from_utf8_lossy(&text);
        peer.version = text.split_ascii_whitespace().nth(3).unwrap_or("of unknown version").to_owned();
        Ok(peer)
    }

    /// Its program `program`, [`SMALL`](Self::SMALL) or [`FULL`](Self::FULL), with its own libraries and data.
    pub fn command(&self, program: &str) -> Command {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| self.root.join(path));
        let libraries = libraries.map(|path| path.to_string_lossy().into_owned()).join(":");
        let mut command = Command::new(self.root.join(program));
        command.env("LD_LIBRARY_PATH", libraries).arg("-L").arg(self.root.join("usr/share/qemu"));
        command
    }
}
