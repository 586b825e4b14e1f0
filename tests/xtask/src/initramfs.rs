//! Writes initial RAM disks: cpio archives in the "newc" format
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst),
//! uncompressed, because decompression is slow in an emulated guest.
//!
//! ```text
//! archive := entry* trailer            each entry padded to 4 bytes
//! entry   := "070701" 13 x 8 hex digits, name, NUL, padding, content, padding
//! trailer := an entry named "TRAILER!!!"
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::Error;
use crate::modules::Module;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An initial RAM disk in the making. Paths may start with a slash; the
/// directories above them are made as needed.
#[derive(Debug, Default)]
pub struct InitramfsBuilder {
    archive: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
    module_list: String,
}

impl InitramfsBuilder {
    /// A RAM disk with `/dev/console`, which the kernel gives to `/init` as its
    /// stdin, stdout and stderr, and empty `/proc`, `/sys`, `/run` and `/tmp`.
    pub fn new() -> Self {
        let mut image = Self::default();
        for path in ["dev", "proc", "sys", "run", "tmp"] {
            image.directory(path);
        }
        image.entry("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
        image
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        let path = path.trim_matches('/');
        self.parents(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
        self
    }

    /// Adds a file with `mode`'s permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Self {
        let path = path.trim_matches('/');
        self.parents(path);
        self.entry(path, FILE | (mode & 0o7777), (0, 0), content);
        self
    }

    /// Adds a copy of the file `source`, executable.
    pub fn program(&mut self, path: &str, source: &Path) -> Result<&mut Self, Error> {
        let content = fs::read(source).map_err(Error::file("read", source))?;
        Ok(self.file(path, 0o755, &content))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        let path = path.trim_matches('/');
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
        self
    }

    /// Adds busybox as `/bin/busybox`, and `/bin/APPLET` for each of `applets`.
    pub fn busybox(&mut self, busybox: &Path, applets: &[&str]) -> Result<&mut Self, Error> {
        self.program("bin/busybox", busybox)?;
        for applet in applets {
            self.symlink(&format!("bin/{applet}"), "busybox");
        }
        Ok(self)
    }

    /// Adds kernel modules (see [`crate::modules::ModuleTree::resolve`]) as
    /// `/m/NAME.ko`; their names stand in `/modules`, in the order given. To
    /// load them: `for m in $(cat /modules); do insmod /m/$m.ko; done`.
    pub fn modules(&mut self, modules: &[Module]) -> &mut Self {
        for module in modules {
            self.file(&format!("m/{}.ko", module.name), 0o644, &module.content);
            self.module_list.push_str(&module.name);
            self.module_list.push('\n');
        }
        self
    }

    /// Ends the archive and returns it.
    pub fn build(mut self) -> Vec<u8> {
        let list = std::mem::take(&mut self.module_list);
        self.file("modules", 0o644, list.as_bytes());
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.archive
    }

    fn parents(&mut self, path: &str) {
        let slashes: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
        for at in slashes {
            let parent = path.get(..at).unwrap_or_default();
            if self.directories.insert(parent.to_owned()) {
                self.entry(parent, DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let (uid, gid, links, mtime, checksum) = (0, 0, 1, 0, 0);
        let (device_major, device_minor) = (0, 0);
        // Nothing that goes into a RAM disk comes near 4 GiB.
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        let fields = [
            self.inode,
            mode,
            uid,
            gid,
            links,
            mtime,
            size,
            device_major,
            device_minor,
            device.0,
            device.1,
            name_size,
            checksum,
        ];
        self.archive.extend_from_slice(b"070701");
        for field in fields {
            self.archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and content of each entry, read as the kernel would.
    fn parse(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let length = archive.len();
        let mut entries = Vec::new();
        while !archive.is_empty() {
            assert_eq!((length - archive.len()) % 4, 0);
            assert_eq!(&archive[..6], b"070701");
            let field = |index: usize| {
                let digits = std::str::from_utf8(&archive[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let content = (110 + name_size).next_multiple_of(4);
            assert_eq!(archive[110 + name_size - 1], 0);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            entries.push((name, mode, archive[content..content + size].to_vec()));
            archive = &archive[(content + size).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn entries_read_back() {
        let mut image = InitramfsBuilder::new();
        image.file("/etc/deep/name", 0o640, b"12345").symlink("bin/sh", "busybox").file("init", 0o755, b"");
        image.modules(&[
            Module { name: "b".into(), content: b"ELF".to_vec() },
            Module { name: "a".into(), content: vec![] },
        ]);
        let entries = parse(&image.build());
        let find = |name: &str| entries.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!(find("etc/deep/name"), &("etc/deep/name".into(), 0o100_640, b"12345".to_vec()));
        assert_eq!(find("bin/sh"), &("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
        assert_eq!(find("init").1, 0o100_755);
        assert_eq!(find("dev/console").1, 0o020_600);
        assert_eq!(find("modules").2, b"b\na\n");
        assert_eq!(find("m/b.ko").2, b"ELF");
        assert_eq!(entries.last().unwrap().0, "TRAILER!!!");
    }

    #[test]
    fn directories_come_once_and_before_their_entries() {
        let mut image = InitramfsBuilder::new();
        image.file("a/b/c", 0o644, b"").file("a/b/d", 0o644, b"").directory("a/b").directory("/a");
        let entries = parse(&image.build());
        let names: Vec<_> =
            entries.iter().map(|entry| entry.0.as_str()).filter(|name| name.starts_with('a')).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d"]);
        assert!(entries.iter().all(|entry| !entry.0.is_empty()));
    }
}
