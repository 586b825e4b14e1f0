//! The guest's output between the vCPU that makes it and the event loop that
//! writes it out.
//!
//! A vCPU pushes single bytes, the event loop takes thousands. So that a storm of
//! bytes costs a vCPU no system call each, the queue knows whether the event loop
//! already *attends* to it, that is, will look at it again unasked; only a byte
//! that finds nobody attending wakes the loop. The loop attends until it has
//! found the queue empty once more ([`OutputQueue::leave`]).
//!
//! Nothing is dropped while the domain runs, but what is beyond a limit on the
//! bandwidth if there is one: a vCPU that finds the queue full waits ([`OutputQueue::wait_for_room`]), which slows the guest down to its
//! reader. Each vCPU waits before, not while, it pushes, so the queue may outgrow
//! its capacity by one byte per vCPU.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use cofferdam_firmware::layout::MAX_VCPUS;
use vmm_sys_util::eventfd::EventFd;

use crate::platform::lock;
use crate::platform::serial::UartMetrics;
use crate::rate_limiter::RateLimiter;

/// Bytes that the queue holds before a vCPU has to wait.
pub const CAPACITY: usize = 64 << 10;

struct State {
    bytes: VecDeque<u8>,
    limiter: RateLimiter,
    attended: bool,
    closed: bool,
}

/// Bytes that the guest sent and the console has not written yet.
pub struct OutputQueue {
    state: Mutex<State>,
    /// Whether vCPUs have to wait. Read without the lock; changed under it.
    full: AtomicBool,
    room: Condvar,
    wake: Arc<EventFd>,
    metrics: Arc<UartMetrics>,
}

impl OutputQueue {
    /// An empty queue that writes to `wake` when the event loop should look at it. It takes as many bytes as `limiter`
    /// lets pass.
    pub fn new(wake: Arc<EventFd>, limiter: RateLimiter) -> Self {
        let bytes = VecDeque::with_capacity(CAPACITY + usize::from(MAX_VCPUS));
        Self {
            state: Mutex::new(State { bytes, limiter, attended: false, closed: false }),
            full: AtomicBool::new(false),
            room: Condvar::new(),
            wake,
            metrics: Arc::default(),
        }
    }

    /// What is counted of the serial port that this is the output of.
    pub fn metrics(&self) -> &Arc<UartMetrics> {
        &self.metrics
    }

    /// Waits until the queue is not full, or closed.
    pub fn wait_for_room(&self) {
        if !self.full.load(Ordering::Acquire) {
            return;
        }
        let mut state = lock(&self.state);
        while self.full.load(Ordering::Relaxed) {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Appends a byte, or drops it if the queue is closed or the byte is beyond the limit.
    pub fn push(&self, byte: u8) {
        let mut state = lock(&self.state);
        if state.closed {
            self.metrics.lost_bytes.count();
            return;
        }
        if !state.limiter.is_unlimited() {
            if state.limiter.wait(Instant::now()).is_some() {
                self.metrics.rate_limiter_dropped_bytes.count();
                return;
            }
            state.limiter.take(0, 1);
        }
        state.bytes.push_back(byte);
        if state.bytes.len() >= CAPACITY {
            self.full.store(true, Ordering::Release);
        }
        let attended = std::mem::replace(&mut state.attended, true);
        drop(state);
        if !attended {
            // Fails only when the counter is at its end, and then the loop is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Copies the oldest bytes into `buffer` and says how many.
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        let state = lock(&self.state);
        let count = buffer.len().min(state.bytes.len());
        for (to, from) in buffer.iter_mut().zip(&state.bytes) {
            *to = *from;
        }
        count
    }

    /// Removes the `count` oldest bytes, and lets waiting vCPUs go on when half of the queue is free.
    pub fn consume(&self, count: usize) {
        let mut state = lock(&self.state);
        let count = count.min(state.bytes.len());
        state.bytes.drain(..count);
        if state.bytes.len() <= CAPACITY / 2 && self.full.swap(false, Ordering::Release) {
            self.room.notify_all();
        }
    }

    /// Says that the event loop will not look again unasked; false if it has to, as the queue is not empty.
    pub fn leave(&self) -> bool {
        let mut state = lock(&self.state);
        if state.bytes.is_empty() {
            state.attended = false;
        }
        !state.attended
    }

    /// Takes no more bytes, and releases every waiting vCPU. What is there can still be written.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        self.full.store(false, Ordering::Release);
        self.room.notify_all();
    }

    /// Closes the queue and drops what is there.
    pub fn discard(&self) {
        self.close();
        let mut state = lock(&self.state);
        self.metrics.lost_bytes.add(state.bytes.len() as u64);
        state.bytes.clear();
    }

    /// How many bytes were dropped.
    pub fn dropped(&self) -> u64 {
        self.metrics.lost_bytes.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limiter::{RateLimits, TokenBucket};
    use std::sync::mpsc;
    use std::time::Duration;

    fn new() -> (Arc<EventFd>, Arc<OutputQueue>) {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        (wake.clone(), Arc::new(OutputQueue::new(wake, RateLimiter::default())))
    }

    fn peek(queue: &OutputQueue) -> Vec<u8> {
        let mut buffer = [0; 16];
        let count = queue.peek(&mut buffer);
        buffer[..count].to_vec()
    }

    #[test]
    fn the_loop_is_woken_only_while_it_does_not_attend() {
        let (wake, queue) = new();
        for byte in *b"hello" {
            queue.push(byte);
        }
        assert_eq!(wake.read().unwrap(), 1);
        assert!(!queue.leave(), "not empty");
        queue.consume(2);
        assert_eq!(peek(&queue), b"llo");
        queue.consume(9);
        queue.push(b'!');
        wake.read().unwrap_err();
        queue.consume(1);
        assert!(queue.leave());
        queue.push(b'?');
        assert_eq!(wake.read().unwrap(), 1);
    }

    #[test]
    fn what_is_beyond_the_limit_is_dropped_and_counted() {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let hour = Duration::from_secs(3600);
        let bandwidth = Some(TokenBucket { size: 3, one_time_burst: 2, refill_time: hour });
        let limits = RateLimits { bandwidth, operations: None };
        let queue = OutputQueue::new(wake, RateLimiter::new(limits, Instant::now()).unwrap());
        for byte in *b"hello, world" {
            queue.push(byte);
        }
        assert_eq!(peek(&queue), b"hello");
        assert_eq!(queue.metrics().rate_limiter_dropped_bytes.total(), 7);
        assert_eq!(queue.dropped(), 0);
        queue.discard();
        queue.push(b'!');
        assert_eq!(queue.dropped(), 6, "what a closed queue drops is not the limit's");
    }

    /// Fills `queue`, and lets a thread wait for room, which it reports.
    fn waiter(queue: &Arc<OutputQueue>) -> mpsc::Receiver<()> {
        (0..CAPACITY).for_each(|at| queue.push(at as u8));
        let (sender, receiver) = mpsc::channel();
        let queue = queue.clone();
        std::thread::spawn(move || {
            queue.wait_for_room();
            sender.send(()).unwrap();
        });
        receiver.recv_timeout(Duration::from_millis(20)).unwrap_err();
        receiver
    }

    #[test]
    fn a_full_queue_makes_vcpus_wait_until_half_is_free() {
        let (_, queue) = new();
        let waiter = waiter(&queue);
        queue.consume(CAPACITY / 2 - 1);
        waiter.recv_timeout(Duration::from_millis(20)).unwrap_err();
        queue.consume(1);
        waiter.recv().unwrap();
        assert_eq!(queue.dropped(), 0);
    }

    #[test]
    fn closing_releases_waiting_vcpus_and_keeps_what_is_there() {
        let (_, queue) = new();
        let waiter = waiter(&queue);
        queue.close();
        waiter.recv().unwrap();
        queue.push(1);
        assert_eq!(queue.dropped(), 1);
        assert_eq!(peek(&queue)[..3], [0, 1, 2]);
        queue.discard();
        assert_eq!(queue.dropped(), 1 + CAPACITY as u64);
        assert!(peek(&queue).is_empty());
        queue.wait_for_room();
    }
}
