//! Writes cpio archives in the form that Linux unpacks into its first file system ("newc"; Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! ```text
//! archive := entry* trailer            each entry and each content padded to 4 bytes
//! entry   := "070701" 13 x 8 hexadecimal digits, name, NUL, padding, content, padding
//! trailer := an entry named "TRAILER!!!"
//! ```
//!
//! Owners, times and device numbers are zero, and inodes are counted: the same entries are the same bytes.

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// An archive in the making. Folders must be added before what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, FOLDER, &[]);
    }

    /// Adds a file that is no program.
    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, FILE, content);
    }

    /// Adds a program.
    pub fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, content);
    }

    /// The archive with its end.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries = self.entries.saturating_add(1);
        // No image has room for a file of 4 GiB.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len()).unwrap_or(u32::MAX).saturating_add(1);
        let links = if mode == FOLDER { 2 } else { 1 };
        // Inode, mode, owner, group, links, time, size, device, device of a device node, size of the name, check sum.
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_byte_by_byte() {
        let mut archive = Archive::default();
        archive.folder("d");
        archive.program("init", b"12345");
        let text = archive.finish().into_iter().map(char::from).collect::<String>();
        let header = |ino, mode: &str, links, size, name| {
            let zero = "00000000";
            format!(
                "070701{ino:08x}{mode}{zero}{zero}{links:08x}{zero}{size:08x}{zero}{zero}{zero}{zero}{name:08x}{zero}"
            )
        };
        let expected = [
            header(1, "000041ed", 2, 0, 2) + "d\0",
            header(2, "000081ed", 1, 5, 5) + "init\0\0" + "12345\0\0\0",
            header(3, "00000000", 1, 0, 11) + "TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(text, expected.concat());
    }
}
