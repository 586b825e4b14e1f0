//! The virtio block device (virtio 1.2, 5.2): a drive that is a raw file or a block device of the host.
//!
//! A request takes this way:
//!
//! 1. The driver puts a chain into the only queue and notifies. [`Block`] takes
//!    chains as long as the [rate limiter](crate::rate_limiter) allows and the
//!    engine has room.
//! 2. `request` checks it. What is wrong in it (range, type, a write to a
//!    read-only drive) is answered at once by the status byte. What is wrong in
//!    the chain itself (no header, no place for the status) means that the driver
//!    is broken: the device needs reset.
//! 3. An `operation` carries it out in steps, one system call each. The engine
//!    makes the calls: `uring`, where many are under way and complete in any
//!    order, or `sync`, one after the other.
//! 4. The status byte is written, the chain goes to the used ring, and the driver
//!    is interrupted once for all that were answered in one turn.
//!
//! A *turn* is one call from the event loop. It takes a bounded number of chains
//! and, with the synchronous engine, moves a bounded number of bytes; what is left
//! is done in the next turn, for which the device sets its timer, so that no guest
//! keeps the loop from the other devices. While chains are taken the driver need
//! not notify; at the end of a turn that found the queue empty it is asked to.
//!
//! Memory is bounded by the size of the queue, whatever the driver does.
//! Operations, with their lists of buffers, are used again.

mod buffers;
mod config;
mod file;
mod metrics;
mod moderation;
mod operation;
mod request;
mod sync;
#[cfg(test)]
mod tests;
mod timer;
mod uring;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::io::Errno;
use thiserror::Error;
use tracing::{info, warn};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueT};
use vm_memory::Bytes;

pub use self::file::{BlockFile, BlockFileError, BlockOptions, BlockSource, Cache, Engine};
pub use self::metrics::BlockMetrics;

use self::config::QUEUE_SIZE;
use self::moderation::Moderation;
use self::operation::{Operation, Ticket, Work};
use self::request::{HEADER_SIZE, Limits, Request};
use self::timer::Timer;
use self::uring::{Finished, Uring};
use super::chain::{Chain, ChainError};
use super::{ActivateError, DEVICE_EVENTS, Driver, Memory, VirtioDevice, VirtioInterrupt, used};
use crate::rate_limiter::{RateLimitChange, RateLimitError, RateLimiter};
use crate::tally::Tally;

/// Operations of the ring have completed.
const COMPLETION_EVENT: u32 = DEVICE_EVENTS;
/// It is time for another turn.
const TIMER_EVENT: u32 = DEVICE_EVENTS + 1;
/// Chains taken in one turn.
const TURN_CHAINS: u32 = QUEUE_SIZE as u32;
/// Bytes that the synchronous engine moves in one turn, if not in one request.
const TURN_BYTES: u64 = 16 << 20;
/// Time after which the kernel is asked again to take what it had no memory for.
const SUBMIT_AGAIN: Duration = Duration::from_millis(1);

/// A drive that cannot be made a device.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The limits mean nothing.
    #[error("rate limit of drive {id}: {error}")]
    RateLimit {
        /// Name of the drive.
        id: String,
        /// What is wrong.
        #[source]
        error: RateLimitError,
    },
    /// This host has no io_uring, and the drive must use it.
    #[error("drive {id}: engine Async needs io_uring, which this host refuses: {error}")]
    Uring {
        /// Name of the drive.
        id: String,
        /// The host's answer.
        #[source]
        error: io::Error,
    },
    /// The host gave no timer.
    #[error("drive {id}: timer: {error}")]
    Timer {
        /// Name of the drive.
        id: String,
        /// The host's answer.
        #[source]
        error: io::Error,
    },
}

/// Why the device needs reset.
#[derive(Debug, Error)]
enum Fault {
    #[error("block: {0}")]
    Chain(#[from] ChainError),
    #[error("block: the chain from descriptor {0} has no place for the status")]
    NoStatus(u16),
    #[error("block: the queue's rings left guest memory")]
    Rings,
    #[error("block: io_uring: {0}")]
    Uring(Errno),
}

/// A drive as a virtio device.
pub struct Block {
    file: Arc<BlockFile>,
    limits: Limits,
    limiter: RateLimiter,
    /// `None`: the synchronous engine.
    uring: Option<Uring>,
    timer: Timer,
    /// Whether the event loop refused a descriptor: the device would stop in the middle.
    deaf: bool,
    driver: Option<Live>,
    /// Operations not in use.
    spare: Vec<Operation>,
    metrics: Arc<BlockMetrics>,
    /// Lines about operations that failed on the host's side.
    failures: Tally,
    /// Lines about the timer.
    timer_failures: Tally,
    /// Lines about resets that waited for the host.
    slow_resets: Tally,
}

/// What the driver gave to the device.
struct Live {
    memory: Memory,
    queue: Queue,
    interrupt: Arc<VirtioInterrupt>,
    chain: Chain,
    /// Whether the driver relies on every write being durable: it could flush, and does not know how.
    write_through: bool,
    /// Chains that were answered in this turn.
    answered: u32,
    /// When the driver is told of them.
    moderation: Moderation,
}

/// What one turn may still do, and when the next is due.
struct Turn {
    chains: u32,
    bytes: u64,
    next: Option<Duration>,
}

/// Why a turn takes no more chains.
enum Stop {
    /// There are none.
    Empty,
    /// Something will start another turn.
    Later,
}

impl Block {
    /// A device for `file`, with the engine that its options ask for.
    pub fn new(file: BlockFile) -> Result<Self, BlockError> {
        Self::with_uring(file, Uring::new)
    }

    /// The same, with another way to get a ring.
    fn with_uring(file: BlockFile, uring: impl FnOnce(u16) -> io::Result<Uring>) -> Result<Self, BlockError> {
        let file = Arc::new(file);
        let id = || file.id.clone();
        let limiter = RateLimiter::new(file.limits, Instant::now())
            .map_err(|error| BlockError::RateLimit { id: id(), error })?;
        let uring = match file.engine {
            Engine::Sync => None,
            Engine::Auto if file.in_memory => None,
            Engine::Async => {
                let ring = uring(QUEUE_SIZE);
                Some(ring.map_err(|error| BlockError::Uring { id: id(), error })?)
            }
            Engine::Auto => uring(QUEUE_SIZE)
                .inspect_err(|error| info!("drive {}: without io_uring: {error}", file.id))
                .ok(),
        };
        let timer = Timer::new().map_err(|error| BlockError::Timer { id: id(), error })?;
        Ok(Self {
            limits: config::limits(&file),
            file,
            limiter,
            uring,
            timer,
            deaf: false,
            driver: None,
            spare: Vec::new(),
            metrics: Arc::default(),
            failures: Tally::default(),
            timer_failures: Tally::default(),
            slow_resets: Tally::default(),
        })
    }

    /// The file, to [reopen](BlockFile::reopen) it.
    pub fn file(&self) -> Arc<BlockFile> {
        self.file.clone()
    }

    /// Goes on with `file`, which [`BlockFile::reopen`] gave, and with the same engine. Requests under way end on the file
    /// that they were begun on.
    /// To be called by [`MmioTransport::reconfigure`](super::mmio::MmioTransport::reconfigure): the capacity changes.
    pub fn replace(&mut self, file: BlockFile) {
        self.limits = config::limits(&file);
        self.file = Arc::new(file);
        self.metrics.update_count.count();
    }

    /// Changes the limits on bandwidth and operations, with full buckets. To be called on the event loop thread.
    pub fn limit(&mut self, change: RateLimitChange) -> Result<(), RateLimitError> {
        self.limiter.change(change, Instant::now())?;
        // What waited for the former buckets, perhaps for hours, waits for these.
        self.turn();
        Ok(())
    }

    /// Whether I/O goes through io_uring.
    pub fn uses_uring(&self) -> bool {
        self.uring.is_some()
    }

    /// What is counted of this drive.
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        self.metrics.clone()
    }

    /// Does what can be done now.
    fn turn(&mut self) {
        let Some(mut live) = self.driver.take() else { return };
        if !live.interrupt.is_broken() {
            let mut turn = Turn { chains: TURN_CHAINS, bytes: TURN_BYTES, next: None };
            let result = self.take_chains(&mut live, &mut turn);
            let told = result.and_then(|()| self.tell(&mut live, &mut turn));
            if let Err(fault) = told {
                self.metrics.event_fails.count();
                live.interrupt.needs_reset(&fault);
            }
            if turn.next.is_some() {
                self.set_timer(turn.next);
            }
        }
        self.driver = Some(live);
    }

    /// Answers what has completed and starts what the driver made available.
    fn take_chains(&mut self, live: &mut Live, turn: &mut Turn) -> Result<(), Fault> {
        self.complete(live)?;
        loop {
            live.queue.disable_notification(&*live.memory).map_err(|_| Fault::Rings)?;
            let stop = loop {
                if self.must_wait(turn) {
                    break Stop::Later;
                }
                if !live.chain.pop(&mut live.queue, &live.memory)? {
                    break Stop::Empty;
                }
                turn.chains = turn.chains.saturating_sub(1);
                self.start(live, turn)?;
            };
            if matches!(stop, Stop::Later) || !used::rearm(&mut live.queue, &live.memory)? {
                break;
            }
        }
        self.submit(live, turn)
    }

    /// Whether no more chains may be taken. Then another turn is sure to come.
    fn must_wait(&mut self, turn: &mut Turn) -> bool {
        if self.uring.as_ref().is_some_and(Uring::is_full) {
            self.metrics.io_engine_throttled_events.count();
            return true; // until a completion
        }
        let wait = if turn.chains == 0 || turn.bytes == 0 {
            Some(Duration::ZERO)
        } else if self.limiter.is_unlimited() {
            None
        } else {
            let wait = self.limiter.wait(Instant::now());
            if wait.is_some() {
                self.metrics.rate_limiter_throttled_events.count();
            }
            wait
        };
        turn.next = turn.next.max(wait);
        wait.is_some()
    }

    /// Starts the request of the chain that was taken.
    fn start(&mut self, live: &mut Live, turn: &mut Turn) -> Result<(), Fault> {
        let head = live.chain.head;
        let status = live.chain.split_last_writable().ok_or(Fault::NoStatus(head))?;
        let writable = live.chain.writable_len();
        let ticket = Ticket { head, status, writable, start: Some(Instant::now()) };
        let request = Request::read(&live.chain, &live.memory, &self.limits)?;
        let data = match request {
            Ok(Request::Read { length, .. } | Request::Write { length, .. }) => length,
            _ => 0,
        };
        self.limiter.take(1, data);
        let (work, offset, length) = match request {
            Err(refusal) => {
                self.metrics.invalid_reqs_count.count();
                return live.answer(&ticket, refusal.status(), 0);
            }
            Ok(Request::GetId) => return self.give_id(live, &ticket),
            Ok(Request::Read { offset, length }) => (Work::Read, offset, length),
            Ok(Request::Write { offset, length }) => (Work::Write, offset, length),
            Ok(Request::Flush) => (Work::Flush, 0, 0),
            Ok(Request::Discard { offset, length }) => (Work::Discard, offset, length),
            Ok(Request::WriteZeroes { offset, length, unmap }) => {
                (Work::Zero { unmap, method: self.file.zero_method(unmap) }, offset, length)
            }
        };
        if length == 0 && work != Work::Flush {
            self.metrics.succeeded(work, 0, ticket.time());
            return live.answer(&ticket, VIRTIO_BLK_S_OK as u8, 0);
        }
        let mut operation = self.spare.pop().unwrap_or_default();
        let (memory, chain) = (&live.memory, &live.chain);
        match work {
            Work::Read => operation.buffers.set_guest(memory, &chain.writable, 0..length),
            Work::Write => {
                let range = HEADER_SIZE..HEADER_SIZE.saturating_add(length);
                operation.buffers.set_guest(memory, &chain.readable, range);
            }
            _ => {}
        }
        operation.begin(ticket, work, offset, length);
        if live.write_through && matches!(work, Work::Write | Work::Zero { .. }) {
            operation.make_durable();
        }
        match self.run(operation) {
            Some(finished) => {
                turn.bytes = turn.bytes.saturating_sub(finished.0.moved());
                self.finish(live, finished)
            }
            None => Ok(()),
        }
    }

    /// Gives `operation` to the engine; back if it has ended already.
    fn run(&mut self, mut operation: Operation) -> Option<Finished> {
        match &mut self.uring {
            Some(uring) => uring.start(operation, &self.file),
            None => {
                let result = sync::run(&self.file, &mut operation);
                Some((operation, result))
            }
        }
    }

    /// Answers a request for the drive's name: 20 bytes, filled up with zeroes.
    fn give_id(&self, live: &mut Live, ticket: &Ticket) -> Result<(), Fault> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (place, byte) in id.iter_mut().zip(self.file.id.bytes()) {
            *place = byte;
        }
        let length = usize::try_from(ticket.writable).map_or(id.len(), |room| room.min(id.len()));
        live.chain.write(&live.memory, 0, id.get(..length).unwrap_or_default())?;
        live.answer(ticket, VIRTIO_BLK_S_OK as u8, length as u64)
    }

    /// Answers the request of an operation that has ended.
    fn finish(&mut self, live: &mut Live, (mut operation, result): Finished) -> Result<(), Fault> {
        let moved = operation.moved();
        if matches!(operation.work(), Work::Zero { .. }) {
            self.limiter.take(0, moved);
        }
        let ticket = operation.ticket;
        let status = match result {
            Ok(()) => {
                self.metrics.succeeded(operation.work(), moved, ticket.time());
                VIRTIO_BLK_S_OK
            }
            Err(error) => {
                self.note_failure(error);
                VIRTIO_BLK_S_IOERR
            }
        };
        let written = if operation.work() == Work::Read { moved } else { 0 };
        operation.buffers.clear();
        self.spare.push(operation);
        live.answer(&ticket, status as u8, written)
    }

    fn note_failure(&self, error: Errno) {
        self.metrics.execute_fails.count();
        if let Some(line) = self.failures.count(&self.metrics.rate_limited_log_count) {
            let (id, path) = (&self.file.id, self.file.path.display());
            warn!(dropped = line.dropped, "drive {id}: {path}: {error}");
        }
    }

    /// Answers what the ring has completed.
    fn complete(&mut self, live: &mut Live) -> Result<(), Fault> {
        while let Some(finished) = self.uring.as_mut().and_then(Uring::finished) {
            self.finish(live, finished)?;
        }
        Ok(())
    }

    /// Hands the ring's new entries to the kernel, and answers what it completes at once.
    fn submit(&mut self, live: &mut Live, turn: &mut Turn) -> Result<(), Fault> {
        while self.uring.as_mut().is_some_and(Uring::has_unsubmitted) {
            match self.uring.as_mut().map_or(Ok(()), Uring::submit) {
                Ok(()) => {
                    // Most of what is in the page cache completes in the call: that needs no turn of its own.
                    self.uring.iter().for_each(Uring::acknowledge);
                    self.complete(live)?;
                }
                Err(Errno::AGAIN | Errno::BUSY) => {
                    turn.next = Some(SUBMIT_AGAIN);
                    return Ok(());
                }
                Err(error) => return Err(Fault::Uring(error)),
            }
        }
        Ok(())
    }

    /// Tells the driver of the chains that were given back, unless more are likely to follow soon.
    fn tell(&self, live: &mut Live, turn: &mut Turn) -> Result<(), Fault> {
        let answered = std::mem::take(&mut live.answered);
        if answered == 0 && !live.moderation.holds() {
            return Ok(());
        }
        let now = Instant::now();
        if answered > 0 {
            live.moderation.answered(answered, now);
        }
        // What else starts the next turn may take its time.
        let next = turn.next.is_some() || self.uring.as_ref().is_some_and(|uring| uring.in_flight() > 0);
        if !next && let Some(wait) = live.moderation.wait(now) {
            turn.next = Some(wait);
            return Ok(());
        }
        live.moderation.told();
        Ok(used::notify(&mut live.queue, &live.memory, &live.interrupt)?)
    }

    fn set_timer(&self, wait: Option<Duration>) {
        if let Err(error) = self.timer.set(wait)
            && let Some(line) = self.timer_failures.count(&self.metrics.rate_limited_log_count)
        {
            warn!(dropped = line.dropped, "drive {}: timer: {error}", self.file.id);
        }
    }
}

impl Live {
    /// Writes the status byte and gives the chain back, with `written` bytes of data before the status.
    fn answer(&mut self, ticket: &Ticket, status: u8, written: u64) -> Result<(), Fault> {
        self.memory
            .write_obj(status, ticket.status)
            .map_err(|_| ChainError::Memory { address: ticket.status.0, length: 1 })?;
        // The length counts what was written without a gap from the start: the status only if the data
        // before it is complete.
        let written = if written >= ticket.writable { ticket.writable.saturating_add(1) } else { written };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        used::add(&mut self.queue, &self.memory, ticket.head, written)?;
        self.answered = self.answered.saturating_add(1);
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        config::features(&self.limits)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = config::space(&self.limits);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in data.iter_mut().zip(space.iter().skip(start)) {
            *place = *byte;
        }
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        if self.deaf {
            return Err(ActivateError::Host(
                "block",
                io::Error::other("the event loop refused a descriptor"),
            ));
        }
        let queue = driver.queues.into_iter().next().filter(QueueT::ready);
        self.driver = Some(Live {
            memory: driver.memory,
            queue: queue.ok_or(ActivateError::QueueNotReady(0))?,
            interrupt: driver.interrupt,
            chain: Chain::new(driver.features).within(driver.shared.clone()),
            write_through: self.limits.flush && driver.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            answered: 0,
            moderation: Moderation::new(Instant::now()),
        });
        Ok(())
    }

    fn activation_failed(&mut self) {
        self.metrics.activate_fails.count();
    }

    fn reset(&mut self) {
        if let Some(uring) = &mut self.uring {
            let (tally, dropped) = (&self.slow_resets, &self.metrics.rate_limited_log_count);
            let (id, path) = (&self.file.id, self.file.path.display());
            uring.drain(|count| {
                if let Some(line) = tally.count(dropped) {
                    warn!(
                        dropped = line.dropped,
                        "drive {id}: {path}: {count} requests are under way; waiting for the host's storage"
                    );
                }
            });
        }
        self.set_timer(None);
        self.driver = None;
    }

    fn notify(&mut self, _queue: u16) {
        self.metrics.queue_event_count.count();
        self.turn();
    }

    fn register(&mut self, ops: &mut EventOps) {
        let timer = Events::with_data(self.timer.descriptor(), TIMER_EVENT, EventSet::IN);
        let completion =
            self.uring.as_ref().map(|uring| Events::with_data(uring.event(), COMPLETION_EVENT, EventSet::IN));
        for events in [Some(timer), completion].into_iter().flatten() {
            if let Err(error) = ops.add(events) {
                warn!("drive {}: event loop: {error}", self.file.id);
                self.deaf = true;
            }
        }
    }

    fn event(&mut self, event: Events, _ops: &mut EventOps) {
        self.wake(event.data());
    }
}

impl Block {
    /// Acknowledges one of the device's own events, and takes a turn.
    fn wake(&mut self, event: u32) {
        if event == TIMER_EVENT {
            self.set_timer(None);
        } else if let Some(uring) = &self.uring {
            uring.acknowledge();
        }
        self.turn();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}
