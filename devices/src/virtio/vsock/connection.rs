//! One connection between a port of the guest and a socket of the host.
//!
//! # States
//!
//! ```text
//!  host connects          guest's REQUEST, host socket connected
//!       │                               │
//!   Requested ── guest's RESPONSE ──▶ Established ── both directions ended ─┬─▶ Closing
//!       │                               │                                   │      │
//!       │ guest's RST, ours, time-out   │ RST, broken rule, host's error    │      │ SHUTDOWN, time-out
//!       ▼                               ▼                                   ▼      ▼
//!     Over ◀────────────────── RST sent to the guest ─────────────────────── Reset
//! ```
//!
//! The host's socket is closed on the way to `Closing` and `Reset`; these states only
//! hold the ports until the guest knows. A direction ends by a `SHUTDOWN` of the guest or by
//! the host's (`shutdown(2)`, seen as end of file or as EPIPE), and each is passed on to the other side alone:
//! half-close works both ways. Once both have ended, the guest's `SHUTDOWN` with both flags
//! is answered by RST, or ours is sent and the guest answers by RST (virtio 1.2, 5.10.6.5).
//! What the guest sent before its `SHUTDOWN` is written to the host first, however long the host takes; a guest
//! that loses patience and sends RST meanwhile has gone (`abandoned`), its data has not.
//!
//! # Credit
//!
//! Each side tells the other in every header how large its buffer for the connection is (`buf_alloc`) and how
//! many bytes have left it (`fwd_cnt`); a sender may have at most `buf_alloc` bytes under way
//! (5.10.6.3). Our buffer, `window` bytes, exists only when the host's socket takes less than the guest
//! sends. A guest that sends beyond it is reset, so the bound holds whatever the guest does. In the other direction
//! nothing is buffered: bytes are received into guest memory when the guest has both a buffer
//! in its queue and credit, and stay in the host's socket until then, where the host's writer feels it.
//!
//! # Who calls
//!
//! The muxer calls `packet` for each of the guest's packets, `host_ready` for readiness of the socket, `tick`
//! for time, and, while `wants_to_send`, `fill` with a buffer of the guest's. It watches the socket for
//! room only while `wants_room`. No call blocks.

use std::io::{self, ErrorKind};

use super::buffer::Buffer;
use super::packet::{Header, MAX_PAYLOAD, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::payload::GuestBytes;

/// Ticks after which a guest that owes an answer is no longer waited for: ten seconds, as a program's line is. Where many
/// domains share few CPUs, a guest that is asked by a thousand programs at once may need more than a few.
pub const PATIENCE: u32 = 20;

/// The host's end of a connection: a non-blocking stream socket.
pub trait Stream {
    /// Receives into guest memory. `Ok(0)`: the host will send no more.
    fn receive(&mut self, into: &GuestBytes<'_>) -> io::Result<usize>;
    /// Sends from guest memory.
    fn send(&mut self, from: &GuestBytes<'_>) -> io::Result<usize>;
    /// Sends `from`.
    fn send_slice(&mut self, from: &[u8]) -> io::Result<usize>;
    /// Ends one direction.
    fn shut_down(&mut self, direction: Direction);
}

/// A direction of a host's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host's program to us.
    FromHost,
    /// From us to the host's program.
    ToHost,
}

/// What became of a host's socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Readiness {
    /// There may be data, or the end of it.
    pub data: bool,
    /// There may be room.
    pub room: bool,
    /// The host's program has closed its end completely.
    pub hung_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest was, or is to be, asked to accept.
    Requested,
    Established,
    /// The guest was, or is to be, told that all has ended; its RST is awaited.
    Closing,
    /// RST is to be sent.
    Reset,
    /// Nothing is left to do.
    Over,
}

/// A connection. See the module's documentation.
pub struct Connection<S> {
    ports: Ports,
    state: State,
    /// The host's socket; `None` from `Closing` on.
    stream: Option<S>,
    /// What the guest sent and the host's socket did not take yet.
    buffer: Buffer,
    /// Size of the guest's buffer, bytes.
    peer_buf_alloc: u32,
    /// Bytes that have left the guest's buffer.
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Directions that the guest has ended (`SHUTDOWN_*`, from its point of view).
    guest_ended: u32,
    /// Directions that the host has ended (`SHUTDOWN_*`, from its point of view).
    host_ended: u32,
    /// `host_ended` as the guest knows it.
    told_host_ended: u32,
    /// The guest's end of sending was passed on to the host.
    told_host: bool,
    /// The guest reset the connection while the host still had to take data.
    abandoned: bool,
    /// `REQUEST` (while `Requested`) or `RESPONSE` is to be sent.
    answer_due: bool,
    credit_update_due: bool,
    credit_request_due: bool,
    /// The guest was asked for credit since it last had any.
    credit_requested: bool,
    /// The socket may have data.
    has_data: bool,
    hung_up: bool,
    /// Ticks in a state in which the guest owes an answer.
    waited: u32,
}

impl<S: Stream> Connection<S> {
    /// A connection that the guest asked for with `request` and that `stream` will serve.
    pub fn from_guest(stream: S, window: u32, request: &Header) -> Self {
        let mut connection = Self::new(stream, window, request.ports(), State::Established);
        connection.take_credit(request);
        connection
    }

    /// A connection that the host asks for; the guest is yet to be asked.
    pub fn from_host(stream: S, window: u32, ports: Ports) -> Self {
        Self::new(stream, window, ports, State::Requested)
    }

    fn new(stream: S, window: u32, ports: Ports, state: State) -> Self {
        Self {
            ports,
            state,
            stream: Some(stream),
            buffer: Buffer::new(window),
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            guest_ended: 0,
            host_ended: 0,
            told_host_ended: 0,
            told_host: false,
            abandoned: false,
            answer_due: true,
            credit_update_due: false,
            credit_request_due: false,
            credit_requested: false,
            has_data: false,
            hung_up: false,
            waited: 0,
        }
    }

    /// The host's socket, while it is open.
    pub fn stream(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// Size of our buffer, bytes.
    pub fn window(&self) -> u32 {
        self.buffer.window()
    }

    /// The connection can be forgotten.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// The guest has forgotten the connection: to a further packet it is unknown.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned
    }

    /// The socket is to be watched for room.
    pub fn wants_room(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// `tick` matters.
    pub fn awaits_guest(&self) -> bool {
        matches!(self.state, State::Requested | State::Closing)
    }

    /// `fill` may have something for the guest.
    pub fn wants_to_send(&self) -> bool {
        match self.state {
            State::Reset => true,
            State::Over => false,
            State::Requested => self.answer_due,
            State::Established | State::Closing => {
                !self.abandoned
                    && (self.answer_due
                        || self.shutdown_due()
                        || self.credit_update_due
                        || self.credit_request_due
                        || self.can_receive())
            }
        }
    }

    /// Takes a packet of the guest. `payload` is as long as the header says, at most 64 KiB.
    pub fn packet(&mut self, header: &Header, op: Op, payload: &GuestBytes<'_>) {
        self.take_credit(header);
        match (self.state, op) {
            (State::Over, _) => {}
            (_, Op::Reset) => self.abandon(),
            (State::Reset, _) => {}
            (State::Requested, Op::Response) if !self.answer_due => self.accepted(),
            (State::Established | State::Closing, Op::Shutdown) => self.guest_ends(header.flags),
            (State::Established, Op::ReadWrite) => self.guest_data(payload),
            // The guest may not have seen our SHUTDOWN yet.
            (State::Closing, Op::ReadWrite) => {}
            (State::Established | State::Closing, Op::CreditRequest) => self.credit_update_due = true,
            (State::Requested | State::Established | State::Closing, Op::CreditUpdate) => {}
            (_, Op::Request | Op::Response) | (State::Requested, _) => self.reset(),
        }
        self.settle();
    }

    /// The host's socket has become ready.
    pub fn host_ready(&mut self, ready: Readiness) {
        self.has_data |= ready.data || ready.hung_up;
        self.hung_up |= ready.hung_up;
        if ready.room {
            self.drain();
        }
        if ready.hung_up && self.state == State::Requested {
            self.reset();
        }
        self.settle();
    }

    /// Time has passed.
    pub fn tick(&mut self) {
        if self.awaits_guest() {
            self.waited = self.waited.saturating_add(1);
            if self.waited >= PATIENCE {
                self.reset();
            }
        }
    }

    /// Ends the connection; the guest is told by RST.
    pub fn reset(&mut self) {
        let unknown_to_guest = self.state == State::Requested && self.answer_due;
        self.close_host(if unknown_to_guest || self.abandoned { State::Over } else { State::Reset });
    }

    /// Makes the next packet for the guest: its payload in `into`, its header, but for the context identifiers, as
    /// the result. `None`: there is nothing to send.
    pub fn fill(&mut self, into: &GuestBytes<'_>) -> Option<Header> {
        let mut header = self.next_packet(into)?;
        header.buf_alloc = self.buffer.window();
        header.fwd_cnt = self.buffer.tell();
        self.credit_update_due = false;
        self.settle();
        Some(header)
    }

    fn next_packet(&mut self, into: &GuestBytes<'_>) -> Option<Header> {
        if !self.wants_to_send() {
            return None;
        }
        if self.state == State::Reset {
            self.state = State::Over;
            return Some(self.header(Op::Reset));
        }
        if std::mem::take(&mut self.answer_due) {
            let op = if self.state == State::Requested { Op::Request } else { Op::Response };
            return Some(self.header(op));
        }
        // An end is told before more data: that of what the host sends is known once all of it was received only.
        if !self.shutdown_due()
            && self.can_receive()
            && let Some(header) = self.host_data(into)
        {
            return Some(header);
        }
        // The attempt to receive may have reset the connection, or found its end.
        if self.state == State::Reset {
            return self.next_packet(into);
        }
        if self.shutdown_due() {
            self.told_host_ended = self.host_ended;
            return Some(Header { flags: self.host_ended, ..self.header(Op::Shutdown) });
        }
        if std::mem::take(&mut self.credit_request_due) {
            return Some(self.header(Op::CreditRequest));
        }
        self.credit_update_due.then(|| self.header(Op::CreditUpdate))
    }

    fn header(&self, op: Op) -> Header {
        Header::to_guest(0, self.ports, op)
    }

    fn shutdown_due(&self) -> bool {
        self.host_ended != self.told_host_ended
    }

    // ---- From the guest to the host ----

    fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
            self.credit_request_due = false;
        }
    }

    /// The guest accepted the host's connection: tell the host.
    fn accepted(&mut self) {
        self.state = State::Established;
        self.has_data = true;
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes on the socket fit, or the host is gone.
        let sent = self.stream.as_mut().map(|stream| stream.send_slice(line.as_bytes()));
        if !matches!(sent, Some(Ok(count)) if count == line.len()) {
            self.reset();
        }
    }

    fn guest_data(&mut self, payload: &GuestBytes<'_>) {
        if self.guest_ended & SHUTDOWN_SEND != 0 || !self.buffer.has_room(payload.len()) {
            return self.reset();
        }
        let passed = match &mut self.stream {
            Some(stream) if self.host_ended & SHUTDOWN_RECEIVE == 0 && payload.len() > 0 => {
                self.buffer.pass(payload, stream)
            }
            _ => {
                self.buffer.forwarded(payload.len());
                Ok(())
            }
        };
        if passed.is_err() {
            self.buffer.forwarded(payload.len());
            self.host_stops_receiving();
        }
        self.credit_update_due |= self.buffer.should_tell();
    }

    /// The host's socket has room: write what was kept.
    fn drain(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        if self.buffer.drain(stream).is_err() {
            self.host_stops_receiving();
        }
        self.credit_update_due |= self.buffer.should_tell();
    }

    /// The host's program takes no more data; what there is for it is dropped.
    fn host_stops_receiving(&mut self) {
        self.host_ended |= SHUTDOWN_RECEIVE;
        self.buffer.discard();
        self.credit_update_due |= self.buffer.should_tell();
    }

    // ---- From the host to the guest ----

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// The host's data has ended, or nobody wants it.
    fn nothing_to_receive(&self) -> bool {
        self.host_ended & SHUTDOWN_SEND != 0 || self.guest_ended & SHUTDOWN_RECEIVE != 0
    }

    fn can_receive(&self) -> bool {
        self.state == State::Established && self.has_data && !self.nothing_to_receive() && self.credit() > 0
    }

    /// Receives from the host into `into`.
    fn host_data(&mut self, into: &GuestBytes<'_>) -> Option<Header> {
        let limit = self.credit().min(MAX_PAYLOAD);
        let received = self.stream.as_mut()?.receive(&into.clone().first(u64::from(limit)));
        match received {
            Ok(0) => {
                self.has_data = false;
                self.host_ended |= SHUTDOWN_SEND;
                self.settle();
                None
            }
            Ok(count) => {
                let len = u32::try_from(count).unwrap_or(limit).min(limit);
                self.sent = self.sent.wrapping_add(len);
                if self.credit() == 0 && !self.credit_requested {
                    self.credit_requested = true;
                    self.credit_request_due = true;
                }
                Some(Header { len, ..self.header(Op::ReadWrite) })
            }
            Err(error) => {
                match error.kind() {
                    ErrorKind::WouldBlock => self.has_data = false,
                    ErrorKind::Interrupted => {}
                    _ => self.reset(),
                }
                None
            }
        }
    }

    // ---- Ends ----

    fn guest_ends(&mut self, flags: u32) {
        let new = flags & SHUTDOWN_BOTH & !self.guest_ended;
        self.guest_ended |= new;
        if new & SHUTDOWN_RECEIVE != 0
            && let Some(stream) = &mut self.stream
        {
            stream.shut_down(Direction::FromHost);
        }
        if self.state == State::Closing && self.guest_ended == SHUTDOWN_BOTH {
            self.reset();
        }
    }

    /// The guest has reset the connection. Data that came with an orderly end still goes to the host.
    fn abandon(&mut self) {
        if self.state == State::Established && self.guest_ended == SHUTDOWN_BOTH && !self.buffer.is_empty() {
            self.abandoned = true;
        } else {
            self.close_host(State::Over);
        }
    }

    /// Passes ends on and leaves `Established` once both directions have ended.
    fn settle(&mut self) {
        if self.state != State::Established {
            return;
        }
        if self.hung_up && self.nothing_to_receive() {
            self.host_stops_receiving();
        }
        let guest_sent_all = self.guest_ended & SHUTDOWN_SEND != 0 && self.buffer.is_empty();
        if guest_sent_all
            && !std::mem::replace(&mut self.told_host, true)
            && let Some(stream) = &mut self.stream
        {
            stream.shut_down(Direction::ToHost);
        }
        let outward_ended = guest_sent_all || self.host_ended & SHUTDOWN_RECEIVE != 0;
        if !outward_ended || !self.nothing_to_receive() {
            return;
        }
        if self.guest_ended == SHUTDOWN_BOTH {
            self.reset();
        } else {
            self.close_host(State::Closing);
            self.host_ended = SHUTDOWN_BOTH;
        }
    }

    fn close_host(&mut self, state: State) {
        self.state = state;
        self.stream = None;
        self.buffer.discard();
        self.waited = 0;
    }
}

/// The call may succeed later.
pub fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
impl<S> Connection<S> {
    /// Bytes that wait for the host.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }
}
