//! The console: the first serial port, tied to descriptors of the host.
//!
//! ```text
//! vCPU threads                        event loop
//!
//! SerialPort ── byte by byte ──► OutputQueue ── pieces ──► Sink
//!     ▲                                                      stdout or a file
//!     └───────────────────── up to a FIFO full ────────── Source
//!                                                            stdin
//! ```
//!
//! Output is byte-exact and, unless a limit on it is configured, never dropped
//! while the domain runs: a reader that does not read fills the pipe, then the queue, and then makes the vCPU wait that
//! prints. The event loop itself never waits. It writes what there is when woken,
//! then looks again every [`LINGER`] as long as more comes, so a line of text
//! costs two or three system calls and not one per byte. While the sink is full,
//! epoll says when it no longer is.
//!
//! A sink that fails (closed pipe, full disk) is given up with one message; the
//! guest goes on and its output is dropped and counted.
//!
//! When the domain stops, [`Console::close`] releases waiting vCPUs; when they are
//! gone, [`Console::flush`] writes the rest, for as long as the caller allows.
//! The monitor ignores SIGPIPE.

pub(super) mod queue;
mod source;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use self::queue::{CAPACITY, OutputQueue};
use self::source::Source;
use super::lock;
use super::serial::SerialPort;
use crate::interrupt::InterruptLine;
use crate::rate_limiter::{RateLimiter, RateLimits, TokenBucket};
use crate::sink::{CHUNK, Sink};

/// How long the event loop lets output gather before it looks again.
const LINGER: Duration = Duration::from_millis(2);

const WAKE: u32 = 0;
const TIMER: u32 = 1;
const OUTPUT: u32 = 2;
const INPUT: u32 = 3;

/// The console of a domain.
pub struct Console {
    port: Arc<SerialPort>,
    queue: Option<Arc<OutputQueue>>,
    output: Mutex<Output>,
    input: Mutex<Source>,
    /// Written by vCPU threads when there is something to do.
    wake: Arc<EventFd>,
    timer: OwnedFd,
}

#[derive(Default)]
struct Output {
    /// None if there is nowhere to write to, or no longer.
    sink: Option<Sink>,
    /// epoll watches the sink, as it was full.
    watched: bool,
}

/// How an attempt to empty the queue ended.
enum Drained {
    /// There was nothing to write.
    Nothing,
    /// Something was written.
    Some,
    /// The sink takes no more for now.
    SinkFull,
}

impl Console {
    /// A console whose serial port raises `line`, that reads `input` and writes `output`, where there are such. What
    /// the guest sends beyond `limit`, whose tokens are bytes, is dropped and counted.
    pub fn new(
        line: Arc<dyn InterruptLine>,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        limit: Option<TokenBucket>,
    ) -> io::Result<Self> {
        let limits = RateLimits { bandwidth: limit, operations: None };
        let limiter = RateLimiter::new(limits, Instant::now()).map_err(io::Error::other)?;
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let sink = output.map(Sink::new);
        let queue = sink.is_some().then(|| Arc::new(OutputQueue::new(wake.clone(), limiter)));
        Ok(Self {
            port: Arc::new(SerialPort::new(line, queue.clone(), wake.clone())),
            queue,
            output: Mutex::new(Output { sink, watched: false }),
            input: Mutex::new(Source::new(input, INPUT)),
            wake,
            timer,
        })
    }

    /// The serial port, for the bus.
    pub fn port(&self) -> Arc<SerialPort> {
        self.port.clone()
    }

    /// The domain stops: no vCPU waits for the console any more, and what the guest still sends is dropped.
    pub fn close(&self) {
        if let Some(queue) = &self.queue {
            queue.close();
        }
    }

    /// Closes the console and writes out what is left of the guest's output, until `deadline` if the reader
    /// is slow. Returns how many bytes were lost, here and before.
    pub fn flush(&self, deadline: Instant) -> u64 {
        let Some(queue) = &self.queue else { return 0 };
        queue.close();
        if let Some(sink) = &lock(&self.output).sink {
            let mut bytes = [0; CHUNK];
            loop {
                let count = queue.peek(&mut bytes);
                let patience = deadline.saturating_duration_since(Instant::now());
                match bytes.get(..count).unwrap_or_default() {
                    [] => break,
                    bytes => match sink.write(bytes, patience) {
                        Ok(0) if Instant::now() >= deadline => break,
                        Ok(written) => queue.consume(written),
                        Err(_) => break,
                    },
                }
            }
        }
        queue.discard();
        let lost = queue.dropped();
        if lost > 0 {
            warn!(bytes = lost, "console output was lost");
        }
        lost
    }

    /// Writes out what is queued, and arranges for being called again if that is needed.
    fn serve_output(&self, ops: &mut EventOps) {
        let Some(queue) = &self.queue else { return };
        let mut output = lock(&self.output);
        output.unwatch(ops);
        match output.drain(queue) {
            Ok(Drained::Nothing) if queue.leave() => {}
            Ok(Drained::SinkFull) if output.watch(ops) => {}
            Ok(_) => self.look_again(),
            Err(error) => {
                self.port.metrics().error_count.count();
                warn!(%error, "cannot write console output; it is dropped from here on");
                output.sink = None;
                queue.discard();
            }
        }
    }

    fn look_again(&self) {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec { tv_sec: 0, tv_nsec: LINGER.subsec_nanos().into() },
        };
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_err() {
            let _ = self.wake.write(1);
        }
    }
}

impl Output {
    /// Writes at most as much as the queue holds at a time, so that other devices get their turn.
    fn drain(&self, queue: &OutputQueue) -> io::Result<Drained> {
        let Some(sink) = &self.sink else { return Ok(Drained::Nothing) };
        let mut bytes = [0; CHUNK];
        let mut result = Drained::Nothing;
        for _ in 0..CAPACITY / CHUNK {
            match queue.peek(&mut bytes) {
                0 => break,
                count => match sink.write(bytes.get(..count).unwrap_or_default(), Duration::ZERO)? {
                    0 => return Ok(Drained::SinkFull),
                    written => queue.consume(written),
                },
            }
            result = Drained::Some;
        }
        Ok(result)
    }

    fn events(&self) -> Option<Events> {
        self.sink.as_ref().map(|sink| Events::with_data(sink, OUTPUT, EventSet::OUT))
    }

    /// False if epoll does not watch such a sink.
    fn watch(&mut self, ops: &mut EventOps) -> bool {
        self.watched = self.events().is_some_and(|events| ops.add(events).is_ok());
        self.watched
    }

    /// Not watched but when full: a pipe without readers would report that without pause.
    fn unwatch(&mut self, ops: &mut EventOps) {
        if let (true, Some(events)) = (self.watched, self.events()) {
            // It is there: it was added.
            let _ = ops.remove(events);
            self.watched = false;
        }
    }
}

impl EventSubscriber for Console {
    fn process(&self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                let _ = self.wake.read();
                self.serve_output(ops);
                lock(&self.input).serve(&self.port, ops);
            }
            TIMER => {
                let _ = rustix::io::read(&self.timer, &mut [0_u8; 8]);
                self.serve_output(ops);
            }
            OUTPUT => self.serve_output(ops),
            _ => lock(&self.input).readable(&self.port, ops),
        }
    }

    fn init(&self, ops: &mut EventOps) {
        let added = ops
            .add(Events::with_data(&*self.wake, WAKE, EventSet::IN))
            .and_then(|()| ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN)));
        match added {
            Ok(()) => lock(&self.input).serve(&self.port, ops),
            Err(error) => {
                // Without events there is no output, and the guest must not wait for it.
                warn!(%error, "the console cannot be watched, and stays silent");
                self.close();
            }
        }
    }
}

#[cfg(test)]
mod tests;
