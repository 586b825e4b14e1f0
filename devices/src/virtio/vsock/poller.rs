//! What a muxer waits for: sockets, time, and itself, behind one epoll descriptor that nests in the event loop's.
//!
//! Connections are watched edge-triggered for data: a socket that nobody may read from now
//! (no credit, no buffer) costs nothing until it can be read again, and no system call is spent on changing
//! what is watched. Room is watched only while there is something to write, since the host's
//! program would otherwise wake us with every read.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::connection::Readiness;
use super::packet::{PORT_ANY, Ports};

/// Events taken per call; more stay pending.
const MAX_EVENTS: usize = 64;
/// Length of a tick, nanoseconds.
const TICK_NANOSECONDS: i64 = 500_000_000;

/// Who is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The listening socket.
    Listener,
    /// The timer.
    Timer,
    /// [`Poller::wake`] was called.
    Wake,
    /// The handshake of that number, below 2^31.
    Handshake(u32),
    /// The connection of these ports, neither of which is `PORT_ANY`.
    Connection(Ports),
}

/// Marks a number as a handshake's.
const HANDSHAKE: u32 = 1 << 31;

impl Source {
    fn to_data(self) -> EventData {
        let (guest, other) = match self {
            Self::Connection(ports) => (ports.guest, ports.host),
            Self::Listener => (PORT_ANY, 0),
            Self::Timer => (PORT_ANY, 1),
            Self::Wake => (PORT_ANY, 2),
            Self::Handshake(number) => (PORT_ANY, HANDSHAKE | number),
        };
        EventData::new_u64(u64::from(guest) << 32 | u64::from(other))
    }

    fn from_data(data: EventData) -> Self {
        let (guest, other) = ((data.u64() >> 32) as u32, data.u64() as u32);
        match (guest, other) {
            (PORT_ANY, 0) => Self::Listener,
            (PORT_ANY, 1) => Self::Timer,
            (PORT_ANY, number) if number & HANDSHAKE != 0 => Self::Handshake(number & !HANDSHAKE),
            (PORT_ANY, _) => Self::Wake,
            (guest, host) => Self::Connection(Ports { host, guest }),
        }
    }
}

/// The epoll descriptor and what belongs to it.
pub struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
    wake: OwnedFd,
    ticking: bool,
}

impl Poller {
    /// A poller that watches nothing yet.
    pub fn new() -> io::Result<Self> {
        let poller = Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            ticking: false,
        };
        epoll::add(&poller.epoll, &poller.timer, Source::Timer.to_data(), EventFlags::IN)?;
        epoll::add(&poller.epoll, &poller.wake, Source::Wake.to_data(), EventFlags::IN)?;
        Ok(poller)
    }

    /// The descriptor that is readable while somebody is ready.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Starts or stops to watch the listening socket. One that is not watched must not be there at all: else it would
    /// still tell, for ever, that it was shut down.
    pub fn watch_listener(&self, socket: impl AsFd, watch: bool) -> io::Result<()> {
        let result = if watch {
            epoll::add(&self.epoll, socket, Source::Listener.to_data(), EventFlags::IN)
        } else {
            epoll::delete(&self.epoll, socket)
        };
        Ok(result?)
    }

    /// Adds a socket of a handshake or a connection. It is watched until it is closed.
    pub fn add(&self, socket: impl AsFd, source: Source) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, source.to_data(), stream_flags(false))?)
    }

    /// Changes whose socket it is, and whether it is watched for room. What is ready is told again.
    pub fn modify(&self, socket: impl AsFd, source: Source, room: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, socket, source.to_data(), stream_flags(room))?)
    }

    /// Takes what is ready, without waiting, and appends it to `ready`.
    pub fn take(&self, ready: &mut Vec<(Source, Readiness)>) -> io::Result<()> {
        let mut buffer = [const { MaybeUninit::<Event>::uninit() }; MAX_EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let (events, _) = epoll::wait(&self.epoll, &mut buffer, Some(&now))?;
        for event in events {
            let (source, flags) = (Source::from_data(event.data), event.flags);
            match source {
                Source::Timer => drain(&self.timer),
                Source::Wake => drain(&self.wake),
                _ => {}
            }
            let readiness = Readiness {
                data: flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::ERR),
                room: flags.contains(EventFlags::OUT),
                hung_up: flags.contains(EventFlags::HUP),
            };
            ready.push((source, readiness));
        }
        Ok(())
    }

    /// Makes [`Source::Wake`] ready.
    pub fn wake(&self) {
        // Fails only when the counter is full: then it is ready already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Starts or stops the ticks: [`Source::Timer`], every half second.
    pub fn tick(&mut self, ticking: bool) {
        if self.ticking == ticking {
            return;
        }
        let period = Timespec { tv_sec: 0, tv_nsec: if ticking { TICK_NANOSECONDS } else { 0 } };
        let timer = Itimerspec { it_interval: period, it_value: period };
        // Fails only for a bad time or descriptor.
        if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok() {
            self.ticking = ticking;
        }
    }
}

fn stream_flags(room: bool) -> EventFlags {
    let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if room { flags | EventFlags::OUT } else { flags }
}

/// Resets a counter that can be read.
fn drain(counter: &OwnedFd) {
    // Fails if it was read already: then it is reset.
    let _ = rustix::io::read(counter, &mut [0; 8]);
}
