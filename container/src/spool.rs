//! The content of files between a source and an image: one temporary file, which nothing names.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};

/// What is only zeros in pieces of this size, in bytes, is a hole.
pub const PIECE: usize = 64 << 10;

/// The temporary file.
#[derive(Debug)]
pub struct Spool {
    file: File,
    end: u64,
}

/// The content of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    size: u64,
    /// Ordered, and apart from each other; between them are holes. Each begins at a multiple of [`PIECE`].
    extents: Vec<Extent>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent {
    /// Where in the file, in bytes.
    at: u64,
    /// Where in the spool.
    from: u64,
    length: u64,
}

impl Content {
    /// Its size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it has holes.
    pub fn is_sparse(&self) -> bool {
        self.extents.iter().map(|extent| extent.length).sum::<u64>() != self.size
    }

    /// Whether these bytes are in a hole.
    pub fn is_hole(&self, at: u64, length: u64) -> bool {
        let next = self.extents.partition_point(|extent| extent.at + extent.length <= at);
        self.extents.get(next).is_none_or(|extent| extent.at >= at + length)
    }
}

impl Spool {
    /// An empty one in `folder`, whose file system holds it.
    ///
    /// # Errors
    /// If no temporary file can be made there.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Self { file: file.into(), end: 0 })
    }

    /// Begins a file.
    pub fn add(&mut self) -> Adding<'_> {
        Adding { spool: self, content: Content::default(), piece: Vec::new() }
    }

    /// Reads `buffer.len()` bytes of a file that has as many from `at` on.
    ///
    /// # Errors
    /// If the spool cannot be read.
    pub fn read(&self, content: &Content, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let end = at + buffer.len() as u64;
        let first = content.extents.partition_point(|extent| extent.at + extent.length <= at);
        for extent in content.extents[first..].iter().take_while(|extent| extent.at < end) {
            let from = extent.at.max(at);
            let to = (extent.at + extent.length).min(end);
            let target = &mut buffer[(from - at) as usize..(to - at) as usize];
            self.file.read_exact_at(target, extent.from + (from - extent.at))?;
        }
        Ok(())
    }
}

/// A file whose content is being added.
#[derive(Debug)]
pub struct Adding<'a> {
    spool: &'a mut Spool,
    content: Content,
    piece: Vec<u8>,
}

impl Adding<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// If the spool cannot be written.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.piece.len()));
            self.piece.extend(now);
            bytes = later;
            self.end_piece(PIECE)?;
        }
        Ok(())
    }

    /// Adds zeros.
    ///
    /// # Errors
    /// If the spool cannot be written.
    pub fn zeros(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            if self.piece.is_empty() && count >= PIECE as u64 {
                let whole = count / PIECE as u64 * PIECE as u64;
                self.content.size += whole;
                count -= whole;
                continue;
            }
            let now = count.min((PIECE - self.piece.len()) as u64);
            self.piece.resize(self.piece.len() + now as usize, 0);
            count -= now;
            self.end_piece(PIECE)?;
        }
        Ok(())
    }

    /// The whole content.
    ///
    /// # Errors
    /// If the spool cannot be written.
    pub fn finish(mut self) -> io::Result<Content> {
        self.end_piece(1)?;
        Ok(self.content)
    }

    /// Puts the piece into the spool if it has at least `least` bytes.
    fn end_piece(&mut self, least: usize) -> io::Result<()> {
        if self.piece.len() < least {
            return Ok(());
        }
        let (at, length) = (self.content.size, self.piece.len() as u64);
        self.content.size += length;
        // A file of less than a piece never has holes: they would save nothing.
        if self.content.size < PIECE as u64 || self.piece.iter().any(|byte| *byte != 0) {
            let from = self.spool.end;
            self.spool.file.write_all_at(&self.piece, from)?;
            self.spool.end += length;
            match self.content.extents.last_mut() {
                Some(last) if last.at + last.length == at && last.from + last.length == from => {
                    last.length += length;
                }
                _ => self.content.extents.push(Extent { at, from, length }),
            }
        }
        self.piece.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_comes_back_and_holes_stay_holes() {
        let mut spool = Spool::create(&std::env::temp_dir()).unwrap();
        let dense: Vec<u8> = (0..PIECE * 2 + 100).map(|at| (at % 251) as u8).collect();
        let mut adding = spool.add();
        dense.chunks(1000).for_each(|chunk| adding.write(chunk).unwrap());
        let first = adding.finish().unwrap();
        assert_eq!((first.size(), first.is_sparse()), (dense.len() as u64, false));

        let mut adding = spool.add();
        adding.zeros(10).unwrap();
        adding.write(b"a").unwrap();
        adding.zeros(5 * PIECE as u64).unwrap();
        adding.write(b"b").unwrap();
        adding.zeros(1 << 40).unwrap();
        let second = adding.finish().unwrap();
        let end = 12 + 5 * PIECE as u64;
        assert_eq!((second.size(), second.is_sparse()), (end + (1 << 40), true));
        assert!(!second.is_hole(0, 1));
        assert!(second.is_hole(PIECE as u64, 4 * PIECE as u64));
        assert!(!second.is_hole(PIECE as u64, 5 * PIECE as u64));
        assert!(second.is_hole(6 * PIECE as u64, 1 << 30));
        assert!(spool.end < 5 * PIECE as u64);

        let mut buffer = vec![9; dense.len() - 7];
        spool.read(&first, 7, &mut buffer).unwrap();
        assert_eq!(buffer, dense[7..]);
        let mut buffer = vec![9; end as usize];
        spool.read(&second, 0, &mut buffer).unwrap();
        let set: Vec<usize> = (0..buffer.len()).filter(|at| buffer[*at] != 0).collect();
        assert_eq!(set, [10, end as usize - 1]);
    }
}
