//! Memory that a file is read into or written from, as the host kernel takes it.

use std::ops::Range;

use crate::virtio::Memory;
use crate::virtio::chain::{Segment, slices};

/// Most vectors of one system call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;
/// Most zeroes that are written at once, bytes.
pub(super) const MAX_ZEROES: u64 = 1 << 20;

static ZEROES: [u8; 4096] = [0; 4096];

/// `struct iovec`. Addresses are numbers here, so that an operation may move between threads.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct IoVec {
    base: usize,
    length: usize,
}

const _: () = assert!(
    size_of::<IoVec>() == size_of::<libc::iovec>()
        && align_of::<IoVec>() == align_of::<libc::iovec>()
        && std::mem::offset_of!(IoVec, length) == std::mem::offset_of!(libc::iovec, iov_len)
);

/// A list of vectors that is used up from the front. It keeps guest memory mapped for as long as it names it,
/// and its own memory from request to request.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    memory: Option<Memory>,
    vectors: Vec<IoVec>,
    /// Index of the first vector with bytes left.
    first: usize,
    /// Bytes left.
    left: u64,
}

impl Buffers {
    /// Names the bytes in `range` of `segments` of guest memory.
    pub(super) fn set_guest(&mut self, memory: &Memory, segments: &[Segment], range: Range<u64>) {
        self.clear();
        for slice in slices(memory, segments, range) {
            let base = slice.ptr_guard_mut().as_ptr().expose_provenance();
            self.push(IoVec { base, length: slice.len() });
        }
        self.memory = Some(memory.clone());
    }

    /// Names `bytes` zeroes, at most [`MAX_ZEROES`]; only to be written to a file.
    pub(super) fn set_zeroes(&mut self, bytes: u64) {
        self.clear();
        let mut missing = usize::try_from(bytes.min(MAX_ZEROES)).unwrap_or(0);
        while missing > 0 {
            let length = missing.min(ZEROES.len());
            self.push(IoVec { base: ZEROES.as_ptr().expose_provenance(), length });
            missing = missing.saturating_sub(length);
        }
    }

    fn push(&mut self, vector: IoVec) {
        self.left = self.left.saturating_add(vector.length as u64);
        self.vectors.push(vector);
    }

    /// Forgets the memory.
    pub(super) fn clear(&mut self) {
        (self.memory, self.first, self.left) = (None, 0, 0);
        self.vectors.clear();
    }

    /// Bytes left.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The vectors that are left, as many as one system call takes.
    pub(super) fn vectors(&self) -> &[IoVec] {
        let rest = self.vectors.get(self.first..).unwrap_or_default();
        rest.get(..MAX_VECTORS).unwrap_or(rest)
    }

    /// Takes `bytes` off the front.
    pub(super) fn advance(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(bytes);
        let mut bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if bytes < vector.length {
                vector.base = vector.base.saturating_add(bytes);
                vector.length = vector.length.saturating_sub(bytes);
                return;
            }
            bytes = bytes.saturating_sub(vector.length);
            self.first = self.first.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    #[test]
    fn bytes_are_taken_off_across_vectors() {
        let mut buffers = Buffers::default();
        buffers.set_zeroes(4096 * 2 + 512);
        let lengths = |buffers: &Buffers| buffers.vectors().iter().map(|v| v.length).collect::<Vec<_>>();
        assert_eq!(lengths(&buffers), [4096, 4096, 512]);
        buffers.advance(100);
        assert_eq!(lengths(&buffers), [3996, 4096, 512]);
        assert_eq!(buffers.vectors()[0].base, ZEROES.as_ptr().addr() + 100);
        buffers.advance(3996 + 4096);
        assert_eq!((lengths(&buffers), buffers.left()), (vec![512], 512));
        buffers.advance(u64::MAX);
        assert_eq!((lengths(&buffers), buffers.left()), (vec![], 0));
    }

    #[test]
    fn one_call_gets_no_more_vectors_than_the_kernel_takes() {
        let mut buffers = Buffers::default();
        for _ in 0..MAX_VECTORS + 10 {
            buffers.push(IoVec { base: 0, length: 1 });
        }
        assert_eq!(buffers.vectors().len(), MAX_VECTORS);
        buffers.advance(MAX_VECTORS as u64);
        assert_eq!(buffers.vectors().len(), 10);
    }

    #[test]
    fn guest_memory_is_kept_until_it_is_forgotten() {
        let ranges = [(GuestAddress(0x1000), 0x1000)];
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let segments = [(0x1000, 100), (0x1800, 50)]
            .map(|(address, length)| Segment { address: GuestAddress(address), length });
        let mut buffers = Buffers::default();
        buffers.set_guest(&memory, &segments, 16..120);
        assert_eq!(Memory::strong_count(&memory), 2);
        let host = memory.get_host_address(GuestAddress(0x1000)).unwrap().addr();
        let vectors: Vec<_> = buffers.vectors().iter().map(|v| (v.base - host, v.length)).collect();
        assert_eq!((vectors, buffers.left()), (vec![(16, 84), (0x800, 20)], 104));
        buffers.clear();
        assert_eq!((Memory::strong_count(&memory), buffers.vectors().len()), (1, 0));
    }

    #[test]
    fn zeroes_are_bounded() {
        let mut buffers = Buffers::default();
        buffers.set_zeroes(u64::MAX);
        assert_eq!(buffers.left(), MAX_ZEROES);
    }
}
