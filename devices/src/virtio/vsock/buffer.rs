//! Our buffer of one connection: what the guest has sent and the host's socket did not take yet.
//!
//! Every header tells the guest its size (`buf_alloc`) and how many bytes have left it (`fwd_cnt`). Memory
//! is spent only once the host's socket takes less than the guest sends, and then for the whole window at once.

use std::collections::VecDeque;
use std::io;

use super::connection::{Stream, is_transient};
use super::payload::GuestBytes;

/// See the module's documentation.
pub struct Buffer {
    window: u32,
    bytes: VecDeque<u8>,
    fwd_cnt: u32,
    /// `fwd_cnt` as the guest knows it.
    told: u32,
}

impl Buffer {
    /// An empty buffer of `window` bytes.
    pub fn new(window: u32) -> Self {
        Self { window, bytes: VecDeque::new(), fwd_cnt: 0, told: 0 }
    }

    /// Its size, bytes.
    pub fn window(&self) -> u32 {
        self.window
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the guest may send `length` bytes more.
    pub fn has_room(&self, length: u64) -> bool {
        let room = u64::from(self.window).saturating_sub(self.bytes.len() as u64);
        length <= room
    }

    /// Bytes that have left it; from now on the guest knows.
    pub fn tell(&mut self) -> u32 {
        self.told = self.fwd_cnt;
        self.fwd_cnt
    }

    /// The guest may have used half of what it knows of.
    pub fn should_tell(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.told) >= self.window / 2
    }

    /// Takes `payload`, for which there is room: to `stream` what it takes at once, the rest is kept.
    pub fn pass(&mut self, payload: &GuestBytes<'_>, stream: &mut impl Stream) -> io::Result<()> {
        let sent = if self.is_empty() { transient_as_zero(stream.send(payload))? } else { 0 };
        self.forwarded(sent as u64);
        self.keep(&payload.clone().after(sent as u64));
        Ok(())
    }

    /// Gives `stream` what was kept, as much as it takes.
    pub fn drain(&mut self, stream: &mut impl Stream) -> io::Result<()> {
        while !self.is_empty() {
            let count = transient_as_zero(stream.send_slice(self.bytes.as_slices().0))?.min(self.len());
            if count == 0 {
                break;
            }
            self.bytes.drain(..count);
            self.forwarded(count as u64);
        }
        Ok(())
    }

    /// Lets `length` bytes go that nobody wants.
    pub fn forwarded(&mut self, length: u64) {
        // Modulo 2^32, as the protocol counts.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(length as u32);
    }

    /// Lets go what was kept, and its memory.
    pub fn discard(&mut self) {
        self.forwarded(self.bytes.len() as u64);
        self.bytes = VecDeque::new();
    }

    fn keep(&mut self, rest: &GuestBytes<'_>) {
        let Ok(count @ 1..) = usize::try_from(rest.len()) else { return };
        let before = self.bytes.len();
        if before == 0 {
            self.bytes.reserve_exact(self.window as usize);
        }
        self.bytes.resize(before.saturating_add(count), 0);
        let (first, second) = self.bytes.as_mut_slices();
        let in_second = before.saturating_sub(first.len());
        let mut rest = rest.clone();
        for part in [first.get_mut(before..), second.get_mut(in_second..)].into_iter().flatten() {
            let count = rest.read(part);
            rest = rest.after(count as u64);
        }
    }
}

/// A socket that takes nothing now is no error.
fn transient_as_zero(sent: io::Result<usize>) -> io::Result<usize> {
    match sent {
        Err(error) if is_transient(&error) => Ok(0),
        sent => sent,
    }
}
