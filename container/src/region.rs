//! Parts of files.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// Bytes of a file, which are read by their place: readers of one file do not disturb each other.
#[derive(Clone, Debug)]
pub struct Region {
    file: Rc<File>,
    at: u64,
    end: u64,
}

impl Region {
    /// All of a file, as long as it is now.
    ///
    /// # Errors
    /// If its size cannot be found out.
    pub fn whole(file: File) -> io::Result<Self> {
        let end = file.metadata()?.len();
        Ok(Self { file: Rc::new(file), at: 0, end })
    }

    /// The bytes from `at` on, `size` of them or as many as there are.
    pub fn part(&self, at: u64, size: u64) -> Self {
        let at = self.at.saturating_add(at).min(self.end);
        Self { file: self.file.clone(), at, end: at.saturating_add(size).min(self.end) }
    }

    /// Bytes that are left to be read.
    pub fn size(&self) -> u64 {
        self.end - self.at
    }
}

impl Read for Region {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.size()).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn parts_are_what_they_are_of() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let whole = Region::whole(file).unwrap();
        let text = |mut region: Region| {
            let mut text = String::new();
            region.read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(text(whole.clone()), "0123456789");
        assert_eq!(text(whole.part(3, 4)), "3456");
        assert_eq!(text(whole.part(3, 4).part(2, 10)), "56");
        assert_eq!(text(whole.part(8, u64::MAX)), "89");
        assert_eq!(text(whole.part(u64::MAX, 1)), "");
        assert_eq!(whole.part(8, 9).size(), 2);
    }
}
