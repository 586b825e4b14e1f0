//! All connections of a guest: who gets a packet, and whose turn it is to send one.
//!
//! The muxer knows neither queues nor interrupts. The device gives it each packet of the guest
//! ([`Muxer::packet`]) and, while something [`Muxer::is_pending`], buffers of the guest to fill
//! ([`Muxer::fill`]); the host's sockets reach it through its [`Poller`] ([`Muxer::poll`]).
//!
//! What bounds it, whatever guest and host do:
//! - connections and handshakes together: [`Limits::connections`]. Beyond, the guest's requests get RST, and the
//!   host's programs wait in the listening socket's backlog, as they do while there is no file
//!   descriptor left, or no driver.
//! - bytes from the guest: one window per connection. The first connections get large ones; as the
//!   reserve shrinks, later ones get smaller ones (`WINDOW_RESERVE`).
//! - packets to the guest: a connection makes its packet when there is a buffer for it, and is in `pending`
//!   at most once, so that all take turns. Only RSTs that belong to no connection are queued: at most
//!   [`Limits::refusals`], and further ones are not sent. To take no more of the guest's packets instead would be a
//!   standstill: Linux receives nothing while its own answers wait for us to take them.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use tracing::{Level, debug, enabled, warn};

use super::connection::{Connection, Readiness};
use super::handshake::{Handshake, Progress};
use super::host::Host;
use super::metrics::VsockMetrics;
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, Op, PORT_ANY, Ports, TYPE_STREAM};
use super::payload::GuestBytes;
use super::poller::{Poller, Source};
use crate::tally::Tally;

/// First port of the host's side of connections that the host asks for.
const FIRST_PORT: u32 = 1 << 30;
/// Bytes that the windows of connections share out: each gets a sixteenth of what is left, within the limits below.
/// All windows together are at most this and `WINDOW_MIN` per connection.
const WINDOW_RESERVE: u64 = 16 << 20;
const WINDOW_MIN: u64 = 8 << 10;
const WINDOW_MAX: u64 = 256 << 10;
/// Connections accepted in a row before others have their turn.
const MAX_ACCEPTS: usize = 64;

/// Bounds of a muxer.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections and handshakes.
    pub connections: usize,
    /// Handshakes: programs that have not named a port yet.
    pub handshakes: usize,
    /// RSTs that belong to no connection.
    pub refusals: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 4096, handshakes: 256, refusals: 4096 }
    }
}

/// See the module's documentation.
pub struct Muxer<H: Host> {
    guest_cid: u64,
    host: H,
    limits: Limits,
    poller: Poller,
    connections: HashMap<Ports, Entry<H::Stream>>,
    handshakes: HashMap<u32, Handshake<H::Stream>>,
    /// Connections that have something for the guest, in order of their turns.
    pending: VecDeque<Ports>,
    /// RSTs that belong to no connection.
    refusals: VecDeque<Header>,
    /// Sum of all windows, bytes.
    reserved: u64,
    next_port: u32,
    next_handshake: u32,
    /// There is a driver.
    open: bool,
    /// The listening socket is watched.
    listening: bool,
    /// The last `accept` failed: the next one waits for a tick.
    backing_off: bool,
    metrics: Arc<VsockMetrics>,
    /// Lines about connections that come and go.
    remarks: Tally,
    /// Lines about connections of the host that have to wait because the host failed.
    waits: Tally,
    /// Lines about connections of the guest that failed on the host's side, and not because no program is there.
    failures: Tally,
    ready: Vec<(Source, Readiness)>,
}

struct Entry<S> {
    connection: Connection<S>,
    /// It is in `pending`.
    queued: bool,
    /// Its socket is watched for room.
    watches_room: bool,
}

impl<H: Host> Muxer<H> {
    /// The connections of the guest with that context identifier. Closed until [`Self::open`].
    pub fn new(guest_cid: u64, host: H, limits: Limits) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            host,
            limits,
            poller: Poller::new()?,
            connections: HashMap::new(),
            handshakes: HashMap::new(),
            pending: VecDeque::new(),
            refusals: VecDeque::new(),
            reserved: 0,
            next_port: FIRST_PORT,
            next_handshake: 0,
            open: false,
            listening: false,
            backing_off: false,
            metrics: Arc::default(),
            remarks: Tally::default(),
            waits: Tally::default(),
            failures: Tally::default(),
            ready: Vec::new(),
        })
    }

    /// What is counted of the device.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }

    /// Logs what guest and host can make happen at will.
    fn remark(&self, what: impl Display) {
        if enabled!(Level::DEBUG)
            && let Some(line) = self.remarks.count(&self.metrics.rate_limited_log_count)
        {
            debug!(dropped = line.dropped, "vsock: {what}");
        }
    }

    /// The descriptor that is readable while [`Self::poll`] has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.poller.descriptor()
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        self.poller.wake();
    }

    /// A driver is there: connections are possible.
    pub fn open(&mut self) {
        self.open = true;
        self.update_listener();
    }

    /// The driver is gone, and with it all connections.
    pub fn close(&mut self) {
        self.open = false;
        self.backing_off = false;
        self.metrics.conns_removed.add(self.connections.len() as u64);
        self.connections = HashMap::new();
        self.handshakes = HashMap::new();
        self.pending = VecDeque::new();
        self.refusals = VecDeque::new();
        self.reserved = 0;
        self.poller.tick(false);
        self.update_listener();
    }

    // ---- Packets ----

    /// Takes a packet of the guest; `payload` is what follows the header in its chain. One with an impossible length,
    /// operation or type costs the guest the connection; one from or to an address that is not
    /// on this link is dropped.
    pub fn packet(&mut self, header: &Header, payload: GuestBytes<'_>) {
        self.metrics.tx_packets_count.count();
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let op = Op::from_field(header.op);
        if header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let has_payload = header.len <= MAX_PAYLOAD && u64::from(header.len) <= payload.len();
        let payload = payload.first(u64::from(header.len));
        let known = self.with(header.ports(), |connection| {
            match op {
                _ if connection.is_abandoned() => return false,
                Some(op) if has_payload => connection.packet(header, op, &payload),
                _ => connection.reset(),
            }
            true
        });
        match op {
            Some(Op::ReadWrite) if known == Some(true) && has_payload => {
                self.metrics.tx_bytes_count.add(header.len.into());
            }
            _ if known == Some(true) => {}
            Some(Op::Request) if has_payload => self.guest_connects(header),
            _ => self.refuse(header),
        }
    }

    /// Whether there is a packet for the guest, unless a connection finds that it has none after all.
    pub fn is_pending(&self) -> bool {
        !self.refusals.is_empty() || !self.pending.is_empty()
    }

    /// Makes the next packet for the guest: its payload in `into`, which is not empty, its header as the result.
    pub fn fill(&mut self, into: &GuestBytes<'_>) -> Option<Header> {
        let header = self.next_packet(into)?;
        self.metrics.rx_packets_count.count();
        self.metrics.rx_bytes_count.add(header.len.into());
        Some(header)
    }

    fn next_packet(&mut self, into: &GuestBytes<'_>) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(ports) = self.pending.pop_front() {
            if let Some(entry) = self.connections.get_mut(&ports) {
                entry.queued = false;
            }
            if let Some(header) = self.with(ports, |connection| connection.fill(into)).flatten() {
                return Some(Header { dst_cid: self.guest_cid, ..header });
            }
        }
        None
    }

    /// Answers a packet that belongs to no connection by RST, unless it is one itself or too many RSTs wait.
    fn refuse(&mut self, header: &Header) {
        if Op::from_field(header.op) == Some(Op::Reset) {
            return;
        }
        if self.refusals.len() >= self.limits.refusals {
            return self.metrics.unsent_refusals_count.count();
        }
        self.metrics.refused_packets_count.count();
        let refusal = Header::to_guest(self.guest_cid, header.ports(), Op::Reset);
        self.refusals.push_back(Header { kind: header.kind, ..refusal });
    }

    // ---- Connections ----

    /// Does something with a connection, and then what follows from its new state.
    fn with<R>(&mut self, ports: Ports, action: impl FnOnce(&mut Connection<H::Stream>) -> R) -> Option<R> {
        let entry = self.connections.get_mut(&ports)?;
        let connection = &mut entry.connection;
        let result = action(connection);
        if connection.wants_room()
            && !entry.watches_room
            && let Some(stream) = connection.stream()
        {
            match self.poller.modify(stream, Source::Connection(ports), true) {
                Ok(()) => entry.watches_room = true,
                Err(_) => connection.reset(),
            }
        }
        if connection.is_over() {
            self.remove(ports);
            return Some(result);
        }
        if connection.awaits_guest() {
            self.poller.tick(true);
        }
        if !entry.queued && connection.wants_to_send() {
            entry.queued = true;
            self.pending.push_back(ports);
        }
        Some(result)
    }

    fn insert(&mut self, ports: Ports, connection: Connection<H::Stream>, watches_room: bool) {
        self.metrics.conns_added.count();
        self.reserved = self.reserved.saturating_add(u64::from(connection.window()));
        self.connections.insert(ports, Entry { connection, queued: false, watches_room });
        self.with(ports, |_| ());
    }

    fn remove(&mut self, ports: Ports) {
        let Some(entry) = self.connections.remove(&ports) else { return };
        self.metrics.conns_removed.count();
        self.remark(format_args!(
            "connection of port {} with guest port {} has ended",
            ports.host, ports.guest
        ));
        self.reserved = self.reserved.saturating_sub(u64::from(entry.connection.window()));
        if entry.queued {
            self.pending.retain(|other| *other != ports);
        }
        self.update_listener();
    }

    fn is_full(&self) -> bool {
        self.connections.len().saturating_add(self.handshakes.len()) >= self.limits.connections
    }

    /// The window of the next connection, bytes.
    fn window(&self) -> u32 {
        let share = WINDOW_RESERVE.saturating_sub(self.reserved) / 16;
        share.clamp(WINDOW_MIN, WINDOW_MAX) as u32
    }

    fn guest_connects(&mut self, header: &Header) {
        let ports = header.ports();
        let impossible = ports.host == PORT_ANY || ports.guest == PORT_ANY;
        if impossible || self.is_full() || self.connections.contains_key(&ports) {
            return self.refuse(header);
        }
        let source = Source::Connection(ports);
        let connected = self.host.connect(ports.host).and_then(|stream| {
            self.poller.add(&stream, source)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => {
                self.remark(format_args!("guest port {} has connected to port {}", ports.guest, ports.host));
                let connection = Connection::from_guest(stream, self.window(), header);
                self.insert(ports, connection, false);
                self.update_listener();
            }
            Err(error) => {
                self.remark(format_args!("guest cannot connect to port {}: {error}", ports.host));
                self.note_failure(&error);
                self.refuse(header);
            }
        }
    }

    /// Notes a connection of the guest that the host refused. That no program listens, or that its backlog is full, is
    /// no failure.
    fn note_failure(&self, error: &io::Error) {
        self.metrics.connect_fails.count();
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock)
        {
            return;
        }
        if let Some(line) = self.failures.count(&self.metrics.rate_limited_log_count) {
            warn!(dropped = line.dropped, "vsock: a connection of the guest is refused: {error}");
        }
    }

    /// A program has named the port that it wants.
    fn host_connects(&mut self, stream: H::Stream, guest: u32) {
        let Some(host) = self.free_port(guest) else { return };
        let ports = Ports { host, guest };
        // What the program has sent after its line is told again, now as the connection's.
        if let Err(error) = self.poller.modify(&stream, Source::Connection(ports), false) {
            self.remark(format_args!("no connection to guest port {guest}: {error}"));
            return;
        }
        self.remark(format_args!("port {host} asks for guest port {guest}"));
        self.insert(ports, Connection::from_host(stream, self.window(), ports), false);
    }

    /// A port for the host's side of a connection to `guest`.
    fn free_port(&mut self, guest: u32) -> Option<u32> {
        for _ in 0..=self.connections.len() {
            let host = self.next_port;
            self.next_port = FIRST_PORT | (host.wrapping_add(1) & (FIRST_PORT - 1));
            if !self.connections.contains_key(&Ports { host, guest }) {
                return Some(host);
            }
        }
        None
    }

    // ---- The host's sockets ----

    /// Takes what has become ready.
    pub fn poll(&mut self) -> io::Result<()> {
        let mut ready = std::mem::take(&mut self.ready);
        let result = self.poller.take(&mut ready);
        for (source, readiness) in ready.drain(..) {
            match source {
                Source::Listener => self.accept(readiness.hung_up),
                Source::Timer => self.tick(),
                Source::Wake => {}
                Source::Handshake(number) => self.advance(number),
                Source::Connection(ports) => self.host_ready(ports, readiness),
            }
        }
        self.ready = ready;
        result
    }

    fn host_ready(&mut self, ports: Ports, readiness: Readiness) {
        self.with(ports, |connection| connection.host_ready(readiness));
        let Some(entry) = self.connections.get_mut(&ports) else { return };
        // The program takes data, but there is none left: no more wake-ups for that.
        if readiness.room
            && entry.watches_room
            && !entry.connection.wants_room()
            && let Some(stream) = entry.connection.stream()
            && self.poller.modify(stream, Source::Connection(ports), false).is_ok()
        {
            entry.watches_room = false;
        }
    }

    fn advance(&mut self, number: u32) {
        let Some(handshake) = self.handshakes.get_mut(&number) else { return };
        let progress = handshake.advance();
        if progress == Progress::Incomplete {
            return;
        }
        let handshake = self.handshakes.remove(&number);
        match (progress, handshake) {
            (Progress::Port(guest), Some(handshake)) => self.host_connects(handshake.stream, guest),
            _ => self.remark("a program did not say CONNECT and a port"),
        }
        self.update_listener();
    }

    /// Accepts programs that wait; `shut_down`: the listening socket was.
    fn accept(&mut self, shut_down: bool) {
        for _ in 0..MAX_ACCEPTS {
            if !self.wants_to_listen() {
                break;
            }
            match self.host.accept().and_then(|stream| self.begin_handshake(stream)) {
                Ok(()) => {}
                // It would be ready again at once, for ever.
                Err(error) if error.kind() == ErrorKind::WouldBlock && shut_down => {
                    self.back_off("the listening socket was shut down");
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => self.back_off(error),
            }
        }
        self.update_listener();
    }

    /// Takes a connection of the monitor's own, as if it came from a program: `CONNECT` and a port come first. It is
    /// closed if the guest does not accept it.
    ///
    /// # Errors
    /// If there is no driver, or no room for another connection.
    pub fn adopt(&mut self, stream: H::Stream) -> io::Result<()> {
        if !self.open {
            return Err(io::Error::new(ErrorKind::NotConnected, "the guest has no driver for vsock"));
        }
        if self.is_full() || self.handshakes.len() >= self.limits.handshakes {
            return Err(io::Error::other("the guest has too many vsock connections"));
        }
        self.begin_handshake(stream)?;
        self.update_listener();
        Ok(())
    }

    /// Accepts nobody before the next tick.
    fn back_off(&mut self, why: impl Display) {
        self.metrics.accept_fails.count();
        if let Some(line) = self.waits.count(&self.metrics.rate_limited_log_count) {
            warn!(dropped = line.dropped, "vsock: connections of the host have to wait: {why}");
        }
        self.backing_off = true;
        self.poller.tick(true);
    }

    fn begin_handshake(&mut self, stream: H::Stream) -> io::Result<()> {
        let mut number = self.next_handshake;
        while self.handshakes.contains_key(&number) {
            number = number.wrapping_add(1) & (FIRST_PORT - 1);
        }
        self.next_handshake = number.wrapping_add(1) & (FIRST_PORT - 1);
        self.poller.add(&stream, Source::Handshake(number))?;
        self.handshakes.insert(number, Handshake::new(stream));
        self.poller.tick(true);
        Ok(())
    }

    fn tick(&mut self) {
        self.backing_off = false;
        self.handshakes.retain(|_, handshake| !handshake.tick());
        let waiting: Vec<Ports> = self
            .connections
            .iter()
            .filter(|(_, entry)| entry.connection.awaits_guest())
            .map(|(ports, _)| *ports)
            .collect();
        if waiting.is_empty() && self.handshakes.is_empty() {
            self.poller.tick(false);
        }
        for ports in waiting {
            self.with(ports, Connection::tick);
        }
        self.update_listener();
    }

    fn wants_to_listen(&self) -> bool {
        self.open && !self.backing_off && !self.is_full() && self.handshakes.len() < self.limits.handshakes
    }

    /// Watches the listening socket if another connection can be accepted.
    fn update_listener(&mut self) {
        let listen = self.wants_to_listen();
        if listen != self.listening
            && let Some(listener) = self.host.listener()
            && self.poller.watch_listener(listener, listen).is_ok()
        {
            self.listening = listen;
        }
    }
}

#[cfg(any(test, feature = "test-support"))]
impl<H: Host> Muxer<H> {
    /// Connections, handshakes, refusals, turns: what is bounded.
    pub fn counts(&self) -> (usize, usize, usize, usize) {
        (self.connections.len(), self.handshakes.len(), self.refusals.len(), self.pending.len())
    }

    /// Sum of all windows, bytes.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }
}

#[cfg(test)]
impl<H: Host> Muxer<H> {
    /// The ports of all connections.
    pub fn all_ports(&self) -> Vec<Ports> {
        self.connections.keys().copied().collect()
    }

    /// The listening socket, if there is one.
    pub fn host_listener(&self) -> Option<BorrowedFd<'_>> {
        self.host.listener()
    }

    /// As if half a second had passed.
    pub fn force_tick(&mut self) {
        self.tick();
    }
}
