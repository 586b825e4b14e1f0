//! The engine that does not wait: io_uring, its completions signalled by an eventfd.
//!
//! Every operation that the kernel works on is owned by the ring, in a slot whose
//! index is the `user_data` of its entries; so its vectors, the guest memory behind
//! them and its file stay in place until the completion is there, also when the drive
//! has got another file meanwhile. An operation has one entry in the ring at a time
//! and there are as many slots as entries, so the rings have room for all of them.
//!
//! A ring does only what this engine asks for: the kernel refuses every other operation, as system calls that
//! are made through a ring pass by the thread's seccomp policy.
//!
//! If the kernel takes no more entries, an operation is run at once, by the
//! synchronous engine: slower, but neither lost nor stuck.
#![allow(unsafe_code)] // entries name memory by address; that it stays there is proven here

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tracing::warn;

use super::file::BlockFile;
use super::operation::{Operation, Progress, Step};
use super::sync;

/// An operation that has ended, and how.
pub(super) type Finished = (Operation, Result<(), Errno>);

/// Longest wait of one call for operations that are under way.
const WAIT: Duration = Duration::from_secs(1);
/// Pause before the next wait where the kernel refused to wait.
const PAUSE: Duration = Duration::from_millis(1);

/// What a ring is for.
const OPERATIONS: [u8; 4] =
    [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];

/// A ring and the operations in it.
pub(super) struct Uring {
    ring: IoUring,
    event: OwnedFd,
    /// Operations under way, by slot.
    slots: Vec<Option<Slot>>,
    /// Slots not in use.
    free: Vec<usize>,
    /// Whether the kernel stopped taking entries; then operations are run at once.
    dead: bool,
}

/// An operation under way, and the file that it is made on.
struct Slot {
    operation: Operation,
    file: Arc<BlockFile>,
}

impl Uring {
    /// A ring for `depth` operations. An error if this kernel, or a policy of the host, does not
    /// allow everything that the engine needs.
    pub(super) fn new(depth: u16) -> io::Result<Self> {
        let mut ring = IoUring::builder().setup_r_disabled().build(u32::from(depth))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !ring.params().is_feature_ext_arg() || !OPERATIONS.iter().all(|&code| probe.is_supported(code)) {
            return Err(Errno::NOSYS.into());
        }
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        restrict(&ring)?;
        try_out(&mut ring)?;
        // Of the trial.
        rustix::io::read(&event, &mut [0; 8])?;
        let depth = usize::from(depth);
        let slots = (0..depth).map(|_| None).collect();
        Ok(Self { ring, event, slots, free: (0..depth).rev().collect(), dead: false })
    }

    /// Readable when operations have completed.
    pub(super) fn event(&self) -> &OwnedFd {
        &self.event
    }

    /// Makes the event unreadable until the next completion.
    pub(super) fn acknowledge(&self) {
        // It fails only if there is nothing to read.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// Whether no operation can be started.
    pub(super) fn is_full(&self) -> bool {
        !self.dead && self.free.is_empty()
    }

    /// Operations that have not been handed out as finished.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Puts `operation` on `file` into the ring, to be seen by the kernel at the next [`Self::submit`]. Given
    /// back if that was impossible and it was run at once.
    pub(super) fn start(&mut self, operation: Operation, file: &Arc<BlockFile>) -> Option<Finished> {
        let free = if self.dead { None } else { self.free.pop() };
        let started = Slot { operation, file: file.clone() };
        let Some(slot) = free else { return Some(started.run()) };
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(started);
        }
        self.push(slot)
    }

    /// Puts the next step of the operation in `slot` into the ring.
    fn push(&mut self, slot: usize) -> Option<Finished> {
        let Slot { operation, file } = self.slots.get_mut(slot)?.as_mut()?;
        let entry = entry(Fd(file.file.as_raw_fd()), &operation.step()).user_data(slot as u64);
        for _ in 0..2 {
            // SAFETY: the entry names memory of the operation in `slot`, which stays there, unchanged, until
            // the completion of this entry is taken out in `finished` or `drain`. The operation keeps guest
            // memory mapped; its vectors are on the heap and do not move with it. The slot keeps the file open.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return None;
            }
            // Entries are left over only from a submission that failed; it may work now.
            let _ = self.ring.submit();
        }
        self.take(slot).map(Slot::run)
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Takes the operation out of `slot`.
    fn take(&mut self, slot: usize) -> Option<Slot> {
        let taken = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(taken)
    }

    /// Whether entries wait for [`Self::submit`].
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        !self.dead && !self.ring.submission().is_empty()
    }

    /// Gives the kernel all entries. `EAGAIN` and `EBUSY` ask to try again later.
    pub(super) fn submit(&mut self) -> Result<(), Errno> {
        while self.has_unsubmitted() {
            match self.ring.submit() {
                Ok(0) => return Err(Errno::AGAIN),
                Ok(_) => {}
                Err(error) => match errno(&error) {
                    Errno::INTR => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// An operation that has ended since the last call. May leave entries to submit.
    pub(super) fn finished(&mut self) -> Option<Finished> {
        loop {
            let completion = self.next_completion()?;
            let slot = usize::try_from(completion.user_data()).ok()?;
            let Some(Slot { operation, file }) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            match operation.advance(file, decode(completion.result())) {
                Progress::More => {
                    if let Some(finished) = self.push(slot) {
                        return Some(finished);
                    }
                }
                Progress::Done(result) => return self.take(slot).map(|slot| (slot.operation, result)),
            }
        }
    }

    /// Waits until the kernel has let go of all operations, and forgets them. If that takes long, `slow` is told
    /// once of their number.
    pub(super) fn drain(&mut self, slow: impl FnOnce(usize)) {
        let mut slow = Some(slow);
        while !self.dead {
            while let Some(completion) = self.next_completion() {
                if let Ok(slot) = usize::try_from(completion.user_data()) {
                    drop(self.take(slot));
                }
            }
            if self.in_flight() == 0 {
                return;
            }
            let wait = Timespec::from(WAIT);
            let result = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&wait));
            match result.map_err(|error| errno(&error)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::TIME) => {
                    if let Some(slow) = slow.take() {
                        slow(self.in_flight());
                    }
                }
                Err(error) => {
                    // What was never submitted is not known to the kernel; the rest still completes.
                    if self.in_flight() <= self.ring.submission().len() {
                        warn!("a drive: io_uring: {error}; going on without");
                        self.slots.fill_with(|| None);
                        self.dead = true;
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.drain(|_| {});
    }
}

/// Enables the ring for [`OPERATIONS`] and the one of [`try_out`], for good. (The flags of an entry, and registering,
/// are forbidden by that alone.)
fn restrict(ring: &IoUring) -> io::Result<()> {
    let allowed = OPERATIONS.into_iter().chain([opcode::Nop::CODE]).map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed.collect::<Vec<_>>())?;
    ring.submitter().register_enable_rings()
}

/// Lets the kernel work on an entry that does nothing: a policy may allow rings but not their use.
fn try_out(ring: &mut IoUring) -> io::Result<()> {
    let entry = opcode::Nop::new().build();
    // SAFETY: the entry names no memory.
    unsafe { ring.submission().push(&entry) }.map_err(|_| io::Error::from(Errno::NOSPC))?;
    ring.submit_and_wait(1)?;
    ring.completion().next().map(|_| ()).ok_or_else(|| Errno::IO.into())
}

impl Slot {
    /// Runs the operation at once.
    fn run(mut self) -> Finished {
        let result = sync::run(&self.file, &mut self.operation);
        (self.operation, result)
    }
}

/// The entry that makes the system call `step`.
fn entry(file: Fd, step: &Step<'_>) -> squeue::Entry {
    match *step {
        Step::Read { offset, vectors } => {
            opcode::Readv::new(file, vectors.as_ptr().cast(), vectors.len() as u32).offset(offset).build()
        }
        Step::Write { offset, vectors } => {
            opcode::Writev::new(file, vectors.as_ptr().cast(), vectors.len() as u32).offset(offset).build()
        }
        Step::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Step::Allocate { mode, offset, length } => {
            opcode::Fallocate::new(file, length).offset(offset).mode(mode.bits().cast_signed()).build()
        }
    }
}

/// The result of a completion: bytes moved, or a negated error number.
fn decode(result: i32) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| Errno::from_raw_os_error(result.saturating_neg()))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::block::file::{BlockOptions, BlockSource};
    use crate::virtio::block::operation::{Ticket, Work};

    fn file() -> Arc<BlockFile> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let options = BlockOptions::new(BlockSource::File(file, "test".into()), "disk");
        Arc::new(BlockFile::open(options).unwrap())
    }

    fn write(head: u16, bytes: u64) -> Operation {
        let mut operation = Operation::default();
        operation.buffers.set_zeroes(bytes);
        let ticket = Ticket { head, ..Ticket::default() };
        operation.begin(ticket, Work::Write, u64::from(head) * 512, bytes);
        operation
    }

    fn finish(uring: &mut Uring, count: usize) -> Vec<u16> {
        let mut heads = Vec::new();
        while heads.len() < count {
            uring.submit().unwrap();
            uring.ring.submit_and_wait(1).unwrap();
            while let Some((operation, result)) = uring.finished() {
                result.unwrap();
                heads.push(operation.ticket.head);
            }
        }
        heads.sort_unstable();
        heads
    }

    #[test]
    fn operations_come_back_once_and_signal_the_event() {
        let (mut uring, file) = (Uring::new(4).unwrap(), file());
        for round in 0..10 {
            for head in 0..4 {
                assert!(!uring.is_full());
                assert!(uring.start(write(round * 4 + head, 512), &file).is_none());
            }
            assert!(uring.is_full());
            assert_eq!(finish(&mut uring, 4), (round * 4..round * 4 + 4).collect::<Vec<_>>());
            assert_eq!(rustix::io::read(uring.event(), &mut [0; 8]), Ok(8));
            assert!(rustix::io::read(uring.event(), &mut [0; 8]).is_err());
            assert_eq!(uring.in_flight(), 0);
        }
        assert!(uring.finished().is_none());
    }

    #[test]
    fn an_operation_ends_on_the_file_that_it_was_begun_on() {
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), [1; 2048]).unwrap();
        let open = || BlockFile::open(BlockOptions::new(BlockSource::Path(image.path().into()), "disk"));
        let (mut uring, former) = (Uring::new(4).unwrap(), Arc::new(open().unwrap()));
        assert!(uring.start(write(1, 512), &former).is_none());
        drop(former);
        assert!(uring.start(write(2, 512), &file()).is_none());
        open().expect_err("it is in use");
        assert_eq!(finish(&mut uring, 2), [1, 2]);
        open().expect("it is not any more");
        let content = std::fs::read(image.path()).unwrap();
        assert_eq!(content, [[1; 512], [0; 512], [1; 512], [1; 512]].concat());
    }

    #[test]
    fn a_ring_does_nothing_else() {
        let (mut uring, file) = (Uring::new(4).unwrap(), file());
        let fd = Fd(file.file.as_raw_fd());
        let mut byte = [0];
        for entry in [
            opcode::Close::new(fd).build(),
            opcode::Read::new(fd, byte.as_mut_ptr(), 1).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Nop::new().build().flags(squeue::Flags::ASYNC),
        ] {
            // SAFETY: the byte and the file are there until the completion.
            unsafe { uring.ring.submission().push(&entry) }.unwrap();
            uring.ring.submit_and_wait(1).unwrap();
            assert_eq!(uring.next_completion().unwrap().result(), -libc::EACCES);
        }
        assert!(uring.ring.submitter().register_files(&[fd.0]).is_err());
    }

    #[test]
    fn without_a_slot_an_operation_is_run_at_once() {
        let (mut uring, file) = (Uring::new(2).unwrap(), file());
        assert!(uring.start(write(0, 512), &file).is_none());
        assert!(uring.start(write(1, 512), &file).is_none());
        let (operation, result) = uring.start(write(2, 512), &file).unwrap();
        assert_eq!((operation.ticket.head, operation.moved(), result), (2, 512, Ok(())));
        assert_eq!(finish(&mut uring, 2), [0, 1]);
    }

    #[test]
    fn draining_forgets_what_is_under_way_and_what_is_not_submitted() {
        let (mut uring, file) = (Uring::new(4).unwrap(), file());
        uring.start(write(0, 1 << 20), &file);
        uring.submit().unwrap();
        uring.start(write(1, 512), &file);
        uring.drain(|_| {});
        assert_eq!((uring.in_flight(), uring.has_unsubmitted()), (0, false));
        assert!(uring.finished().is_none());
        uring.start(write(2, 512), &file);
        assert_eq!(finish(&mut uring, 1), [2]);
    }
}
