//! The parts together, on real Unix sockets, with a driver that keeps the rules or breaks them.

mod connection;
mod device;
mod driver;
mod hostile;
mod liveness;
mod muxer;
mod storms;
