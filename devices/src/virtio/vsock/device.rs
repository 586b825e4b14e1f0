//! The virtio device: queues, configuration space, and the loop that moves packets between them and the muxer.
//!
//! A driver that puts what cannot hold a packet into a queue (a transmitted chain shorter than a header, a receive
//! buffer with no room for a payload, or a chain against virtio's own rules) costs it the device: needs reset, and
//! all connections end. A packet that is itself wrong costs it one connection; see [`Muxer::packet`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use thiserror::Error;
use tracing::{error, warn};
use virtio_queue::{Queue, QueueT};

use super::host::{HostStream, UnixHost};
use super::metrics::VsockMetrics;
use super::muxer::{Limits, Muxer};
use super::packet::{HEADER_LEN, HOST_CID, Header};
use super::payload::GuestBytes;
use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::{ActivateError, DEVICE_EVENTS, Driver, Memory, VirtioDevice, VirtioInterrupt, used};

/// Device type of a socket device (virtio 1.2, 5.10).
const DEVICE_TYPE: u32 = 19;
/// Sizes of the queues: receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// Queue by which the guest receives.
const RX: usize = 0;
/// Queue by which the guest transmits.
const TX: usize = 1;
/// Packets moved in one direction before the other has its turn and the driver hears of them.
const BATCH: usize = 256;
/// Batches before the rest of the event loop has its turn.
const MAX_BATCHES: usize = 4;

/// A vsock device that cannot be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// A context identifier that no guest can have.
    #[error("guest_cid {0} is not between 3 and 4294967294")]
    GuestCid(u32),
    /// The host refused what the device needs.
    #[error("vsock: {0}")]
    Host(#[from] io::Error),
}

/// What a driver did that no packet can be.
#[derive(Debug, Error)]
enum QueueError {
    #[error("vsock receive queue: {0}")]
    Receive(Problem),
    #[error("vsock transmit queue: {0}")]
    Transmit(Problem),
}

#[derive(Debug, Error)]
enum Problem {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("chain of {0} bytes is shorter than a header")]
    NoHeader(u64),
    #[error("chain of {0} bytes has no room for a header and a payload")]
    NoRoom(u64),
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    pub(super) muxer: Muxer<UnixHost>,
    metrics: Arc<VsockMetrics>,
    active: Option<Active>,
}

/// What a driver has given.
struct Active {
    memory: Memory,
    queues: Vec<Queue>,
    interrupt: Arc<VirtioInterrupt>,
    transmitted: Chain,
    /// The next buffer to fill.
    buffer: Chain,
    /// `buffer` holds one.
    has_buffer: bool,
}

impl Vsock {
    /// A device for the guest `guest_cid` (3 to 2^32 - 2). Programs of the host connect to `listener`, if there is one;
    /// the guest's connections go to the socket `prefix` followed by `_` and the port; without one they are reset.
    pub fn new(
        guest_cid: u32,
        listener: Option<UnixListener>,
        prefix: Option<PathBuf>,
    ) -> Result<Self, VsockError> {
        if u64::from(guest_cid) <= HOST_CID || guest_cid == u32::MAX {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let guest_cid = u64::from(guest_cid);
        let muxer = Muxer::new(guest_cid, UnixHost::new(listener, prefix)?, Limits::default())?;
        let metrics = muxer.metrics();
        Ok(Self { guest_cid, muxer, metrics, active: None })
    }

    /// Takes `socket`, connected and non-blocking, as a program's that wants to reach the guest. It says `CONNECT` and a
    /// port first.
    ///
    /// # Errors
    /// If there is no driver, or no room for another connection.
    pub fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.muxer.adopt(HostStream(socket))
    }

    /// What is counted of this device.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }

    /// Connections, handshakes, refusals and turns, and the sum of all windows in bytes: what the guest must not
    /// make grow without bound.
    #[cfg(feature = "test-support")]
    pub fn load(&self) -> ((usize, usize, usize, usize), u64) {
        (self.muxer.counts(), self.muxer.reserved())
    }

    /// Moves packets until there is nothing to move, or others must have their turn.
    fn run(&mut self) {
        let Some(active) = &mut self.active else { return };
        for _ in 0..MAX_BATCHES {
            match active.batch(&mut self.muxer) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    match error {
                        QueueError::Receive(_) => self.metrics.rx_queue_event_fails.count(),
                        QueueError::Transmit(_) => self.metrics.tx_queue_event_fails.count(),
                    }
                    active.interrupt.needs_reset(&error);
                    return self.stop();
                }
            }
        }
        self.muxer.wake();
    }

    /// Something on the host's side is ready.
    pub(super) fn host_ready(&mut self) -> io::Result<()> {
        self.muxer.poll()?;
        self.run();
        Ok(())
    }

    fn stop(&mut self) {
        self.active = None;
        self.muxer.close();
    }
}

impl Active {
    /// Moves up to `BATCH` packets in each direction and tells the driver. `Ok(false)`: there is nothing more to move.
    fn batch(&mut self, muxer: &mut Muxer<UnixHost>) -> Result<bool, QueueError> {
        let transmitted = self.transmit(muxer).map_err(QueueError::Transmit)?;
        let received = self.receive(muxer).map_err(QueueError::Receive)?;
        Ok(transmitted != 0 || received != 0)
    }

    /// Takes packets of the guest; how many.
    fn transmit(&mut self, muxer: &mut Muxer<UnixHost>) -> Result<usize, Problem> {
        let Some(queue) = self.queues.get_mut(TX) else { return Ok(0) };
        let chain = &mut self.transmitted;
        let mut count = 0_usize;
        while count < BATCH {
            if !chain.pop(queue, &self.memory)? {
                if used::rearm(queue, &self.memory)? {
                    continue;
                }
                break;
            }
            if chain.readable_len() < u64::from(HEADER_LEN) {
                return Err(Problem::NoHeader(chain.readable_len()));
            }
            let mut header = [0; HEADER_LEN as usize];
            chain.read(&self.memory, 0, &mut header)?;
            let payload = GuestBytes::new(&self.memory, &chain.readable).after(u64::from(HEADER_LEN));
            muxer.packet(&Header::parse(&header), payload);
            used::add(queue, &self.memory, chain.head, 0)?;
            count = count.saturating_add(1);
        }
        if count != 0 {
            used::notify(queue, &self.memory, &self.interrupt)?;
        }
        Ok(count)
    }

    /// Fills buffers of the guest; how many.
    fn receive(&mut self, muxer: &mut Muxer<UnixHost>) -> Result<usize, Problem> {
        let Some(queue) = self.queues.get_mut(RX) else { return Ok(0) };
        let chain = &mut self.buffer;
        let mut count = 0_usize;
        while count < BATCH && muxer.is_pending() {
            if !self.has_buffer {
                self.has_buffer = chain.pop(queue, &self.memory)?;
                if !self.has_buffer {
                    if used::rearm(queue, &self.memory)? {
                        continue;
                    }
                    break;
                }
                if chain.writable_len() <= u64::from(HEADER_LEN) {
                    return Err(Problem::NoRoom(chain.writable_len()));
                }
            }
            let payload = GuestBytes::new(&self.memory, &chain.writable).after(u64::from(HEADER_LEN));
            let Some(header) = muxer.fill(&payload) else { break };
            chain.write(&self.memory, 0, &header.to_bytes())?;
            used::add(queue, &self.memory, chain.head, HEADER_LEN.saturating_add(header.len))?;
            self.has_buffer = false;
            count = count.saturating_add(1);
        }
        if count != 0 {
            used::notify(queue, &self.memory, &self.interrupt)?;
        }
        Ok(count)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.guest_cid.to_le_bytes();
        let Some(rest) = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)) else { return };
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        // The event queue is for migration only; a driver may do without.
        for index in [RX, TX] {
            if !driver.queues.get(index).is_some_and(QueueT::ready) {
                return Err(ActivateError::QueueNotReady(index));
            }
        }
        self.active = Some(Active {
            memory: driver.memory,
            queues: driver.queues,
            interrupt: driver.interrupt,
            transmitted: Chain::new(driver.features).within(driver.shared.clone()),
            buffer: Chain::new(driver.features).within(driver.shared.clone()),
            has_buffer: false,
        });
        self.muxer.open();
        Ok(())
    }

    fn activation_failed(&mut self) {
        self.metrics.activate_fails.count();
    }

    fn reset(&mut self) {
        self.stop();
    }

    fn notify(&mut self, queue: u16) {
        match usize::from(queue) {
            RX => self.metrics.rx_queue_event_count.count(),
            TX => self.metrics.tx_queue_event_count.count(),
            _ => {}
        }
        self.run();
    }

    fn register(&mut self, ops: &mut EventOps) {
        let descriptor = self.muxer.descriptor().as_raw_fd();
        let events = Events::with_data_raw(descriptor, DEVICE_EVENTS, EventSet::IN);
        if let Err(error) = ops.add(events) {
            error!("vsock: the host's sockets cannot be watched: {error}");
        }
    }

    fn event(&mut self, event: Events, ops: &mut EventOps) {
        if let Err(error) = self.host_ready() {
            self.metrics.muxer_event_fails.count();
            // It would fail again at once, for ever.
            warn!("vsock: the host's sockets cannot be watched any more: {error}");
            let _ = ops.remove(event);
            if let Some(active) = &self.active {
                active.interrupt.needs_reset(&"the host's sockets cannot be watched");
            }
            self.stop();
        }
    }
}
