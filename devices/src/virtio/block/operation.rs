//! One request on its way through the host's file.
//!
//! An [`Operation`] is a small state machine that knows nothing of how system
//! calls are made: an engine asks it for the next [`Step`], runs that, and hands
//! the result back with [`Operation::advance`]. Short transfers, interrupted calls
//! and ways of zeroing that a file system does not have are dealt with here, once
//! for all engines.

use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::buffers::{Buffers, IoVec};
use super::file::{BlockFile, ZeroMethod};

/// How often in a row a call may ask to be made again.
const MAX_RETRIES: u8 = 16;

/// What is needed to answer a request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ticket {
    /// Index of the chain's first descriptor.
    pub head: u16,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// Writable bytes before the status.
    pub writable: u64,
    /// When the request was taken.
    pub start: Option<Instant>,
}

impl Ticket {
    /// How long ago the request was taken.
    pub(super) fn time(&self) -> Duration {
        self.start.map(|start| start.elapsed()).unwrap_or_default()
    }
}

/// What is to be done with the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Work {
    /// Read into the buffers.
    Read,
    /// Write from the buffers.
    Write,
    /// Make writes durable.
    #[default]
    Flush,
    /// Give a range back.
    Discard,
    /// Zero a range, by the method that was found to work.
    Zero { unmap: bool, method: ZeroMethod },
}

/// One system call.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// `preadv`
    Read { offset: u64, vectors: &'a [IoVec] },
    /// `pwritev`
    Write { offset: u64, vectors: &'a [IoVec] },
    /// `fdatasync`
    Sync,
    /// `fallocate`
    Allocate { mode: FallocateFlags, offset: u64, length: u64 },
}

/// Where an operation is after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is another step.
    More,
    /// It has ended.
    Done(Result<(), Errno>),
}

/// One request on its way.
#[derive(Debug, Default)]
pub(super) struct Operation {
    /// What is needed to answer it.
    pub ticket: Ticket,
    /// Memory to read into or write from.
    pub buffers: Buffers,
    work: Work,
    /// Next byte of the file.
    offset: u64,
    /// Bytes of the range left; not used by a flush.
    left: u64,
    /// Bytes of data moved, zeroes included.
    moved: u64,
    retries: u8,
    /// Whether the change is to be durable when the operation ends.
    durable: bool,
    /// Whether the data is there and only that is missing.
    syncing: bool,
}

impl Operation {
    /// Begins anew. For reads and writes the buffers are set already, with `length` bytes.
    pub(super) fn begin(&mut self, ticket: Ticket, work: Work, offset: u64, length: u64) {
        (self.ticket, self.work, self.offset, self.left) = (ticket, work, offset, length);
        (self.moved, self.retries) = (0, 0);
        (self.durable, self.syncing) = (false, false);
    }

    /// Makes the operation end in `fdatasync`.
    pub(super) fn make_durable(&mut self) {
        self.durable = true;
    }

    /// What is done.
    pub(super) fn work(&self) -> Work {
        self.work
    }

    /// Bytes of data moved so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// The next system call.
    pub(super) fn step(&mut self) -> Step<'_> {
        let (offset, length) = (self.offset, self.left);
        match self.work {
            _ if self.syncing => Step::Sync,
            Work::Read => Step::Read { offset, vectors: self.buffers.vectors() },
            Work::Write => Step::Write { offset, vectors: self.buffers.vectors() },
            Work::Flush => Step::Sync,
            Work::Discard => Step::Allocate {
                mode: FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                length,
            },
            Work::Zero { method, .. } => {
                if let Some(mode) = method.mode() {
                    return Step::Allocate { mode, offset, length };
                }
                if self.buffers.left() == 0 {
                    self.buffers.set_zeroes(length);
                }
                Step::Write { offset, vectors: self.buffers.vectors() }
            }
        }
    }

    /// Takes the result of the step: the bytes that it moved.
    pub(super) fn advance(&mut self, file: &BlockFile, result: Result<u64, Errno>) -> Progress {
        match result {
            Ok(_) if self.syncing => Progress::Done(Ok(())),
            Ok(bytes) => match self.succeeded(bytes) {
                Progress::Done(Ok(())) if self.durable => {
                    self.syncing = true;
                    Progress::More
                }
                progress => progress,
            },
            Err(error @ (Errno::INTR | Errno::AGAIN)) => {
                self.retries = self.retries.saturating_add(1);
                if self.retries < MAX_RETRIES { Progress::More } else { Progress::Done(Err(error)) }
            }
            Err(error) => self.failed(file, error),
        }
    }

    fn succeeded(&mut self, bytes: u64) -> Progress {
        self.retries = 0;
        let moves_data = match self.work {
            Work::Read | Work::Write => true,
            Work::Zero { method, .. } => method == ZeroMethod::Write,
            Work::Flush | Work::Discard => false,
        };
        if !moves_data {
            return Progress::Done(Ok(()));
        }
        // The end of a file that was cut off under the drive: there are no bytes to give to the guest.
        if bytes == 0 {
            return Progress::Done(Err(Errno::IO));
        }
        self.buffers.advance(bytes);
        self.offset = self.offset.saturating_add(bytes);
        self.left = self.left.saturating_sub(bytes);
        self.moved = self.moved.saturating_add(bytes);
        if self.left == 0 { Progress::Done(Ok(())) } else { Progress::More }
    }

    fn failed(&mut self, file: &BlockFile, error: Errno) -> Progress {
        let missing = matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV);
        match &mut self.work {
            _ if self.syncing => Progress::Done(Err(error)),
            // A discard is a hint: nothing is lost if the host keeps the space.
            Work::Discard if missing || error == Errno::INVAL => Progress::Done(Ok(())),
            Work::Zero { unmap, method } if *method != ZeroMethod::Write && missing => {
                file.refuses(*method);
                *method = file.zero_method(*unmap);
                Progress::More
            }
            // A block device whose own blocks are larger than the drive's refuses the odd range.
            Work::Zero { method, .. } if *method != ZeroMethod::Write && error == Errno::INVAL => {
                *method = ZeroMethod::Write;
                Progress::More
            }
            _ => Progress::Done(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::block::buffers::MAX_ZEROES;
    use crate::virtio::block::file::{BlockOptions, BlockSource};

    fn file() -> BlockFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        BlockFile::open(BlockOptions::new(BlockSource::File(file, "test".into()), "disk")).unwrap()
    }

    fn write(bytes: u64) -> Operation {
        let mut operation = Operation::default();
        operation.buffers.set_zeroes(bytes);
        operation.begin(Ticket::default(), Work::Write, 1024, bytes);
        operation
    }

    fn offset(operation: &mut Operation) -> u64 {
        match operation.step() {
            Step::Read { offset, .. } | Step::Write { offset, .. } => offset,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn short_transfers_are_continued() {
        let (file, mut operation) = (file(), write(8192));
        assert_eq!(operation.advance(&file, Ok(5000)), Progress::More);
        assert_eq!((offset(&mut operation), operation.buffers.left()), (6024, 3192));
        assert_eq!(operation.advance(&file, Ok(3192)), Progress::Done(Ok(())));
        assert_eq!(operation.moved(), 8192);
    }

    #[test]
    fn the_end_of_the_file_is_an_error() {
        let (file, mut operation) = (file(), write(8192));
        assert_eq!(operation.advance(&file, Ok(4096)), Progress::More);
        assert_eq!(operation.advance(&file, Ok(0)), Progress::Done(Err(Errno::IO)));
    }

    #[test]
    fn interrupted_calls_are_made_again_but_not_for_ever() {
        let (file, mut operation) = (file(), write(512));
        for error in [Errno::INTR, Errno::AGAIN] {
            assert_eq!(operation.advance(&file, Err(error)), Progress::More);
        }
        let ends = (0..100).find_map(|_| match operation.advance(&file, Err(Errno::AGAIN)) {
            Progress::More => None,
            Progress::Done(result) => Some(result),
        });
        assert_eq!(ends, Some(Err(Errno::AGAIN)));
        assert_eq!(write(512).advance(&file, Err(Errno::NOSPC)), Progress::Done(Err(Errno::NOSPC)));
    }

    #[test]
    fn zeroes_are_written_in_pieces_where_nothing_better_is_supported() {
        let file = file();
        let mut operation = Operation::default();
        let work = Work::Zero { unmap: true, method: file.zero_method(true) };
        let length = MAX_ZEROES + 512;
        operation.begin(Ticket::default(), work, 4096, length);
        for mode in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
            let wanted = mode | FallocateFlags::KEEP_SIZE;
            assert!(matches!(operation.step(), Step::Allocate { mode, .. } if mode == wanted));
            assert_eq!(operation.advance(&file, Err(Errno::OPNOTSUPP)), Progress::More);
        }
        assert_eq!((offset(&mut operation), operation.buffers.left()), (4096, MAX_ZEROES));
        assert_eq!(operation.advance(&file, Ok(MAX_ZEROES)), Progress::More);
        assert_eq!((offset(&mut operation), operation.buffers.left()), (4096 + MAX_ZEROES, 512));
        assert_eq!(operation.advance(&file, Ok(512)), Progress::Done(Ok(())));
        assert_eq!((operation.moved(), file.zero_method(true)), (length, ZeroMethod::Write));
    }

    #[test]
    fn an_odd_range_is_written_without_giving_the_method_up() {
        let file = file();
        let mut operation = Operation::default();
        let work = Work::Zero { unmap: false, method: file.zero_method(false) };
        operation.begin(Ticket::default(), work, 512, 512);
        assert_eq!(operation.advance(&file, Err(Errno::INVAL)), Progress::More);
        assert_eq!(offset(&mut operation), 512);
        assert_eq!(operation.advance(&file, Err(Errno::INVAL)), Progress::Done(Err(Errno::INVAL)));
        assert_eq!(file.zero_method(false), ZeroMethod::ZeroRange);
    }

    #[test]
    fn a_durable_change_is_synced_last() {
        let file = file();
        let mut zero = Operation::default();
        let method = file.zero_method(false);
        zero.begin(Ticket::default(), Work::Zero { unmap: false, method }, 0, 512);
        for (mut operation, bytes) in [(write(512), 512), (zero, 0)] {
            operation.make_durable();
            assert!(!matches!(operation.step(), Step::Sync));
            assert_eq!(operation.advance(&file, Ok(bytes)), Progress::More);
            assert!(matches!(operation.step(), Step::Sync));
            assert_eq!(operation.advance(&file, Err(Errno::INTR)), Progress::More);
            assert!(matches!(operation.step(), Step::Sync));
            assert_eq!(operation.advance(&file, Ok(0)), Progress::Done(Ok(())));
        }
        let mut operation = write(512);
        operation.make_durable();
        assert_eq!(operation.advance(&file, Ok(512)), Progress::More);
        assert_eq!(operation.advance(&file, Err(Errno::INVAL)), Progress::Done(Err(Errno::INVAL)));
    }

    #[test]
    fn a_discard_that_the_host_cannot_do_is_no_error() {
        let file = file();
        for (error, result) in
            [(Errno::OPNOTSUPP, Ok(())), (Errno::INVAL, Ok(())), (Errno::IO, Err(Errno::IO))]
        {
            let mut operation = Operation::default();
            operation.begin(Ticket::default(), Work::Discard, 0, 512);
            assert_eq!(operation.advance(&file, Err(error)), Progress::Done(result));
        }
    }
}
