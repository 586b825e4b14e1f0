//! The virtio socket device: stream connections between programs of the host and of the guest (virtio 1.2, 5.10).
//!
//! # The guest's side
//!
//! Everything is a packet: a header of 44 bytes and, for data, a payload, in one descriptor chain. The guest transmits
//! by queue 1 and offers empty buffers in queue 0. A header names a connection by its two ports and asks for one of
//! seven things: `REQUEST` and `RESPONSE` open a connection, `RW` carries data, `SHUTDOWN` and `RST` end
//! it, `CREDIT_UPDATE` and `CREDIT_REQUEST` are about flow control, for which every header also carries the sender's
//! buffer size and count of consumed bytes.
//!
//! # The host's side
//!
//! The protocol is Firecracker's, on Unix sockets:
//! - To reach port 52 of the guest, a program connects to the device's socket and sends `CONNECT 52\n`. When the guest
//!   has accepted, it reads `OK 1073741824\n` (the port on the host's side), and what follows is the stream. If the
//!   guest refuses, the socket is closed.
//! - To be reached on port 52, a program listens on the device's socket path followed by `_52`.
//!
//! # Who does what
//!
//! - [`packet`]: headers. [`payload`]: guest memory as source and target of socket calls, without a copy.
//! - [`connection`]: the state machine of one connection, with credit flow and half-close; [`buffer`]: what the
//!   host's socket did not take yet.
//! - [`handshake`]: the `CONNECT` line. [`host`]: Unix sockets. [`poller`]: the private epoll descriptor.
//! - [`muxer`]: all connections, whose turn it is, and what bounds them. [`metrics`]: what is counted.
//! - [`device`]: the queues.

mod buffer;
mod connection;
mod device;
mod handshake;
mod host;
mod metrics;
mod muxer;
mod packet;
mod payload;
mod poller;

pub use device::{Vsock, VsockError};
pub use host::{BindError, SocketFile, bind};
pub use metrics::VsockMetrics;

#[cfg(test)]
mod tests;
