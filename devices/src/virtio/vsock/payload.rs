//! Guest memory as the source or the target of a socket call, without a copy in between.
//!
//! The kernel reads and writes guest memory through an array of pointers, which safe Rust cannot lend it: the
//! guest may change the bytes at any moment. So this leaf module makes the two system calls itself.
#![allow(unsafe_code)] // `sendmsg` and `recvmsg` on memory that the guest shares.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use crate::virtio::chain::{self, Segment};

/// Parts of guest memory that one system call takes. More than a chain of Linux ever has; what
/// does not fit is left to the next call.
const MAX_VECTORS: usize = 64;

/// A run of bytes that lies scattered over segments of guest memory.
#[derive(Clone)]
pub struct GuestBytes<'a> {
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    /// The run, in the bytes of `segments`.
    range: Range<u64>,
}

impl<'a> GuestBytes<'a> {
    /// All of `segments`, which were checked against `memory`.
    pub fn new(memory: &'a GuestMemoryMmap, segments: &'a [Segment]) -> Self {
        Self { memory, segments, range: 0..chain::length(segments) }
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// Without the first `count` bytes.
    pub fn after(self, count: u64) -> Self {
        let start = self.range.start.saturating_add(count).min(self.range.end);
        Self { range: start..self.range.end, ..self }
    }

    /// The first `count` bytes, or all if there are fewer.
    pub fn first(self, count: u64) -> Self {
        let end = self.range.start.saturating_add(count).min(self.range.end);
        Self { range: self.range.start..end, ..self }
    }

    /// Copies to `to`, as much as both have; how much that was.
    pub fn read(&self, to: &mut [u8]) -> usize {
        let mut done = 0_usize;
        for slice in self.slices() {
            let Some(rest) = to.get_mut(done..) else { break };
            done = done.saturating_add(slice.copy_to(rest));
        }
        done
    }

    #[cfg(test)]
    /// Copies from `from`, as much as both have; how much that was.
    pub fn write(&self, from: &[u8]) -> usize {
        let mut done = 0_usize;
        for slice in self.slices() {
            let Some(rest) = from.get(done..) else { break };
            slice.copy_from(rest);
            done = done.saturating_add(slice.len().min(rest.len()));
        }
        done
    }

    /// Receives from a socket, never waiting. `Ok(0)`: end of the stream.
    pub fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut vectors = Vectors::new(self);
        let mut message = vectors.message();
        // SAFETY: `message` names `vectors`, whose pointers are to guest memory that `self.memory` keeps mapped
        // during the call; the guest's own accesses race with the kernel's copy only, not with Rust's.
        checked(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
    }

    /// Sends on a socket, never waiting and without raising SIGPIPE.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut vectors = Vectors::new(self);
        let message = vectors.message();
        // SAFETY: as in `receive`; the kernel only reads.
        checked(unsafe {
            libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        })
    }

    /// The run as mapped memory.
    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> {
        chain::slices(self.memory, self.segments, self.range.clone())
    }
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The array of pointers for one system call.
struct Vectors {
    vectors: [libc::iovec; MAX_VECTORS],
    count: usize,
}

impl Vectors {
    fn new(bytes: &GuestBytes<'_>) -> Self {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_VECTORS];
        let mut count = 0_usize;
        for (vector, slice) in vectors.iter_mut().zip(bytes.slices()) {
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            count = count.saturating_add(1);
        }
        Self { vectors, count }
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeroes is a valid `msghdr`: no name, no vectors, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.count as _;
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    fn segment(address: u64, length: u32) -> Segment {
        Segment { address: GuestAddress(address), length }
    }

    #[test]
    fn bytes_are_gathered_in_order_and_cut_at_both_ends() {
        let memory = memory();
        memory.write_slice(b"cdefg", GuestAddress(0xffe)).unwrap();
        memory.write_slice(b"ab", GuestAddress(0x10)).unwrap();
        let segments = [segment(0x10, 2), segment(0xffe, 5)];
        let all = GuestBytes::new(&memory, &segments);
        for (after, first, expected) in [
            (0, 7, &b"abcdefg"[..]),
            (1, 9, b"bcdefg"),
            (2, 3, b"cde"),
            (6, 1, b"g"),
            (7, 1, b""),
            (9, 9, b""),
        ] {
            let run = all.clone().after(after).first(first);
            assert_eq!(run.len(), expected.len() as u64);
            let mut out = [0; 16];
            let count = run.read(&mut out);
            assert_eq!(&out[..count], expected);
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            assert_eq!(run.send(ours.as_fd()).unwrap(), expected.len());
            drop(ours);
            let mut out = Vec::new();
            theirs.read_to_end(&mut out).unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn bytes_are_scattered_and_nothing_beside_them_is_touched() {
        let memory = memory();
        let segments = [segment(0x10, 2), segment(0xffe, 5)];
        let run = GuestBytes::new(&memory, &segments).after(1).first(4);
        assert_eq!(run.write(b"abcdefgh"), 4);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"wxyz!").unwrap();
        let read = |address, length| {
            let mut out = vec![0; length];
            memory.read_slice(&mut out, GuestAddress(address)).unwrap();
            out
        };
        assert_eq!((read(0x10, 3), read(0xffe, 5)), (b"\0a\0".to_vec(), b"bcd\0\0".to_vec()));
        assert_eq!(run.receive(ours.as_fd()).unwrap(), 4);
        assert_eq!((read(0x10, 3), read(0xffe, 5)), (b"\0w\0".to_vec(), b"xyz\0\0".to_vec()));
        assert_eq!(run.clone().first(2).receive(ours.as_fd()).unwrap(), 1);
        assert_eq!(run.receive(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(run.receive(ours.as_fd()).unwrap(), 0);
        assert_eq!(run.send(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn more_segments_than_vectors_are_taken_in_parts() {
        let memory = memory();
        let segments: Vec<Segment> = (0..MAX_VECTORS as u64 + 6).map(|i| segment(i * 16, 2)).collect();
        let run = GuestBytes::new(&memory, &segments);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(run.send(ours.as_fd()).unwrap(), MAX_VECTORS * 2);
        assert_eq!(run.clone().after(MAX_VECTORS as u64 * 2).send(ours.as_fd()).unwrap(), 12);
    }

    /// How much is cut off, from nothing to more than there can be.
    fn cut() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 0..0x800_u64, 1 => any::<u64>(), 1 => Just(u64::MAX)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However bytes lie and are cut, the run is that part of them.
        #[test]
        fn a_run_is_a_part_of_the_segments_bytes(
            segments in proptest::collection::vec((0..0x1e00_u64, 1..0x200_u32), 0..80),
            cuts in proptest::collection::vec((any::<bool>(), cut()), 0..4),
        ) {
            let memory = memory();
            let content: Vec<u8> = (0..0x2000_u32).map(|at| ((at * 7) >> 3) as u8).collect();
            memory.write_slice(&content, GuestAddress(0)).unwrap();
            let segments: Vec<Segment> = segments.iter().map(|&(start, length)| segment(start, length)).collect();
            let parts = |segments: &[Segment]| -> Vec<u8> {
                let range = |s: &Segment| s.address.0 as usize..s.address.0 as usize + s.length as usize;
                segments.iter().flat_map(|s| content[range(s)].to_vec()).collect()
            };
            let mut expected = parts(&segments);
            let mut run = GuestBytes::new(&memory, &segments);
            for (front, count) in cuts {
                let inside = usize::try_from(count).unwrap().min(expected.len());
                if front {
                    run = run.after(count);
                    expected.drain(..inside);
                } else {
                    run = run.first(count);
                    expected.truncate(inside);
                }
            }
            prop_assert_eq!(run.len(), expected.len() as u64);
            let mut out = vec![0; expected.len() + 3];
            prop_assert_eq!(run.read(&mut out), expected.len());
            prop_assert_eq!(&out[..expected.len()], &expected[..]);
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let sent = run.send(ours.as_fd()).unwrap();
            prop_assert!(sent == expected.len() || sent > 0 && segments.len() > MAX_VECTORS);
            drop(ours);
            let mut out = Vec::new();
            theirs.read_to_end(&mut out).unwrap();
            prop_assert_eq!(out, &expected[..sent]);
        }
    }
}
